"""Checkpoint folders: checkpoints/<images_seen, zero-padded>/, complete when their marker file exists."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

from segdiff_dist.config import write_text_atomically

MARKER = "COMPLETE"
STATE = "state.json"
_DIGITS = 12


def checkpoint_name(images_seen: int) -> str:
    """The folder name; padded, so that sorting by name is sorting by images."""
    return f"{images_seen:0{_DIGITS}d}"


def newest_complete(checkpoints: Path) -> Path | None:
    """The newest complete checkpoint; newer incomplete ones are passed over with a warning."""
    if not checkpoints.is_dir():
        return None
    for folder in sorted((p for p in checkpoints.iterdir() if p.is_dir()), reverse=True):
        if (folder / MARKER).is_file():
            return folder
        warnings.warn(f"checkpoint {folder} is incomplete and passed over", stacklevel=2)
    return None


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Write state.json."""
    write_text_atomically(folder / STATE, json.dumps(state, indent=2) + "\n")


def read_state(folder: Path) -> dict[str, Any]:
    """What write_state wrote."""
    return json.loads((folder / STATE).read_text())


def mark_complete(folder: Path) -> None:
    """Declare the checkpoint whole. Call when every rank has written its part."""
    write_text_atomically(folder / MARKER, "")


def prune(checkpoints: Path, keep: int) -> None:
    """Remove all but the newest `keep` complete checkpoints, and the incomplete ones older than those."""
    folders = sorted((p for p in checkpoints.iterdir() if p.is_dir()), reverse=True)
    complete = [p for p in folders if (p / MARKER).is_file()]
    if not complete:
        return
    oldest_kept = complete[:keep][-1]
    for folder in folders:
        if folder.name < oldest_kept.name:
            # Without its marker a half-removed checkpoint reads as incomplete, never as whole.
            (folder / MARKER).unlink(missing_ok=True)
            shutil.rmtree(folder)
