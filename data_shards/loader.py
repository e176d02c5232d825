"""Shards to device batches: one NVIDIA DALI pipeline, on the GPU where there is one, else the same on the CPU.

Dimensions: B batch, H rows, W columns. This file owns DALI.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from data_shards.order import STREAM_AUGMENT, sample_at, uniform
from data_shards.problems import Problem
from data_shards.records import AXES, MODALITIES, Batch

if TYPE_CHECKING:
    import torch

    from data_shards.shards import ShardSet


@dataclass(frozen=True)
class LoaderConfig:
    """Which slices are used, and what is done to them on the way.

    Augmentations act on image and mask together and are a pure function of (seed, position). They are off by
    default. A left-right flip also turns anatomy around (a right kidney on the left), hence a switch like the rest.
    """

    modalities: tuple[str, ...] = MODALITIES
    axes: tuple[str, ...] = AXES
    crop: Literal["centre", "random"] = "centre"
    crop_size: int | None = None
    """Side of the crop in pixels; None takes the whole stored slice."""
    flip: bool = False
    """Mirror left and right in half of the samples."""
    rotate_degrees: float = 0.0
    """Rotate by up to this angle either way."""
    zoom: float = 0.0
    """Scale by up to this fraction either way: 0.1 is 0.9 to 1.1."""
    num_threads: int = 2
    """DALI's decoding threads."""

    def problems(self) -> list[Problem]:
        """What is out of range, as shown to the person who wrote it."""
        found = []
        for name, values, known in (("modalities", self.modalities, MODALITIES), ("axes", self.axes, AXES)):
            if not values or set(values) - set(known):
                found.append(Problem("config", f"loader.{name}", str(list(values)), f"choose from {list(known)}"))
        for name, value, low, high in (
            ("rotate_degrees", self.rotate_degrees, 0.0, 180.0),
            ("zoom", self.zoom, 0.0, 0.9),
            ("num_threads", self.num_threads, 1, 256),
        ):
            if not low <= value <= high:
                found.append(Problem("config", f"loader.{name}", str(value), f"give {low} to {high}"))
        if self.crop_size is not None and self.crop_size < 8:
            found.append(Problem("config", "loader.crop_size", str(self.crop_size), "give at least 8, or null"))
        return found

    @property
    def augments(self) -> bool:
        """Whether any switch makes a sample depend on its position."""
        return self.flip or self.rotate_degrees > 0 or self.zoom > 0 or self.crop == "random"


class Loader:
    """Iterates over Batches for the given positions, decoding and augmenting ahead of the consumer.

    `rows` are the shard set's samples in play; position p shows rows[sample_at(p, len(rows), seed)], or
    rows[p] with `shuffle=False`. `positions` gives each batch's global positions (data_shards.order).
    """

    def __init__(
        self,
        shards: ShardSet,
        rows: np.ndarray,
        positions: Iterable[np.ndarray],
        config: LoaderConfig,
        *,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        import torch

        self.device = torch.device(device)
        self._shards, self._rows, self._config = shards, np.asarray(rows), config
        self._seed, self._shuffle = seed, shuffle
        self._positions = iter(positions)
        self._modality_N = np.array([MODALITIES.index(m) for m in shards.samples["modality"].to_pylist()])
        self._axis_N = np.array([AXES.index(a) for a in shards.samples["axis"].to_pylist()])
        self._in_flight: deque[tuple[np.ndarray, np.ndarray]] = deque()  # positions and rows of batches inside DALI
        self._pipeline = self._build(batch_size)

    def __iter__(self) -> Iterator[Batch]:
        import torch

        while True:
            try:
                image, mask = self._pipeline.run()
            except StopIteration:
                return
            position_B, row_B = self._in_flight.popleft()
            yield Batch(
                image_BHW=self._to_torch(image),
                mask_BHW=self._to_torch(mask),
                modality_B=torch.from_numpy(self._modality_N[row_B]).to(self.device, non_blocking=True),
                axis_B=torch.from_numpy(self._axis_N[row_B]).to(self.device, non_blocking=True),
                position_B=torch.from_numpy(position_B).to(self.device, non_blocking=True),
            )

    def _to_torch(self, output: Any) -> torch.Tensor:
        """uint8 [B, H, W] owned by torch: DALI reuses its buffers two runs later."""
        import torch

        if self.device.type == "cuda":
            return torch.from_dlpack(output.as_tensor()).squeeze(-1).clone()
        return torch.from_numpy(output.as_array().copy()).squeeze(-1)

    def _next_sources(self) -> tuple[list[np.ndarray], ...]:
        """Encoded images and masks of the next batch; with augmentation also a row of draws in [0, 1) for each."""
        position_B = next(self._positions)
        index_B = sample_at(position_B, len(self._rows), self._seed) if self._shuffle else position_B
        row_B = self._rows[index_B]
        self._in_flight.append((position_B, row_B))
        pairs = [self._shards.raw_pair(int(row)) for row in row_B]
        sources = [p[0] for p in pairs], [p[1] for p in pairs]
        if not self._config.augments:
            return sources
        return *sources, list(uniform(self._seed, STREAM_AUGMENT, position_B, 5).astype(np.float32))

    def _build(self, batch_size: int) -> Any:
        from nvidia.dali import fn, pipeline_def, types

        config, shards = self._config, self._shards
        on_gpu = self.device.type == "cuda"
        stored, crop = shards.size, config.crop_size or shards.size

        def decode(payload: Any) -> Any:
            if shards.codec == "raw":
                return fn.reshape(payload, shape=[stored, stored, 1], layout="HWC")
            return fn.decoders.image(payload, device="cpu", output_type=types.GRAY)

        @pipeline_def(
            batch_size=batch_size,
            num_threads=config.num_threads,
            device_id=(self.device.index or 0) if on_gpu else None,
            prefetch_queue_depth=2,
        )
        def pipeline() -> tuple[Any, Any]:
            num_outputs = 3 if config.augments else 2
            image, mask, *drawn = fn.external_source(self._next_sources, num_outputs=num_outputs, batch=True)
            draw: Any = drawn[0] if drawn else None
            image, mask = decode(image), decode(mask)
            if on_gpu:
                image, mask = image.gpu(), mask.gpu()
            if config.flip:
                mirrored = fn.cast(draw[0] < 0.5, dtype=types.INT32)
                image, mask = (fn.flip(x, horizontal=mirrored) for x in (image, mask))
            if config.rotate_degrees > 0 or config.zoom > 0:
                # warp_affine's matrix takes output to input coordinates: rotate and zoom about the centre.
                centre = np.array([stored / 2, stored / 2], dtype=np.float32)
                zoom = 1.0 / (1.0 + config.zoom * (2.0 * draw[2] - 1.0))
                matrix = fn.transforms.rotation(angle=config.rotate_degrees * (2.0 * draw[1] - 1.0), center=centre)
                matrix = fn.transforms.scale(matrix, scale=fn.stack(zoom, zoom), center=centre)
                image, mask = (
                    fn.warp_affine(x, matrix, interp_type=interpolation, fill_value=0)
                    for x, interpolation in ((image, types.INTERP_LINEAR), (mask, types.INTERP_NN))
                )
            if crop != stored:
                at = (draw[3], draw[4]) if config.crop == "random" else (0.5, 0.5)
                image, mask = (fn.crop(x, crop=(crop, crop), crop_pos_x=at[0], crop_pos_y=at[1]) for x in (image, mask))
            return image, mask

        built = pipeline()
        built.build()
        return built
