"""Rows of a shard set to arrays: one read a sample, compared with its checksum; bad samples are refused or replaced.

Dimensions: B batch, H rows, W columns.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from data_shards.feed.order import Order
from data_shards.problems import DamagedSample
from data_shards.store.byte_ranges import Range, ShortFile
from data_shards.store.codecs import PICTURES, crc32c, decode_into
from data_shards.store.shards import ShardSet

# Largest gap between the parts of a sample in a tar: a header, a NumPy file's header and padding, or other members.
_LARGEST_GAP = 4096
# Number of replacements that are tried before a set counts as lost.
_MOST_REPLACEMENTS = 100

# One part: pixels [B, C, H, W], or for codecs that DALI decodes the encoded bytes of each sample.
Pixels = np.ndarray | list[np.ndarray]
# What a range fills: a sample's number in the batch, its parts and their checksums.
Filling = tuple[int, list[tuple[str, int]]]
# Called with part and sample when the payload's bytes are there and are right.
Finish = Callable[[str, int], object]


@dataclass(frozen=True)
class Window:
    """The window of each slice: `size` rows and columns from (top_B, left_B), int64 [B], mirrored left and right where
    mirrored_B is True."""

    top_B: np.ndarray
    left_B: np.ndarray
    size: int
    mirrored_B: np.ndarray

    def of(self, index: np.ndarray) -> Window:
        """The windows of some of the samples."""
        return Window(self.top_B[index], self.left_B[index], self.size, self.mirrored_B[index])

    def room_for(self, whole_BCHW: np.ndarray) -> np.ndarray:
        """An empty array for the windows."""
        return np.empty((*whole_BCHW.shape[:2], self.size, self.size), whole_BCHW.dtype)

    def cut(self, i: int, whole_CHW: np.ndarray, out_CHW: np.ndarray) -> None:
        """Copy the window of sample i."""
        top, left = int(self.top_B[i]), int(self.left_B[i])
        window_CHW = whole_CHW[:, top : top + self.size, left : left + self.size]
        if not self.mirrored_B[i]:
            out_CHW[:] = window_CHW
        elif window_CHW.dtype == np.uint8 and self.size % 8 == 0:
            # Eight pixels at a time, from last to first: a third of the time.
            out_CHW.view(">u8")[:] = window_CHW.view("<u8")[..., ::-1]
        else:
            out_CHW[:] = window_CHW[..., ::-1]


class BatchReader:
    """Reads the samples of a batch together, and checks that every byte is as it was written.

    `skipped`: the bad rows and the reasons, if on_corrupt is `skip`. A training run takes another sample instead, which
    depends on the position alone (Order.stand_ins); a single pass leaves bad samples out. A sample is bad if its bytes
    have changed or are missing. A store that does not answer is always an error, since it may answer later. Not to be
    shared by threads.
    """

    def __init__(self, shards: ShardSet, order: Order, parts: Sequence[str], on_corrupt: str, num_threads: int) -> None:
        self._shards, self._order, self._parts = shards, order, tuple(parts)
        self._skips = on_corrupt == "skip"
        self.skipped: dict[int, str] = {}
        self._num_threads = num_threads
        self._pool = ThreadPoolExecutor(num_threads, "loader") if num_threads > 1 else None
        self._gap = np.empty(_LARGEST_GAP, np.uint8).data
        self._buffers: dict[str, np.ndarray] = {}

    def read(
        self, position_B: np.ndarray, window: Window | None = None
    ) -> tuple[np.ndarray, np.ndarray, dict[str, Pixels]]:
        """Positions and rows that were read, and their parts: uint8 or uint16 [B, C, H, W], with C 2 for edge and else
        1; or lists of encoded pictures, which are not cut to a window. Raises ValueError naming shard and sample."""
        row_B = self._order.rows_at(position_B)
        pixels, errors = self._read_rows(row_B, window)
        for attempt in range(1, _MOST_REPLACEMENTS + 1):
            bad = [i for i, error in enumerate(errors) if error is not None]
            if not bad:
                return position_B, row_B, pixels
            for i in bad:
                self._refuse_or_note(int(row_B[i]), errors[i] or "")
            stand_in_B = self._order.stand_ins(position_B[bad], attempt)
            if stand_in_B is None:
                good = np.setdiff1d(np.arange(len(row_B)), bad)
                return position_B[good], row_B[good], {part: _chosen(p, good) for part, p in pixels.items()}
            row_B = row_B.copy()
            row_B[bad] = stand_in_B
            again, found = self._read_rows(row_B[bad], window and window.of(np.array(bad)))
            for k, i in enumerate(bad):
                errors[i] = found[k]
                for part in self._parts:
                    pixels[part][i] = again[part][k]
        raise DamagedSample(f"{self._shards.root}: {len(self.skipped)} samples are bad, the last: {errors[bad[0]]}")

    def close(self) -> None:
        """End its threads."""
        if self._pool is not None:
            self._pool.shutdown()

    def _refuse_or_note(self, row: int, error: str) -> None:
        if not self._skips:
            raise DamagedSample(error)
        if row not in self.skipped:
            self.skipped[row] = error
            warnings.warn(f"skipped: {error}", RuntimeWarning, stacklevel=2)

    def _read_rows(self, row_B: np.ndarray, window: Window | None) -> tuple[dict[str, Pixels], list[str | None]]:
        """The parts of every row, and for each row None or its error."""
        codec, num = self._shards.codec, len(row_B)
        if codec in PICTURES:
            encoded = self._encoded(row_B)
            return dict(encoded), self._fill(row_B, encoded, _done)
        out = {part: np.empty(self._shape(part, num, window), self._shards.dtype(part)) for part in self._parts}
        whole = {part: list(out[part]) if window is None else self._scratch(part, num) for part in self._parts}
        if codec == "raw":
            payloads = {part: [one.reshape(-1).view(np.uint8) for one in slices] for part, slices in whole.items()}
        else:
            payloads = self._encoded(row_B)

        def finish(part: str, i: int) -> None:
            if codec != "raw":
                decode_into(payloads[part][i], codec, whole[part][i])
            if window is not None:
                window.cut(i, whole[part][i], out[part][i])

        errors = self._fill(row_B, payloads, _done if codec == "raw" and window is None else finish)
        return dict(out), errors

    def _shape(self, part: str, num: int, window: Window | None = None) -> tuple[int, ...]:
        side = self._shards.size if window is None else window.size
        return num, 2 if part == "edge" else 1, side, side

    def _scratch(self, part: str, num: int) -> list[np.ndarray]:
        """Buffers for whole slices from which windows are cut. A thread that reads from a disk has one, which stays in
        the processor's cache."""
        share = self._share(num) if self._shards.is_local else 1
        needed = -(-num // share)
        if part not in self._buffers or len(self._buffers[part]) < needed:
            self._buffers[part] = np.empty(self._shape(part, needed), self._shards.dtype(part))
        return [self._buffers[part][i // share] for i in range(num)]

    def _encoded(self, row_B: np.ndarray) -> dict[str, list[np.ndarray]]:
        return {p: [np.empty(n, np.uint8) for n in self._shards.parts[p].bytes_N[row_B].tolist()] for p in self._parts}

    def _share(self, num: int) -> int:
        """How many of `num` samples a thread reads. Those of a remote set are requested all at once."""
        return max(1, -(-num // self._num_threads) if self._shards.is_local else num)

    def _fill(self, row_B: np.ndarray, payloads: dict[str, list[np.ndarray]], finish: Finish) -> list[str | None]:
        """Read all payloads, neighbouring parts in one read. Each is compared with its checksum and finished, from a
        disk at once, while its bytes are in the processor's cache. `finish` may raise ValueError."""
        shards, num = self._shards, len(row_B)
        columns = {part: self._columns(part, row_B) for part in self._parts}
        errors: list[str | None] = [None] * num
        share = self._share(num)

        def check(sample: Filling) -> None:
            i, checksums = sample
            for part, checksum in checksums:
                try:
                    if crc32c(payloads[part][i]) != checksum:
                        raise ValueError("its bytes are not those that were written (CRC-32C)")
                    finish(part, i)
                except ValueError as error:
                    errors[i] = errors[i] or shards.describe_failure(int(row_B[i]), part, error)

        def fill(first: int) -> None:
            ranges, fillings = self._ranges(range(first, min(first + share, num)), columns, payloads)
            for (i, _), error in zip(fillings, self._read(ranges, fillings, check), strict=True):
                if error is not None:
                    errors[i] = shards.describe_failure(int(row_B[i]), "image", error)
                    if not isinstance(error, ShortFile | FileNotFoundError):
                        raise DamagedSample(errors[i]) from error

        others = [self._pool.submit(fill, first) for first in range(share, num, share)] if self._pool else []
        fill(0)
        for other in others:
            other.result()
        return errors

    def _read(
        self, ranges: list[Range], fillings: list[Filling], check: Callable[[Filling], None]
    ) -> list[OSError | None]:
        if self._shards.is_local:
            return self._shards.read_ranges(ranges, lambda k: check(fillings[k]))
        filled: list[Filling] = []
        errors = self._shards.read_ranges(ranges, lambda k: filled.append(fillings[k]))
        list(map(check, filled) if self._pool is None else self._pool.map(check, filled))
        return errors

    def _ranges(
        self,
        samples: range,
        columns: Mapping[str, tuple[list[int], list[int], list[int]]],
        payloads: dict[str, list[np.ndarray]],
    ) -> tuple[list[Range], list[Filling]]:
        """What to read, and what each range fills."""
        ranges: list[Range] = []
        fillings: list[Filling] = []
        for i in samples:
            views: list[memoryview] = []
            checksums: list[tuple[str, int]] = []
            at = (-1, -1)  # file, and the offset at which the current range ends
            for offset, file, checksum, part in sorted(
                (c[1][i], c[0][i], c[2][i], part) for part, c in columns.items()
            ):
                payload = payloads[part][i]
                gap = offset - at[1]
                if at[0] == file and 0 <= gap <= _LARGEST_GAP:
                    views += (self._gap[:gap], payload.data) if gap else (payload.data,)
                    checksums.append((part, checksum))
                else:
                    views, checksums = [payload.data], [(part, checksum)]
                    ranges.append(Range(file, offset, views))
                    fillings.append((i, checksums))
                at = (file, offset + payload.nbytes)
        return ranges, fillings

    def _columns(self, part: str, row_B: np.ndarray) -> tuple[list[int], list[int], list[int]]:
        where = self._shards.parts[part]
        return where.file_N[row_B].tolist(), where.offset_N[row_B].tolist(), where.crc32c_N[row_B].tolist()


def _done(part: str, i: int) -> None:
    """Nothing is left to do with a payload."""


def _chosen(pixels: Pixels, index: np.ndarray) -> Pixels:
    return pixels[index] if isinstance(pixels, np.ndarray) else [pixels[i] for i in index.tolist()]
