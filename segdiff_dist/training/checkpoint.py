"""Checkpoint folders: checkpoints/<images_seen, zero-padded>/, written beside the training, complete when their marker
exists.

    rank_00000.safetensors, .json   one pair a rank (sharded_state.py)
    state.json                      images_seen and what else the loop goes on from, such as whose weights are best
    config.yaml                     the resolved config
    COMPLETE                        written last, when every rank's files are safely on the disk: the CRC-32C of
                                    state.json, which every read compares; empty in checkpoints of before
"""

from __future__ import annotations

import errno
import json
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NotRequired

import torch
from pydantic import Field
from typing_extensions import TypedDict

from data_shards.documents import checked, read_bytes, reading
from data_shards.files import sync_folder, write_atomic
from data_shards.problems import InputProblems
from data_shards.store.codecs import crc32c
from segdiff_dist.ranks.distributed import Agreement, is_main, rank, world_size
from segdiff_dist.training import sharded_state
from segdiff_dist.training.sharded_state import ShardOfState

MARKER = "COMPLETE"
STATE = "state.json"
_DIGITS = 12


def checkpoint_name(images_seen: int) -> str:
    """The folder name; padded, so that sorting by name is sorting by images."""
    return f"{images_seen:0{_DIGITS}d}"


def complete_ones(checkpoints: Path) -> list[Path]:
    """Folders with their marker and a state that can be read, the newest first; newer ones without are passed over with
    a warning."""
    found = []
    for folder in _newest_first(checkpoints):
        why = why_unusable(folder)
        if why is None:
            found.append(folder)
        elif not found:
            warnings.warn(f"checkpoint {folder} {why}", stacklevel=2)
    return found


def newest_usable(checkpoints: Path) -> Path | None:
    """The newest complete checkpoint whose files match their checksums; the main rank asks, before others write.

    Newer ones are passed over with a warning, and lose their marker: the run will write into their folders again, where
    a kill must not leave old and new files that pass for a checkpoint.
    """
    for folder in _newest_first(checkpoints):
        why = why_unusable(folder, read_all=True)
        if why is None:
            return folder
        warnings.warn(f"checkpoint {folder} {why}", stacklevel=2)
        (folder / MARKER).unlink(missing_ok=True)
    return None


def why_unusable(folder: Path, *, read_all: bool = False) -> str | None:
    """Why a checkpoint is passed over, in words, or None; `read_all` compares checksums too."""
    if not (folder / MARKER).is_file():
        return "is incomplete and passed over"
    try:
        ranks = read_state(folder)["ranks"]
    except InputProblems as error:
        return f"is damaged and passed over: {STATE}: {error.problems[0].value}"
    damage = sharded_state.find_damage(folder, ranks, read_all=True) if read_all else None
    return damage and f"is damaged and passed over: {damage}"


def read_state(folder: Path) -> dict[str, Any]:
    """What the loop went on with; `ranks` says how many files there are. Raises InputProblems where it is damaged."""
    remedy, what = "remove this folder; the checkpoint before it is taken", "the state of a training"
    with reading(folder, what, remedy, STATE):
        content = read_bytes(folder / STATE, remedy)
        marker = (folder / MARKER).read_text() if (folder / MARKER).is_file() else ""
        if marker and int(marker) != crc32c(content):
            raise ValueError("its bytes are not those that were written")
        state: Any = json.loads(content)  # which may hold NaN, as the sums of a window do
        checked(state, _State, folder / STATE, what, remedy)
        if state["images_seen"] != int(folder.name):
            raise ValueError(f"images_seen {state['images_seen']}")
    return dict(state)


class _State(TypedDict):
    # `guard`, `window` and `shards_digest` are there in every checkpoint of a training.
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
    """Remove all but the newest `keep` complete checkpoints, the newest sound one, the one with the best weights so
    far, and those that `crossings` names; and what is incomplete and older than those."""
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
            # Without its marker a half-removed checkpoint reads as incomplete, never as whole.
            (folder / MARKER).unlink(missing_ok=True)
            shutil.rmtree(folder)


def discard_unsound(checkpoints: Path) -> Path | None:
    """After a run whose last steps were all skipped: have none of the checkpoints written since the first of them be
    resumed, and return the newest one from before. Their weights are those of that moment, so nothing is lost."""
    complete = complete_ones(checkpoints)
    sound = _newest_sound(complete)
    for folder in complete:
        if folder == sound:
            break
        (folder / MARKER).unlink(missing_ok=True)
    return sound


def _newest_sound(complete: Iterable[Path]) -> Path | None:
    """The first that was not written within a streak of skipped steps, as those of before do not say."""
    return next((folder for folder in complete if read_state(folder).get("sound", True)), None)


