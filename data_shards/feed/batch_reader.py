"""Rows of a shard set to arrays: one read a sample, compared with its checksum; bad samples are refused or replaced.

Dimensions: B batch, H rows, W columns.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
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


@dataclass(frozen=True)
class Window:
    """The window of each slice: `size` rows and columns from (top_B, left_B), int64 [B]."""

    top_B: np.ndarray
    left_B: np.ndarray
    size: int

    def of(self, index: np.ndarray) -> Window:
        """The windows of some of the samples."""
        return Window(self.top_B[index], self.left_B[index], self.size)


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
        self._num_threads = num_threads if shards.codec == "zstd" else 1
        self._pool = ThreadPoolExecutor(num_threads) if self._num_threads > 1 else None
        self._gap = np.empty(_LARGEST_GAP, np.uint8).data
        self._scratch: dict[str, np.ndarray] = {}
        side = shards.size
        self._shape_of = {part: (2 if part == "edge" else 1, side, side) for part in self._parts}

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

    def _refuse_or_note(self, row: int, error: str) -> None:
        if not self._skips:
            raise DamagedSample(error)
        if row not in self.skipped:
            self.skipped[row] = error
            warnings.warn(f"skipped: {error}", RuntimeWarning, stacklevel=2)

    def _read_rows(self, row_B: np.ndarray, window: Window | None) -> tuple[dict[str, Pixels], list[str | None]]:
        """The parts of every row, and for each row None or its error."""
        codec = self._shards.codec
        if codec in PICTURES:
            encoded = self._encoded(row_B)
            errors = self._fill(row_B, encoded)
            return dict(encoded), errors
        whole = {part: self._whole(part, len(row_B), window) for part in self._parts}
        if codec == "raw":
            errors = self._fill(row_B, {p: list(w.reshape(len(row_B), -1).view(np.uint8)) for p, w in whole.items()})
        else:
            encoded = self._encoded(row_B)
            errors = self._fill(row_B, encoded)
            self._decode(row_B, encoded, whole, errors)
        if window is None:
            return dict(whole), errors
        return {part: _cut(w, window) for part, w in whole.items()}, errors

    def _whole(self, part: str, num: int, window: Window | None) -> np.ndarray:
        """A buffer for a part of whole slices. If only windows are cut from it, it is reused and stays in the
        processor's cache."""
        shape, dtype = (num, *self._shape_of[part]), self._shards.dtype(part)
        if window is None:
            return np.empty(shape, dtype)
        if part not in self._scratch or len(self._scratch[part]) < num:
            self._scratch[part] = np.empty(shape, dtype)
        return self._scratch[part][:num]

    def _encoded(self, row_B: np.ndarray) -> dict[str, list[np.ndarray]]:
        return {p: [np.empty(n, np.uint8) for n in self._shards.parts[p].bytes_N[row_B].tolist()] for p in self._parts}

    def _fill(self, row_B: np.ndarray, payloads: dict[str, list[np.ndarray]]) -> list[str | None]:
        """Read all payloads, neighbouring parts in one read, and compare their checksums."""
        shards = self._shards
        columns = {part: self._columns(part, row_B) for part in self._parts}
        ranges: list[Range] = []
        owner: list[int] = []
        for i in range(len(row_B)):
            views: list[memoryview] = []
            at = (-1, -1)  # file, and the offset at which the current range ends
            for offset, file, part in sorted((c[1][i], c[0][i], part) for part, c in columns.items()):
                payload = payloads[part][i]
                gap = offset - at[1]
                if at[0] == file and 0 <= gap <= _LARGEST_GAP:
                    views += (self._gap[:gap], payload.data) if gap else (payload.data,)
                else:
                    views = [payload.data]
                    ranges.append(Range(file, offset, views))
                    owner.append(i)
                at = (file, offset + payload.nbytes)
        errors: list[str | None] = [None] * len(row_B)
        for i, error in zip(owner, shards.read_ranges(ranges), strict=True):
            if error is not None:
                errors[i] = shards.describe_failure(int(row_B[i]), "image", error)
                if not isinstance(error, ShortFile | FileNotFoundError):
                    raise DamagedSample(errors[i]) from error
        for part, (_, _, checksums) in columns.items():
            for i, (payload, checksum) in enumerate(zip(payloads[part], checksums, strict=True)):
                if crc32c(payload) != checksum and errors[i] is None:
                    errors[i] = shards.describe_failure(
                        int(row_B[i]), part, "its bytes are not those that were written (CRC-32C)"
                    )
        return errors

    def _columns(self, part: str, row_B: np.ndarray) -> tuple[list[int], list[int], list[int]]:
        where = self._shards.parts[part]
        return where.file_N[row_B].tolist(), where.offset_N[row_B].tolist(), where.crc32c_N[row_B].tolist()

    def _decode(
        self,
        row_B: np.ndarray,
        payloads: dict[str, list[np.ndarray]],
        whole: dict[str, np.ndarray],
        errors: list[str | None],
    ) -> None:
        """Decode zstd frames into the arrays; the decoder runs without the GIL."""

        def one(job: tuple[str, int]) -> None:
            part, i = job
            try:
                decode_into(payloads[part][i], self._shards.codec, whole[part][i])
            except ValueError as error:
                errors[i] = self._shards.describe_failure(int(row_B[i]), part, error)

        jobs = [(part, i) for i in range(len(row_B)) if errors[i] is None for part in self._parts]
        run: Callable[..., object] = map if self._pool is None else self._pool.map
        list(run(one, jobs))  # type: ignore[call-overload]


def _cut(whole_BCHW: np.ndarray, window: Window) -> np.ndarray:
    cut_BCHW = np.empty((*whole_BCHW.shape[:2], window.size, window.size), whole_BCHW.dtype)
    for i, (top, left) in enumerate(zip(window.top_B.tolist(), window.left_B.tolist(), strict=True)):
        cut_BCHW[i] = whole_BCHW[i, :, top : top + window.size, left : left + window.size]
    return cut_BCHW


def _chosen(pixels: Pixels, index: np.ndarray) -> Pixels:
    return pixels[index] if isinstance(pixels, np.ndarray) else [pixels[i] for i in index.tolist()]
