"""Rows of a shard set to arrays: one read a sample, compared with its checksum; bad samples are refused or replaced.

Dimensions: B batch, H rows, W columns.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count, repeat

import numpy as np

from data_shards.feed.batch_memory import BatchMemory
from data_shards.feed.helpers import Helpers
from data_shards.feed.order import Order
from data_shards.problems import DamagedSample
from data_shards.store.byte_ranges import Range, ShortFile
from data_shards.store.codecs import PICTURES, crc32c, decode_into
from data_shards.store.shards import ShardSet

# Largest gap between the parts of a sample in a tar: a header, a NumPy file's header and padding, or other members.
_LARGEST_GAP = 4096
# Number of replacements that are tried before a set counts as lost.
_MOST_REPLACEMENTS = 100

# Eight pixels as one number, from the first to the last or back.
_FORWARD, _BACKWARD = np.dtype("<u8"), np.dtype(">u8")

# One part: pixels [B, C, H, W], or for codecs that DALI decodes the encoded bytes of each sample.
Pixels = np.ndarray | list[np.ndarray]
# One part's bytes of each sample, to be filled.
Buffers = Sequence[np.ndarray]
# A part of a sample: the sample's number in the batch, part, buffer, checksum, file and offset.
Place = tuple[int, str, np.ndarray, int, int, int]
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

    @cached_property
    def _places(self) -> list[tuple[int, int, bool]]:
        return list(zip(self.top_B.tolist(), self.left_B.tolist(), self.mirrored_B.tolist(), strict=True))

    def cut(self, i: int, whole_CHW: np.ndarray, out_CHW: np.ndarray) -> None:
        """Copy the window of sample i."""
        top, left, is_mirrored = self._places[i]
        window_CHW = whole_CHW[:, top : top + self.size, left : left + self.size]
        if not is_mirrored:
            out_CHW[:] = window_CHW
        elif window_CHW.dtype == np.uint8 and self.size % 8 == 0:
            # Eight pixels at a time, from last to first: a third of the time.
            out_CHW.view(_BACKWARD)[:] = window_CHW.view(_FORWARD)[..., ::-1]
        else:
            out_CHW[:] = window_CHW[..., ::-1]


class BatchReader:
    """Reads the samples of a batch together, and checks that every byte is as it was written.

    `skipped`: the bad rows and the reasons, if on_corrupt is `skip`. A training run takes another sample instead, which
    depends on the position alone (Order.stand_ins); a single pass leaves bad samples out. A sample is bad if its bytes
    have changed or are missing. A store that does not answer is always an error, since it may answer later. Not to be
    shared by threads.
    """

    def __init__(
        self, shards: ShardSet, order: Order, parts: Sequence[str], on_corrupt: str, num_threads: int, num_kept: int
    ) -> None:
        """`num_kept`: batches whose memory is used again once nobody holds them."""
        self._shards, self._order, self._parts = shards, order, tuple(parts)
        self._skips = on_corrupt == "skip"
        self.skipped: dict[int, str] = {}
        self._num_threads, self._is_local = num_threads, shards.is_local
        self._num_misses, self._share = 0, 1
        self._helpers = Helpers(num_threads - 1)
        self._gap = np.empty(_LARGEST_GAP, np.uint8)
        self._gaps: dict[int, np.ndarray] = {}
        self._memory = {part: BatchMemory(num_kept) for part in self._parts}
        self._scratch: dict[str, tuple[np.ndarray, list[np.ndarray]]] = {}

    def read(
        self, position_B: np.ndarray, row_B: np.ndarray, window: Window | None = None
    ) -> tuple[np.ndarray, np.ndarray, dict[str, Pixels]]:
        """The rows of a batch: positions and rows, with replacements or without bad samples, and their parts: uint8 or
        uint16 [B, C, H, W], with C 2 for edge and else 1; or lists of encoded pictures, which are not cut to a window.
        Raises ValueError naming shard and sample."""
        self._share = self._next_share(len(row_B))
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
        self._helpers.close()

    def _next_share(self, num: int) -> int:
        """How many of `num` samples a thread reads. Those of a remote set are requested all at once.

        One thread reads raw slices, while they are in the page cache (the batch before shows it): two would wait for
        each other's interpreter lock after every sample. On two free cores they take a third more CPU time than one,
        and a tenth less time by the clock; with flips and crops more of both.
        """
        num_misses, before = self._shards.num_misses, self._num_misses
        self._num_misses = num_misses
        alone = self._shards.codec == "raw" and num_misses == before
        return max(1, num if alone or not self._is_local else -(-num // self._num_threads))

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
            return dict(encoded), self._fill(row_B, encoded, None)
        lent = {part: self._lend(part, num, window) for part in self._parts}
        out = {part: pixels_BCHW for part, (pixels_BCHW, _) in lent.items()}
        whole = lent if window is None else {part: self._slices(part, num) for part in self._parts}
        encoded = {} if codec == "raw" else self._encoded(row_B)

        def finish(part: str, i: int) -> None:
            if encoded:
                decode_into(encoded[part][i], codec, whole[part][0][i])
            if window is not None:
                window.cut(i, whole[part][0][i], out[part][i])

        buffers = encoded or {part: buffers for part, (_, buffers) in whole.items()}
        return dict(out), self._fill(row_B, buffers, finish if encoded or window is not None else None)

    def _lend(self, part: str, num: int, window: Window | None = None) -> tuple[np.ndarray, list[np.ndarray]]:
        side = self._shards.size if window is None else window.size
        return self._memory[part].lend((num, 2 if part == "edge" else 1, side, side), self._shards.dtype(part))

    def _slices(self, part: str, num: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Arrays and their bytes for whole slices from which windows are cut. A thread that reads from a disk has one,
        which stays in the processor's cache."""
        share = self._share if self._is_local else 1
        needed = -(-num // share)
        if part not in self._scratch or len(self._scratch[part][1]) < needed:
            self._scratch[part] = self._lend(part, needed)
        pixels_TCHW, buffers = self._scratch[part]
        return [pixels_TCHW[i // share] for i in range(num)], [buffers[i // share] for i in range(num)]

    def _encoded(self, row_B: np.ndarray) -> dict[str, list[np.ndarray]]:
        return {p: [np.empty(n, np.uint8) for n in self._shards.parts[p].bytes_N[row_B].tolist()] for p in self._parts}

    def _fill(self, row_B: np.ndarray, buffers: Mapping[str, Buffers], finish: Finish | None) -> list[str | None]:
        """Read all payloads, neighbouring parts in one read. Each is compared with its checksum and finished, from a
        disk at once, while its bytes are in the processor's cache. `finish` may raise ValueError."""
        shards, num = self._shards, len(row_B)
        places = self._places(row_B, buffers)
        errors: list[str | None] = [None] * num
        share = self._share

        def check(payloads: list[Place]) -> None:
            for i, part, buffer, checksum, _, _ in payloads:
                try:
                    if crc32c(buffer) != checksum:
                        raise ValueError("its bytes are not those that were written (CRC-32C)")
                    if finish is not None:
                        finish(part, i)
                except ValueError as error:
                    errors[i] = errors[i] or shards.describe_failure(int(row_B[i]), part, error)

        def fill(first: int) -> None:
            ranges, filled = self._ranges(places[first : first + share])
            for payloads, error in zip(filled, self._read(ranges, filled, check), strict=True):
                if error is not None:
                    i = payloads[0][0]
                    errors[i] = shards.describe_failure(int(row_B[i]), "image", error)
                    if not isinstance(error, ShortFile | FileNotFoundError):
                        raise DamagedSample(errors[i]) from error

        self._helpers.share(fill, range(0, num, share))
        return errors

    def _read(
        self, ranges: list[Range], filled: list[list[Place]], check: Callable[[list[Place]], None]
    ) -> list[OSError | None]:
        if self._is_local:
            return self._shards.read_ranges(ranges, lambda k: check(filled[k]))
        there: list[list[Place]] = []
        errors = self._shards.read_ranges(ranges, lambda k: there.append(filled[k]))
        share = max(1, -(-len(there) // self._num_threads))
        self._helpers.share(lambda first: list(map(check, there[first : first + share])), range(0, len(there), share))
        return errors

    def _places(self, row_B: np.ndarray, buffers: Mapping[str, Buffers]) -> list[tuple[Place, ...]]:
        """The places of every sample's parts, in the order in which those of the first sample are stored."""
        by_part = []
        for part in sorted(self._parts, key=lambda part: self._shards.parts[part].offset_N[row_B[:1]].tolist()):
            where = self._shards.parts[part]
            columns = (column_N[row_B].tolist() for column_N in (where.crc32c_N, where.file_N, where.offset_N))
            by_part.append(zip(count(), repeat(part), buffers[part], *columns))
        return list(zip(*by_part, strict=True))

    def _ranges(self, samples: Sequence[tuple[Place, ...]]) -> tuple[list[Range], list[list[Place]]]:
        """What to read, and what each range fills."""
        files: list[int] = []
        offsets: list[int] = []
        sizes: list[int] = []
        views: list[list[np.ndarray]] = []
        filled: list[list[Place]] = []
        for places in samples:
            last = end = -1  # file and end of the part before
            for place in places:
                _, _, buffer, _, file, offset = place
                gap, num_bytes = offset - end, len(buffer)
                if file == last and 0 <= gap <= _LARGEST_GAP:
                    sizes[-1] += gap + num_bytes
                    views[-1] += (self._gap_of(gap), buffer)
                    filled[-1].append(place)
                else:
                    files.append(file)
                    offsets.append(offset)
                    sizes.append(num_bytes)
                    views.append([buffer])
                    filled.append([place])
                last, end = file, offset + num_bytes
        return list(map(Range, files, offsets, sizes, views)), filled

    def _gap_of(self, num_bytes: int) -> np.ndarray:
        if num_bytes not in self._gaps:
            self._gaps[num_bytes] = self._gap[:num_bytes]
        return self._gaps[num_bytes]


def _chosen(pixels: Pixels, index: np.ndarray) -> Pixels:
    return pixels[index] if isinstance(pixels, np.ndarray) else [pixels[i] for i in index.tolist()]
