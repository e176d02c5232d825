"""Writes checkpoints from a thread, while the training goes on."""

from __future__ import annotations

import errno
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
from torch import Tensor

from data_shards.files import sync_folder, write_atomic
from data_shards.store.codecs import crc32c
from segdiff_dist.ranks.distributed import DelayedMax, is_main, rank, world_size
from segdiff_dist.training import sharded_state
from segdiff_dist.training.checkpoint import MARKER, STATE, checkpoint_name, prune
from segdiff_dist.training.sharded_state import StateShard


class CheckpointWriter:
    """Copies and writes the state in a thread. Use as a context; make it, and call it, on every rank.

    start() begins a checkpoint: the thread copies this rank's state and writes the copy. A step calls
    wait_until_copied() before it changes the weights; its forward and backward passes run during the copy. after_step()
    exchanges the progress of all ranks. Once every rank has written its part, rank 0 writes the marker and calls
    `on_complete(folder)`, in its thread. drain() waits for all of that.

    A checkpoint that cannot be written (a full disk) is removed with a warning, and those before it stay. If
    `on_complete` raises OSError, the checkpoint stays, also with a warning. `num_failed` counts both. `lost` is the
    count of images of the last checkpoint that could not be written: every rank knows it after drain().
    """

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
        self._signals = DelayedMax(("stop", "checkpoint_behind", "checkpoint_failed"))
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._copies: dict[str, list[Tensor]] = {}
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

    def start(self, state: StateShard, values: dict[str, Any]) -> None:
        """Begin checkpoint values["images_seen"]. Call when nothing is pending."""
        begin = time.perf_counter()
        assert self._pending is None
        folder = self.checkpoints / checkpoint_name(values["images_seen"])
        self._pending = folder, {**values, "ranks": world_size()}
        self._begin(values["images_seen"])
        self._copied.clear()
        self._writing = self._thread.submit(self._write, folder, state)
        if torch.cuda.is_available():  # only the copy uses the link to the host, which is far faster than the disk
            self._copied.wait()
        self.waited_s += time.perf_counter() - begin

    def resume_pending(self, folder: Path, values: dict[str, Any] | None = None) -> None:
        """Call `on_complete` again for the checkpoint that a run resumes from: a kill may have prevented it.

        With `values`, first make them the checkpoint's state. Call it before the first start().
        """
        self._begin(int(folder.name))
        if is_main():
            self._completing = self._thread.submit(self._complete, folder, values)

    def wait_until_copied(self) -> None:
        """Wait until the state may be changed again."""
        begin = time.perf_counter()
        self._copied.wait()
        self.waited_s += time.perf_counter() - begin

    def reserve(self, shards: dict[str, list[Tensor]]) -> None:
        """Allocate the host memory for copies of `shards` now. Otherwise the first copy waits for it, 1 s for 2 GiB."""
        pinned = torch.cuda.is_available()
        for kind, tensors in shards.items():
            self._copies[kind] = [torch.empty(t.shape, dtype=t.dtype, pin_memory=pinned).fill_(0) for t in tensors]

    @property
    def pending(self) -> bool:
        """Whether some rank is writing a checkpoint."""
        return self._pending is not None

    def after_step(self, stop: bool = False) -> bool:
        """Exchange the progress of all ranks, and complete the checkpoint that all have written.

        Call it once a step. `stop`: whether this rank was asked to stop. Returns whether any rank was, one call late,
        so that no rank waits for the network and all ranks stop at the same step.
        """
        agreed = self._signals.exchange({"stop": float(stop), **self._progress()})
        self._poll(agreed)
        return agreed["stop"] > 0

    def drain(self, *, must_succeed: bool = False) -> None:
        """Wait until every rank has written its pending checkpoint, and until `on_complete` has ended.

        With `must_succeed` it raises OSError if the last checkpoint, or the result of `on_complete`, could not be
        written.
        """
        begin = time.perf_counter()
        if self._writing is not None:
            self._writing.exception()  # waits
        while self._pending is not None:
            self._exchange_once_more()
        if self._completing is not None:
            self._completing.result()
        if not self._settled:  # only rank 0 knows whether it became complete
            self._exchange_once_more()
            self._settled = True
        self.waited_s += time.perf_counter() - begin
        if must_succeed and self._last and self.lost == self._last:
            reason = self._error or (self._writing and self._writing.exception()) or "another rank could not write"
            raise _failure("the checkpoint could not be written", reason)
        if must_succeed and self._error is not None:
            raise _failure("the checkpoint is whole, but what follows from it could not be written", self._error)

    def _progress(self) -> dict[str, float]:
        """The values of this rank for an exchange; each rank gets the maximum over ranks."""
        if self._writing is not None and self._writing.done() and self._pending is not None:
            self._ended = self._pending[1]["images_seen"]
            if isinstance(self._writing.exception(), OSError):
                self._failed = self._ended
            else:
                self._writing.result()
        return {"checkpoint_behind": -float(self._ended), "checkpoint_failed": float(self._failed)}

    def _poll(self, agreed: dict[str, float]) -> None:
        """Complete the pending checkpoint if every rank has ended its writing."""
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
                reason = self._writing.exception() or "another rank could not write its part"
                warnings.warn(f"checkpoint {folder} could not be written and is left out: {reason}", stacklevel=2)
                self._completing = self._thread.submit(shutil.rmtree, folder, True)
        elif is_main():
            self._completing = self._thread.submit(self._complete, folder, values)

    def _exchange_once_more(self) -> None:
        """An exchange outside a step. A request to stop is sent again, for the loop's next after_step()."""
        stop = self._signals.finish()["stop"]
        self._signals.exchange({"stop": stop, **self._progress()})
        self._poll(self._signals.finish())

    def _begin(self, images_seen: int) -> None:
        self._last, self._settled, self._error = images_seen, False, None

    def _write(self, folder: Path, state: StateShard) -> None:
        try:
            if not self._copies:
                self.reserve(state.shards)
            for kind, tensors in state.shards.items():
                copy_into(self._copies[kind], tensors)
        finally:
            self._copied.set()
        folder.mkdir(parents=True, exist_ok=True)
        if is_main():
            (folder / MARKER).unlink(missing_ok=True)  # of a damaged one that is written again
        sharded_state.write(folder, rank(), replace(state, shards=self._copies))

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


def copy_into(copies: list[Tensor], tensors: list[Tensor]) -> None:
    """Copy each tensor into the one of the same number, and wait for the devices that hold them."""
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor, non_blocking=True)
    # Each device by name: the current device of this thread is the first GPU, whichever the rank owns.
    for device in {tensor.device for tensor in tensors}:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def _failure(message: str, reason: object) -> OSError:
    """The error of a run whose last checkpoint failed. It keeps the errno, which shows whether the disk is full."""
    number = reason.errno if isinstance(reason, OSError) else None
    return OSError(number or errno.EIO, f"{message}: {reason}")
