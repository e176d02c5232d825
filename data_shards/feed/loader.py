"""Shards to device batches: one NVIDIA DALI pipeline, on the GPU if there is one, else the same on the CPU.

On the CPU, slices that need neither decoding of pictures nor rotation, zoom or jitter do not go through DALI: it would
copy them in and out. A separate thread reads, decodes and augments ahead of the consumer of the batches. This file owns
DALI.

Dimensions: B batch, H rows, W columns, C channels.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from itertools import starmap
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from data_shards.feed.augment import augmentation_at
from data_shards.feed.batch_reader import BatchReader
from data_shards.feed.config import LoaderConfig
from data_shards.feed.order import Order, with_rows
from data_shards.records import Batch
from data_shards.store.codecs import PICTURES

if TYPE_CHECKING:
    import torch

    from data_shards.store.shards import ShardSet


T = TypeVar("T")
# A batch: positions, rows, its parts (before DALI, also the parameters of the augmentation), and its labels.
_Read = tuple[np.ndarray, np.ndarray, list[Any], np.ndarray | None]

# Batches that are read while DALI works on the previous one.
_READ_AHEAD = 2
# Batches that exist beside those that wait for the consumer: one it has, one being read, two on their way to DALI.
_OUTSIDE_THE_QUEUE = 2 + _READ_AHEAD
# Seconds until a waiting thread notices that it must stop.
_POLL_S = 0.1


class Loader:
    """Iterates over Batches for the given positions, decoding and augmenting ahead of the consumer.

    Position p shows the row of the shard set that `order` has there; `positions` gives each batch's global positions
    (feed.order), `seed` keys the augmentations. Damaged bytes raise a ValueError that names shard and sample, or are
    counted in `skipped` (LoaderConfig.on_corrupt). A loader can be iterated once.
    """

    def __init__(
        self,
        shards: ShardSet,
        order: Order,
        positions: Iterable[np.ndarray],
        config: LoaderConfig,
        *,
        batch_size: int,
        seed: int,
        device: torch.device | str = "cpu",
        extra_NX: np.ndarray | None = None,
    ) -> None:
        """`extra_NX`: an array with an entry for each row of the set, such as a memory-mapped file. A batch has those
        of its rows."""
        import torch

        self.device = torch.device(device)
        self._shards, self._config, self._seed, self._extra_NX = shards, config, seed, extra_NX
        self._parts = tuple(shards.parts)
        num_kept = config.prefetch_batches + _OUTSIDE_THE_QUEUE
        self._reader = BatchReader(shards, order, self._parts, config.on_corrupt, config.num_threads, num_kept)
        self._crop = config.crop_size or shards.size
        self._in_hu = np.array([name in shards.in_hu for name in shards.modalities])
        # If possible, slices are cut where they are read, and on the CPU mirrored. Pictures must be decoded before.
        early, on_cpu = shards.codec not in PICTURES and not config.rotates_or_zooms, self.device.type != "cuda"
        self._cuts_early, self._flips_early = early and self._crop != shards.size, early and on_cpu and config.flip
        self._dali_parameters = self._parameters_of_dali()
        self._sources: Iterator[_Read] = starmap(self._read, with_rows(positions, order))
        self._in_flight: deque[_Read] = deque()  # of batches inside DALI
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._pipeline = None if on_cpu and early and config.jitter_mr == 0 else self._build(batch_size)

    @property
    def skipped(self) -> dict[int, str]:
        """Rows that were left out, and the reasons."""
        return self._reader.skipped

    def __iter__(self) -> Iterator[Batch]:
        with ExitStack() as opened:
            opened.callback(self._reader.close)
            if not self._config.prefetch_batches:
                yield from self._batches()
                return
            if self._pipeline is not None:
                # One thread reads while another decodes and augments the previous batch.
                self._sources = opened.enter_context(closing(_Ahead(self._sources, _READ_AHEAD)))
            yield from opened.enter_context(closing(_Ahead(self._batches(), self._config.prefetch_batches)))

    def _batches(self) -> Iterator[Batch]:
        # map, and no generator of our own: its variables would hold a batch while the next one is made, and memory that
        # nobody holds is used again.
        return map(self._batch, map(self._plain, self._sources) if self._pipeline is None else self._through_dali())

    def _batch(self, read: _Read) -> Batch:
        position_B, row_B, pixels_PBCHW, label_BA = read
        pixels = dict(zip(self._parts, pixels_PBCHW, strict=True))
        modality_B, axis_B = (
            codes_N[row_B].astype(np.int64) for codes_N in (self._shards.modality_N, self._shards.axis_N)
        )
        return Batch(
            image_BHW=pixels["image"].squeeze(1),
            mask_BHW=pixels["mask"].squeeze(1),
            modality_B=self._on_device(modality_B),
            axis_B=self._on_device(axis_B),
            position_B=self._on_device(position_B),
            edge_B2HW=pixels.get("edge"),
            extra_BX=None if self._extra_NX is None else self._on_device(self._extra_NX[row_B]),
            augmentation_BA=None if label_BA is None else self._on_device(label_BA),
        )

    def _on_device(self, numbers: np.ndarray) -> torch.Tensor:
        import torch

        return torch.from_numpy(numbers).to(self.device, non_blocking=True)

    def _plain(self, read: _Read) -> _Read:
        """A batch as it is read."""
        import torch

        position_B, row_B, pixels, label_BA = read
        return position_B, row_B, [torch.from_numpy(part) for part in pixels], label_BA

    def _through_dali(self) -> Iterator[_Read]:
        """Every batch, decoded and augmented."""
        assert self._pipeline is not None
        while True:
            try:
                outputs = self._pipeline.run()
            except StopIteration:
                return
            position_B, row_B, _, label_BA = self._in_flight.popleft()
            yield position_B, row_B, [self._to_torch(output) for output in outputs], label_BA

    def _to_torch(self, output: Any) -> torch.Tensor:
        """[B, C, H, W] owned by torch: DALI uses its own buffers again."""
        import torch

        if self._stream is None:
            return torch.from_numpy(output.as_array())  # as_array copies
        # Not on torch's own stream: after all that training has queued there, the copy would read what DALI has written
        # since into the same buffer.
        with torch.cuda.stream(self._stream):
            pixels = torch.from_dlpack(output.as_tensor()).clone()
        self._stream.synchronize()
        pixels.record_stream(torch.cuda.default_stream(self.device))
        return pixels

    def _parameters_of_dali(self) -> tuple[str, ...]:
        """The fields of AugmentationParameters that the pipeline takes."""
        config = self._config
        taken = {
            "flip": config.flip and not self._flips_early,
            "angle": config.rotate_degrees > 0,
            "zoom": config.zoom > 0,
            "top": self._crop != self._shards.size and not self._cuts_early,
            "left": self._crop != self._shards.size and not self._cuts_early,
            "gamma": config.jitter_mr > 0,
            "contrast": config.jitter_mr > 0,
        }
        return tuple(name for name, wanted in taken.items() if wanted)

    def _read(self, asked_B: np.ndarray, asked_row_B: np.ndarray) -> _Read:
        """A batch: positions, rows, DALI's inputs (the parts, and the parameters of the augmentation), labels."""
        if not (self._dali_parameters or self._cuts_early or self._flips_early):
            position_B, row_B, pixels = self._reader.read(asked_B, asked_row_B)
            return position_B, row_B, [pixels[part] for part in self._parts], None
        parameters = augmentation_at(asked_B, self._seed, self._config, self._shards.size)
        window = None
        if self._cuts_early or self._flips_early:
            window = parameters.window(self._shards.size, self._crop, flips=self._flips_early)
        position_B, row_B, pixels = self._reader.read(asked_B, asked_row_B, window)
        if len(position_B) < len(asked_B):
            parameters = parameters.of(np.flatnonzero(np.isin(asked_B, position_B)))
        parameters = parameters.without_jitter(self._in_hu[self._shards.modality_N[row_B]])
        for_dali = [getattr(parameters, name) for name in self._dali_parameters]
        label_BA = parameters.labels(self._shards.size, self._crop) if self._config.augments else None
        return position_B, row_B, [*(pixels[part] for part in self._parts), *for_dali], label_BA

    def _next_sources(self) -> tuple[Any, ...]:
        """The inputs for DALI's next batch."""
        read = next(self._sources)
        # Held until the batch is out: DALI reads these buffers in place.
        self._in_flight.append(read)
        return tuple(read[2])

    def _build(self, batch_size: int) -> Any:
        from nvidia.dali import fn, pipeline_def

        on_gpu = self.device.type == "cuda"
        # On the CPU only the loader's own thread overlaps with training; DALI's threads would compete with it for the
        # cores.
        execution = (
            {"prefetch_queue_depth": 2}
            if on_gpu
            else {"prefetch_queue_depth": 1, "exec_async": False, "exec_pipelined": False}
        )

        @pipeline_def(
            batch_size=batch_size,
            num_threads=self._config.num_threads,
            device_id=(self.device.index or 0) if on_gpu else None,
            **execution,
        )
        def pipeline() -> tuple[Any, ...]:
            num_outputs = len(self._parts) + len(self._dali_parameters)
            sources = fn.external_source(self._next_sources, num_outputs=num_outputs, batch=True, no_copy=not on_gpu)
            parameters = dict(zip(self._dali_parameters, sources[len(self._parts) :], strict=True))
            return tuple(
                self._augmented(self._decoded(x, part, on_gpu), part, parameters)
                for part, x in zip(self._parts, sources, strict=False)
            )

        built = pipeline()
        built.build()
        return built

    def _decoded(self, source: Any, part: str, on_gpu: bool) -> Any:
        """A part as CHW on the device. Pictures are decoded here; JPEG 2000 on the GPU if DALI uses one."""
        from nvidia.dali import fn, types

        channels, stored = 2 if part == "edge" else 1, self._shards.size
        if self._shards.codec not in PICTURES:
            return fn.reshape(source.gpu() if on_gpu else source, layout="CHW")
        deep = self._shards.dtype(part) == np.uint16
        source = fn.decoders.image(
            source,
            device="mixed" if on_gpu and self._shards.codec == "jpeg2000" else "cpu",
            output_type=types.GRAY,
            dtype=types.UINT16 if deep else types.UINT8,
        )
        return fn.reshape(source.gpu() if on_gpu else source, shape=[channels, stored, stored], layout="CHW")

    def _augmented(self, x: Any, part: str, parameters: dict[str, Any]) -> Any:
        """Flip, rotate and zoom, crop; images also jitter. Image and mask share them: they move together."""
        from nvidia.dali import fn, types

        bits, room = self._shards.bits, self._shards.size - self._crop
        if "flip" in parameters:
            x = fn.flip(x, horizontal=parameters["flip"])
        if self._config.rotates_or_zooms:
            x = self._rotated_and_zoomed(x, part, parameters)
        if part == "image" and "gamma" in parameters:
            white = float(2**bits - 1)
            grey = (fn.cast(x, dtype=types.FLOAT) / white) ** parameters["gamma"]
            x = fn.cast(white * parameters["contrast"] * grey, dtype=types.UINT16 if bits == 16 else types.UINT8)
        if "top" in parameters:
            at = {"crop_pos_y": parameters["top"] / float(room), "crop_pos_x": parameters["left"] / float(room)}
            x = fn.crop(x, crop=(self._crop, self._crop), **at)
        return x

    def _rotated_and_zoomed(self, x: Any, part: str, parameters: dict[str, Any]) -> Any:
        """Rotated and zoomed about the centre; linear for images, nearest neighbour for labels."""
        from nvidia.dali import fn, types

        # warp_affine's matrix maps output to input coordinates. It needs channels last, and does not accept 16-bit
        # numbers.
        stored = self._shards.size
        centre = np.array([stored / 2, stored / 2], dtype=np.float32)
        matrix = np.eye(2, 3, dtype=np.float32)
        if "angle" in parameters:
            matrix = fn.transforms.rotation(angle=parameters["angle"], center=centre)
        if "zoom" in parameters:
            scale = 1.0 / parameters["zoom"]
            matrix = fn.transforms.scale(matrix, scale=fn.stack(scale, scale), center=centre)
        deep = part == "image" and self._shards.bits == 16
        x = fn.transpose(fn.cast(x, dtype=types.FLOAT) if deep else x, perm=[1, 2, 0], output_layout="HWC")
        interpolation = types.INTERP_LINEAR if part == "image" else types.INTERP_NN
        x = fn.warp_affine(x, matrix, interp_type=interpolation, fill_value=0)
        x = fn.transpose(x, perm=[2, 0, 1], output_layout="CHW")
        return fn.cast(x, dtype=types.UINT16) if deep else x


