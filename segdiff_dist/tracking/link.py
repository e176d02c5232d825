"""RUN/mlflow.json: the MLflow run that a folder's stages add to, and whether this user began it on this machine.

The file is signed with a key that never leaves the user's own state folder. A folder without this signature is foreign:
it was begun by somebody else or on another machine, or its mlflow.json was changed. Records in a foreign folder are not
sent, and the store that it names is not used, before `segdiff track RUN --adopt` takes it over. A folder may be moved:
the path in the file only shows that a folder is a copy, whose records would otherwise be mixed with the original's.
"""

from __future__ import annotations

import json
import math
import os
import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_shards.files import write_atomic
from data_shards.problems import InputProblems, Problem, problem, refuse
from segdiff_dist.tracking.path_checks import odd_entry, open_plain
from segdiff_dist.tracking.signing import is_signed, signed
from segdiff_dist.tracking.store import STORE_FILES, is_own, make_own, odd_files, store_of, why_not_beside

LINK, SPOOL, REFUSED = "mlflow.json", "mlflow_spool", "mlflow_refused.jsonl"
_MOST_BYTES = 1 << 16
_RUN_ID, _TOKEN = re.compile(r"[\w-]{1,64}"), re.compile(r"[0-9a-f]{32}")
_REPAIR = "remove the file to begin a new MLflow run, or restore it"


def read_link(folder: Path) -> dict[str, Any]:
    """The contents of mlflow.json; empty without the file. Raises InputProblems if it was changed or damaged."""
    path = folder / LINK
    if not os.path.lexists(path):
        return {}
    try:
        with os.fdopen(open_plain(path, os.O_RDONLY), "rb") as file:
            text = file.read(_MOST_BYTES + 1)
        link = json.loads(text) if len(text) <= _MOST_BYTES else None
    except (OSError, ValueError, RecursionError) as error:
        raise problem(path, "mlflow.json", f"cannot be read: {type(error).__name__}", _REPAIR) from error
    if not isinstance(link, dict):
        raise problem(path, "mlflow.json", "not the contents that a run writes", _REPAIR)
    wrong = [name for name, is_right in _FIELDS.items() if link.get(name) is not None and not is_right(link[name])]
    refuse(Problem(str(path), name, f"{link[name]!r:.80}", _REPAIR) for name in wrong)
    return link


def write_link(folder: Path, link: Mapping[str, Any]) -> None:
    """Write mlflow.json, signed."""
    write_atomic(folder / LINK, json.dumps(signed(link)) + "\n")


def is_foreign(folder: Path) -> bool:
    """Whether the folder holds traces of a tracking that this user did not begin on this machine, or the database
    beside it that it goes on in is not this user's."""
    try:
        link = read_link(folder)
    except InputProblems:
        return True
    if not link:
        # The database may be that of the run folders in this one.
        traces = (LINK, SPOOL, REFUSED, *(() if is_own(folder) else STORE_FILES))
        return any(os.path.lexists(folder / name) for name in traces)
    return not is_signed(link) or (link.get("beside") is True and not is_own(store_of(folder, is_beside=True)))


def adopt(folder: Path) -> str | None:
    """Make a foreign folder's tracking this user's own: its waiting records are sent from now on.

    Tracking continues in the folder's sqlite or the one beside it, or in the store of MLFLOW_TRACKING_URI. Returns the
    other store that the folder names, which is not used; None if it names none. Raises InputProblems if mlflow.json is
    damaged, or if a file of the tracking is a link, a device or a pipe.
    """
    link = read_link(folder)
    store = store_of(folder, link.get("beside") is True)
    problems = [odd for name in (LINK, SPOOL, REFUSED) if (odd := odd_entry(folder / name)) is not None]
    problems += [folder / SPOOL] if (folder / SPOOL).is_file() else []
    problems += [folder / name for name in (LINK, REFUSED) if (folder / name).is_dir()]
    problems += [odd for one in dict.fromkeys((folder, store)) for odd in odd_files(one)]
    remedy = "such a folder was not left by segdiff; remove it"
    refuse(Problem(str(odd), "tracking", "a link, a device or a pipe", remedy) for odd in problems)
    if link.get("beside"):
        make_own(store)
        if why_not_beside(folder) is not None:
            link |= {"beside": False, "run_id": None, "token": None}
    other = link.get("tracking_uri")
    if other is not None and other != os.environ.get("MLFLOW_TRACKING_URI"):
        link |= {"tracking_uri": None, "run_id": None, "token": None}
    else:
        other = None
    write_link(folder, {"experiment": "segdiff", "run_id": None} | link | {"token": link.get("token") or new_token()})
    return other


def new_token() -> str:
    """A token that distinguishes a run from the others of its store."""
    return uuid.uuid4().hex


def _is_text(most: int) -> Any:
    return lambda value: isinstance(value, str) and 0 < len(value) <= most and value.isprintable()


_FIELDS = {
    "tracking_uri": _is_text(4096),
    "experiment": lambda value: isinstance(value, str) and len(value) <= 500,
    "run_id": lambda value: isinstance(value, str) and _RUN_ID.fullmatch(value) is not None,
    "token": lambda value: isinstance(value, str) and _TOKEN.fullmatch(value) is not None,
    "began_s": lambda value: type(value) in (int, float) and math.isfinite(value) and 0 <= value < 1e11,
    "folder": _is_text(4096),
    "beside": lambda value: isinstance(value, bool),
    "signature": _is_text(64),
}
