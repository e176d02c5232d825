"""The configurations that come with the package: segdiff_dist/configs/*.yaml, by name."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from data_shards.problems import problem

_FOLDER = Path(__file__).with_name("configs")


def shipped_names() -> list[str]:
    """`amos_small`, `best_ct_mr`, `demo`, ..."""
    return sorted(file.stem for file in _FOLDER.glob("*.yaml"))


def shipped_config(name: str) -> Path:
    """The file of a shipped configuration."""
    assert name in shipped_names(), name
    return _FOLDER / f"{name}.yaml"


def find_config(given: str) -> Path:
    """The file that --config names: a path, or the name of a shipped configuration. A file of that name takes
    precedence.

    Raises InputProblems if there is neither.
    """
    if Path(given).is_file():
        return Path(given)
    names = shipped_names()
    if given in names:
        return shipped_config(given)
    likely = get_close_matches(Path(given).stem, names, n=1)
    meant = f"did you mean {likely[0]}? " if likely else ""
    remedy = f"{meant}give the path of a YAML file, or one of {', '.join(names)}"
    raise problem(given, "config", "no such file", remedy)
