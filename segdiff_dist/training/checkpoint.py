"""Checkpoint folders: which of them are complete, and which are kept.

A folder checkpoints/<images_seen, zero-padded>/ holds:

    rank_00000.safetensors, .json   one pair a rank (sharded_state.py)
    state.json                      images_seen and what else the loop resumes from, such as which weights are best
    config.yaml                     the resolved config
    COMPLETE                        the marker, written last, when every rank's files are safely on the disk: the
                                    CRC-32C of state.json, which every read compares; empty in early versions
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from data_shards.documents import checked, read_bytes, reading
from data_shards.problems import InputProblems, problem
from data_shards.store.codecs import crc32c
from segdiff_dist.training import sharded_state

if TYPE_CHECKING:
    from data_shards.store.shards import ShardSet

MARKER = "COMPLETE"
STATE = "state.json"
_DIGITS = 12


def checkpoint_name(images_seen: int) -> str:
    """The folder name, padded, so that names sort by images."""
    return f"{images_seen:0{_DIGITS}d}"


def complete_checkpoints(checkpoints: Path) -> list[Path]:
    """Folders with their marker and a readable state, the newest first. Newer folders without these are skipped with a
    warning."""
    complete = []
    for folder in _newest_first(checkpoints):
        why = why_unusable(folder)
        if why is None:
            complete.append(folder)
        elif not complete:
            warnings.warn(f"checkpoint {folder} {why}", stacklevel=2)
    return complete


def newest_usable(checkpoints: Path) -> Path | None:
    """The newest complete checkpoint whose files match their checksums. Rank 0 calls it, before any rank writes.

    Newer ones are skipped with a warning and lose their marker. The run will write into their folders again, and a kill
    must not leave a mixture of old and new files that looks complete.
    """
    for folder in _newest_first(checkpoints):
        why = why_unusable(folder, read_all=True)
        if why is None:
            return folder
        warnings.warn(f"checkpoint {folder} {why}", stacklevel=2)
        (folder / MARKER).unlink(missing_ok=True)
    return None


def why_unusable(folder: Path, *, read_all: bool = False) -> str | None:
    """Why a checkpoint is skipped, for a warning, or None. `read_all` also compares checksums."""
    if not (folder / MARKER).is_file():
        what = "is from within a streak of skipped steps" if _is_discarded(folder) else "is incomplete"
        return f"{what} and skipped"
    try:
        ranks = read_state(folder)["ranks"]
    except InputProblems as error:
        return f"is damaged and skipped: {STATE}: {error.problems[0].value}"
    damage = sharded_state.find_damage(folder, ranks, read_all=True) if read_all else None
    return damage and f"is damaged and skipped: {damage}"


def _is_discarded(folder: Path) -> bool:
    """Whether `discard_unsound` took the marker of a checkpoint that was complete."""
    try:
        return read_state(folder).get("sound") is False
    except InputProblems:
        return False


def read_state(folder: Path) -> dict[str, Any]:
    """The state to resume from; `ranks` is the number of files. Raises InputProblems if it is damaged."""
    remedy, what = "remove this folder; the checkpoint before it is taken", "the state of a training"
    with reading(folder, what, remedy, STATE):
        content = read_bytes(folder / STATE, remedy)
        marker = (folder / MARKER).read_text() if (folder / MARKER).is_file() else ""
        if marker and int(marker) != crc32c(content):
            raise ValueError("its bytes are not those that were written")
        state: Any = json.loads(content)  # it may hold NaN, as in the sums of a window
        checked(state, _State, folder / STATE, what, remedy)
        if state["images_seen"] != int(folder.name):
            raise ValueError(f"images_seen {state['images_seen']}")
    return dict(state)


def refuse_other_set(folder: Path, state: Mapping[str, Any], shards: ShardSet) -> None:
    """Raise InputProblems if a checkpoint's training read another shard set."""
    if state.get("shards_digest", shards.digest) != shards.digest:
        remedy = "restore the shard set the run was started with, or use another run folder"
        raise problem(folder, "shards_digest", f"not that of {shards.root}", remedy)


class _State(TypedDict):
    # Every checkpoint of a training has `guard`, `window` and `shards_digest`.
    images_seen: Annotated[int, Field(ge=0, lt=2**63)]
    ranks: Annotated[int, Field(ge=1, le=2**20)]
    best_score: NotRequired[float | int | None]
    best_images_seen: NotRequired[Annotated[int, Field(ge=0, lt=2**63)] | None]
    validated_images_seen: NotRequired[Annotated[int, Field(ge=0, lt=2**63)] | None]
    shards_digest: NotRequired[str]
    sound: NotRequired[bool]
    guard: NotRequired[Annotated[list[float | int], Field(min_length=4, max_length=5)]]
    window: NotRequired[dict[str, Annotated[list[float | int], Field(min_length=2, max_length=2)]]]


def prune(checkpoints: Path, keep: int, keep_every_images: int | None = None) -> None:
    """Remove old checkpoints, complete or not.

    It keeps the newest `keep` complete ones, the newest sound one, the one with the best weights so far, and those that
    `crossings` names.
    """
    complete = [folder for folder in _newest_first(checkpoints) if why_unusable(folder) is None]
    if not complete:
        return
    kept = {folder.name for folder in complete[:keep]}
    if (best := read_state(complete[0]).get("best_images_seen")) is not None:
        kept.add(checkpoint_name(best))
    if (sound := _newest_sound(complete)) is not None:
        kept.add(sound.name)
    if keep_every_images:
        kept |= set(map(checkpoint_name, crossings((int(folder.name) for folder in complete), keep_every_images)))
    for folder in _newest_first(checkpoints):
        if folder.name not in kept and folder.name < complete[0].name:
            # Without its marker, a checkpoint that is only partly removed counts as incomplete.
            (folder / MARKER).unlink(missing_ok=True)
            shutil.rmtree(folder)


def discard_unsound(checkpoints: Path) -> Path | None:
    """After a run whose last steps were all skipped: return the newest checkpoint from before the first of them.

    Later ones lose their marker, so that no run resumes from them. Skipped steps change no weights, so nothing is lost.
    """
    complete = complete_checkpoints(checkpoints)
    sound = _newest_sound(complete)
    for folder in complete:
        if folder == sound:
            break
        (folder / MARKER).unlink(missing_ok=True)
    return sound


def _newest_sound(complete: Iterable[Path]) -> Path | None:
    """The first that was not written within a streak of skipped steps. Those of early versions count as sound."""
    return next((folder for folder in complete if read_state(folder).get("sound", True)), None)


def crossings(counts: Iterable[int], every: int) -> set[int]:
    """The first of `counts` at or past each multiple of `every`; batches and checkpoints need not end on a multiple."""
    first: dict[int, int] = {}
    for count in sorted(counts):
        first.setdefault(count // every, count)
    first.pop(0, None)
    return set(first.values())


def is_checkpoint_folder(folder: Path) -> bool:
    """Whether a folder has the name of a checkpoint; copies and backups (000000000064.bak) have other names."""
    return len(folder.name) >= _DIGITS and folder.name.isascii() and folder.name.isdigit() and folder.is_dir()


def _newest_first(checkpoints: Path) -> list[Path]:
    return sorted((p for p in checkpoints.glob("[0-9]*") if is_checkpoint_folder(p)), reverse=True)
