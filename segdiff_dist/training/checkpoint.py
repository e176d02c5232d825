"""Checkpoint folders: checkpoints/<images_seen, zero-padded>/, written beside the training, complete when their marker
exists.

    rank_00000.safetensors, .json   one pair a rank (sharded_state.py)
    state.json                      images_seen and what else the loop goes on from
    config.yaml                     the resolved config
    COMPLETE                        written last, when every rank's files are safely on the disk
"""

from __future__ import annotations

import json
import shutil
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from segdiff_dist.config import write_text_atomically
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
    """Folders with their marker, the newest first; newer ones without it are passed over with a warning."""
    found = []
    for folder in sorted((p for p in checkpoints.glob("[0-9]*") if p.is_dir()), reverse=True):
        if (folder / MARKER).is_file():
            found.append(folder)
        elif not found:
            warnings.warn(f"checkpoint {folder} is incomplete and passed over", stacklevel=2)
    return found


def newest_usable(checkpoints: Path) -> Path | None:
    """The newest complete checkpoint whose files match their checksums; others are passed over with a warning."""
    for folder in complete_ones(checkpoints):
        damage = sharded_state.find_damage(folder, read_state(folder)["ranks"], read_all=True)
        if damage is None:
            return folder
        warnings.warn(f"checkpoint {folder} is damaged and passed over: {damage}", stacklevel=2)
    return None


def read_state(folder: Path) -> dict[str, Any]:
    """What the loop went on with; `ranks` says how many files there are."""
    return json.loads((folder / STATE).read_text())


def prune(checkpoints: Path, keep: int, keep_every_images: int | None = None) -> None:
    """Remove all but the newest `keep` complete checkpoints and those whose count keep_every_images divides; and what
    is incomplete and older than those."""
    complete = complete_ones(checkpoints)
    if not complete:
        return
    kept = set(complete[:keep]) | {p for p in complete if keep_every_images and int(p.name) % keep_every_images == 0}
    for folder in checkpoints.glob("[0-9]*"):
        if folder not in kept and folder.name < complete[0].name:
            # Without its marker a half-removed checkpoint reads as incomplete, never as whole.
            (folder / MARKER).unlink(missing_ok=True)
            shutil.rmtree(folder)


class CheckpointWriter:
    """Writes checkpoints from a thread while the training goes on; use as a context, on every rank.

    start() has the thread copy the rank's state and write the copy. On a CPU it returns at once, and the state stays as
    it is until wait_until_copied(), which a step calls before it changes weights: its forward and backward pass run
    beside the copy. poll() is called after every step with what the ranks agreed on; once all have written their part,
    the main rank writes the marker, and `on_complete(folder)` is called there, in the thread. A checkpoint that could
    not be written (a full disk) is removed with a warning, and the ones before it stay.
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
        self._copied.clear()
        self._writing = self._thread.submit(self._write, folder, state)
        if torch.cuda.is_available():  # the host's link is far quicker than its disk, and nothing but the copy uses it
            self._copied.wait()
        self.waited_s += time.perf_counter() - begin

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
        if self._pending is None or self._writing is None:
            return
        folder, values = self._pending
        if -agreed["checkpoint_behind"] < values["images_seen"]:
            return
        self._pending = None
        if agreed["checkpoint_failed"] >= values["images_seen"]:
            self.num_failed += 1
            if is_main():
                why = self._writing.exception() or "another rank could not write its part"
                warnings.warn(f"checkpoint {folder} could not be written and is left out: {why}", stacklevel=2)
                self._completing = self._thread.submit(shutil.rmtree, folder, True)
        elif is_main():
            self._completing = self._thread.submit(self._complete, folder, values)

    def drain(self, agreement: Agreement, *, must_succeed: bool = False) -> None:
        """Wait for what is under way on every rank; call on every rank.

        Raises OSError where it could not be written and `must_succeed`.
        """
        begin = time.perf_counter()
        failed = self.num_failed
        if self._writing is not None:
            self._writing.exception()  # waits
        while self._pending is not None:
            agreement.exchange({"stop": 0.0, **self.flags()})
            self.poll(agreement.finish())
        if self._completing is not None:
            self._completing.result()
        self.waited_s += time.perf_counter() - begin
        if must_succeed and self.num_failed > failed:
            raise OSError(f"the checkpoint could not be written: {self._writing and self._writing.exception()}")

    def _write(self, folder: Path, state: ShardOfState) -> None:
        try:
            copy = replace(state, shards=self._copy_of(state.shards))
        finally:
            self._copied.set()
        folder.mkdir(parents=True, exist_ok=True)
        sharded_state.write(folder, rank(), copy)

    def _complete(self, folder: Path, values: dict[str, Any]) -> None:
        write_text_atomically(folder / "config.yaml", self.config)
        write_text_atomically(folder / STATE, json.dumps(values, indent=2) + "\n")
        write_text_atomically(folder / MARKER, "")
        prune(self.checkpoints, self.keep, self.keep_every_images)
        if self._on_complete is not None:
            self._on_complete(folder)

    def _copy_of(self, shards: dict[str, list[torch.Tensor]]) -> dict[str, list[torch.Tensor]]:
        if not self._staged:
            self.reserve(shards)
        for kind, tensors in shards.items():
            for kept, tensor in zip(self._staged[kind], tensors, strict=True):
                kept.copy_(tensor, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return self._staged