def crossings(counts: Iterable[int], every: int) -> set[int]:
    """The first of `counts` at or past each multiple of `every`: what stands for that multiple where no batch, or no
    checkpoint, ends on it."""
    first: dict[int, int] = {}
    for count in sorted(counts):
        first.setdefault(count // every, count)
    first.pop(0, None)
    return set(first.values())


def named_as_one(folder: Path) -> bool:
    """Whether a folder beside checkpoints has the name of one: copies and backups (000000000064.bak) have not."""
    return len(folder.name) >= _DIGITS and folder.name.isascii() and folder.name.isdigit() and folder.is_dir()


def _failure(what: str, why: object) -> OSError:
    """The error of a run whose last checkpoint failed, with the number by which a full disk is known."""
    number = why.errno if isinstance(why, OSError) else None
    return OSError(number or errno.EIO, f"{what}: {why}")


def _newest_first(checkpoints: Path) -> list[Path]:
    return sorted((p for p in checkpoints.glob("[0-9]*") if named_as_one(p)), reverse=True)


class CheckpointWriter:
    """Writes checkpoints from a thread while the training goes on; use as a context, on every rank.

    start() has the thread copy the rank's state and write the copy. On a CPU it returns at once, and the state stays as
    it is until wait_until_copied(), which a step calls before it changes weights: its forward and backward pass run
    beside the copy. poll() is called after every step with what the ranks agreed on; once all have written their part,
    the main rank writes the marker, and `on_complete(folder)` is called there, in the thread. A checkpoint that could
    not be written (a full disk) is removed with a warning, and the ones before it stay; one that is whole stays where
    `on_complete` raises OSError, with a warning too. Both count in `num_failed`. `lost` is the count of the last one
    that could not be written, on every rank; it is sure after drain().
    """

    FLAGS = ("checkpoint_behind", "checkpoint_failed")

    def __init__(
        self,
        checkpoints: Path,
        *,
        keep: int,
        keep_every_images: int | None = None,
        config: str = "",
        on_complete: Callable[[Path], None] | None = None,
    ) -> None:
        self.config = config
        self.checkpoints, self.keep, self.keep_every_images = checkpoints, keep, keep_every_images
        self.waited_s = 0.0
        self.num_failed = 0
        self.lost = 0
        self._on_complete = on_complete
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._staged: dict[str, list[torch.Tensor]] = {}
        self._copied = threading.Event()
        self._copied.set()
        self._pending: tuple[Path, dict[str, Any]] | None = None
        self._writing: Future[None] | None = None
        self._completing: Future[None] | None = None
        self._ended = 0  # images_seen of the last checkpoint whose writing ended here, well or not
        self._failed = 0  # likewise, not well
        self._last = 0  # likewise, begun
        self._settled = True  # whether all ranks know what became of that one
        self._error: OSError | None = None  # what it failed with here

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown(wait=True)

    def start(self, state: ShardOfState, values: dict[str, Any]) -> None:
        """Begin checkpoint values["images_seen"]. Call when nothing is pending."""
        begin = time.perf_counter()
        assert self._pending is None
        folder = self.checkpoints / checkpoint_name(values["images_seen"])
        self._pending = folder, {**values, "ranks": world_size()}
        self._begin(values["images_seen"])
        self._copied.clear()
        self._writing = self._thread.submit(self._write, folder, state)
        if torch.cuda.is_available():  # the host's link is far quicker than its disk, and nothing but the copy uses it
            self._copied.wait()
        self.waited_s += time.perf_counter() - begin

    def take_up(self, folder: Path, values: dict[str, Any] | None = None) -> None:
        """Do again what follows from the complete checkpoint that a run goes on from, which was perhaps killed before;
        with `values`, first make them its state. Call on every rank, before the first start()."""
        self._begin(int(folder.name))
        if is_main():
            self._completing = self._thread.submit(self._complete, folder, values)

    def wait_until_copied(self) -> None:
        """The state may be changed again after this."""
        begin = time.perf_counter()
        self._copied.wait()
        self.waited_s += time.perf_counter() - begin

    def reserve(self, shards: dict[str, list[torch.Tensor]]) -> None:
        """Take the host memory that copies of `shards` need; else the first copy waits for it, 1 s for 2 GiB."""
        pinned = torch.cuda.is_available()
        for kind, tensors in shards.items():
            self._staged[kind] = [torch.empty(t.shape, dtype=t.dtype, pin_memory=pinned).fill_(0) for t in tensors]

    @property
    def pending(self) -> bool:
        """Whether a checkpoint is under way on some rank."""
        return self._pending is not None

    def flags(self) -> dict[str, float]:
        """What the ranks must agree on: the maximum over ranks of each goes to the next poll()."""
        if self._writing is not None and self._writing.done() and self._pending is not None:
            self._ended = self._pending[1]["images_seen"]
            if isinstance(self._writing.exception(), OSError):
                self._failed = self._ended
            else:
                self._writing.result()
        return {"checkpoint_behind": -float(self._ended), "checkpoint_failed": float(self._failed)}

    def poll(self, agreed: dict[str, float]) -> None:
        """Finish the pending checkpoint if every rank has ended its writing."""
        if agreed["checkpoint_failed"] > self.lost:
            self.lost = int(agreed["checkpoint_failed"])
            self.num_failed += 1
        if self._pending is None or self._writing is None:
            return
        folder, values = self._pending
        if -agreed["checkpoint_behind"] < values["images_seen"]:
            return
        self._pending = None
        if self.lost == values["images_seen"]:
            if is_main():
                why = self._writing.exception() or "another rank could not write its part"
                warnings.warn(f"checkpoint {folder} could not be written and is left out: {why}", stacklevel=2)
                self._completing = self._thread.submit(shutil.rmtree, folder, True)
        elif is_main():
            self._completing = self._thread.submit(self._complete, folder, values)

    def drain(self, agreement: Agreement, *, must_succeed: bool = False) -> None:
        """Wait for what is under way on every rank; call on every rank.

        Raises OSError where the last checkpoint, or what follows from it, could not be written and `must_succeed`.
        """
        begin = time.perf_counter()
        if self._writing is not None:
            self._writing.exception()  # waits
        while self._pending is not None:
            self._agree(agreement)
        if self._completing is not None:
            self._completing.result()
        if not self._settled:  # whether it became complete only the main rank knows
            self._agree(agreement)
            self._settled = True
        self.waited_s += time.perf_counter() - begin
        if must_succeed and self._last and self.lost == self._last:
            why = self._error or (self._writing and self._writing.exception()) or "another rank could not write"
            raise _failure("the checkpoint could not be written", why)
        if must_succeed and self._error is not None:
            what = "the checkpoint is whole, but what follows from it could not be written"
            raise _failure(what, self._error)

    def _begin(self, images_seen: int) -> None:
        self._last, self._settled, self._error = images_seen, False, None

    def _agree(self, agreement: Agreement) -> None:
        stop = agreement.finish().get("stop", 0.0)  # the loop, which has yet to hear of it, is told after us
        agreement.exchange({"stop": stop, **self.flags()})
        self.poll(agreement.finish())

    def _write(self, folder: Path, state: ShardOfState) -> None:
        try:
            copy = replace(state, shards=self._copy_of(state.shards))
        finally:
            self._copied.set()
        folder.mkdir(parents=True, exist_ok=True)
        if is_main():
            (folder / MARKER).unlink(missing_ok=True)  # of one that was damaged, and is written anew
        sharded_state.write(folder, rank(), copy)

    def _complete(self, folder: Path, values: dict[str, Any] | None) -> None:
        try:
            if values is not None:
                self._seal(folder, values)
        except OSError as error:
            self._error, self._failed = error, int(folder.name)
            warnings.warn(f"checkpoint {folder} could not be written: {error}", stacklevel=1)
            if not (folder / MARKER).is_file():
                shutil.rmtree(folder, ignore_errors=True)
            return
        try:
            prune(self.checkpoints, self.keep, self.keep_every_images)
            if self._on_complete is not None:
                self._on_complete(folder)
        except OSError as error:
            self._error = error
            self.num_failed += 1
            what = "is whole, but what follows from it could not be written"
            warnings.warn(f"checkpoint {folder} {what}: {error}", stacklevel=1)

    def _seal(self, folder: Path, values: dict[str, Any]) -> None:
        write_atomic(folder / "config.yaml", self.config, durable=True)
        write_atomic(folder / STATE, json.dumps(values, indent=2) + "\n", durable=True)
        sync_folder(self.checkpoints)
        write_atomic(folder / MARKER, f"{crc32c((folder / STATE).read_bytes())}\n", durable=True)

    def _copy_of(self, shards: dict[str, list[torch.Tensor]]) -> dict[str, list[torch.Tensor]]:
        if not self._staged:
            self.reserve(shards)
        for kind, tensors in shards.items():
            for kept, tensor in zip(self._staged[kind], tensors, strict=True):
                kept.copy_(tensor, non_blocking=True)
        # Each by name: the current device of this thread is the first, whichever is the rank's.
        for device in {tensor.device for tensors in shards.values() for tensor in tensors}:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        return self._staged
