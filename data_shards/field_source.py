"""The allowed sources of a configuration's field: metadata of the field, read by segdiff_dist.experiment.

A run folder may come from somebody else, and its config.yaml is read by every stage. So settings that run a program,
connect to another machine or name output files are taken only from the user: from flags or the --config file.
"""

import re

# Never from a run folder.
FROM_A_PERSON = {"source": "a person"}
# From a run folder if it is a path on this machine that is read; never if it is an address.
ADDRESS_FROM_A_PERSON = {"source": "a person, where it is an address"}

# From a run folder where it is what segdiff wrote; never where opening it runs code that it brings along.
CODE_FROM_A_PERSON = {"source": "a person, where it runs code"}


def is_address(text: object) -> bool:
    """Whether a value is an address on another machine. fsspec reads PROTOCOL:// and PROTOCOL:: as such."""
    return isinstance(text, str) and ("://" in text or "::" in text)


def url_of(path: str) -> str | None:
    """The URL that a path was given as; None for a path on this machine. pathlib makes `s3:/runs` of `s3://runs`."""
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/+", path)
    return None if found is None else f"{found[1]}://{path[found.end() :]}"
