"""Where a configuration's field may come from: metadata of the field, read by segdiff_dist.experiment.

A run folder may come from somebody else, and its config.yaml is read by every stage. So what runs a program, connects
to another machine or names what is written is taken from a person alone: from flags or the --config file.
"""

# Never from a run folder.
FROM_A_PERSON = {"source": "a person"}
# From a run folder where it is a path on this machine, which is read; never where it is an address.
ADDRESS_FROM_A_PERSON = {"source": "a person, where it is an address"}


def is_address(text: object) -> bool:
    """Whether a value leads to another machine. fsspec reads PROTOCOL:// and PROTOCOL:: as such."""
    return isinstance(text, str) and ("://" in text or "::" in text)