class _Ahead(Generic[T]):
    """Runs an iterator in a separate thread, at most `depth` items ahead of the consumer.

    A queue of items and one of free places: SimpleQueue is written in C, queue.Queue takes a microsecond a pair longer.
    """

    def __init__(self, items: Iterator[T], depth: int) -> None:
        self._items: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()
        self._places: SimpleQueue[None] = SimpleQueue()
        for _ in range(depth):
            self._places.put(None)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._produce, args=(items,), name="loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        while not self._stop.is_set():
            try:
                item, end = self._items.get(timeout=_POLL_S)
            except Empty:
                continue
            if end is not None:
                self._stop.set()
                raise end
            self._places.put(None)
            return item  # type: ignore[return-value]
        raise StopIteration

    def close(self) -> None:
        """Stop the thread; its items are dropped."""
        self._stop.set()
        self._thread.join()

    def _produce(self, items: Iterator[T]) -> None:
        end: BaseException = StopIteration()
        try:
            for item in items:
                if not self._has_place():
                    return
                self._items.put((item, None))
                del item  # its memory is used again when nobody refers to it
        except BaseException as error:
            end = error
        self._items.put((None, end))

    def _has_place(self) -> bool:
        while not self._stop.is_set():
            try:
                self._places.get(timeout=_POLL_S)
                return True
            except Empty:
                continue
        return False
