"""The augmentation of the slice at a position: flip, then rotation and zoom, then crop; for MR also contrast and gamma.

It is a pure function of (seed, position), so a run that was resumed, or continues with other ranks, sees the same
pixels.

Dimensions: B batch, A entries of an augmentation label.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from data_shards.feed.batch_reader import Window
from data_shards.feed.order import STREAM_AUGMENT, uniform

if TYPE_CHECKING:
    from data_shards.feed.config import LoaderConfig

# A position's draws in [0, 1), in this order: a new draw at the end does not change the others.
_DRAWS = ("flip", "rotate", "zoom", "crop_x", "crop_y", "gamma", "contrast")
# Entries of AugmentationParameters.labels.
NUM_LABELS = 8


@dataclass(frozen=True)
class AugmentationParameters:
    """How each slice of a batch is augmented, arrays [B]. flip: int32, 1 mirrors left and right. angle: degrees. zoom:
    factor. top, left: of the crop, in pixels of the flipped and rotated slice. gamma, contrast: factors of grey values
    in [0, 1]."""

    flip: np.ndarray
    angle: np.ndarray
    zoom: np.ndarray
    top: np.ndarray
    left: np.ndarray
    gamma: np.ndarray
    contrast: np.ndarray

    def of(self, index: np.ndarray) -> AugmentationParameters:
        """The parameters of some of the samples."""
        return replace(self, **{name: getattr(self, name)[index] for name in self.__dataclass_fields__})

    def without_jitter(self, spared_B: np.ndarray) -> AugmentationParameters:
        """The same, without changes of grey values for some of the samples."""
        one = np.float32(1.0)
        return replace(self, gamma=np.where(spared_B, one, self.gamma), contrast=np.where(spared_B, one, self.contrast))

    def labels(self, stored: int, size: int) -> np.ndarray:
        """float32 [B, A]: what was done to each slice, for a net to learn. A slice as it is stored has only 0.

        Flip; sine and 1 - cosine of the angle; binary logarithm of the zoom; place of a crop of `size` from the centre,
        down and to the right, in sides; binary logarithms of gamma and contrast. Karras et al. 2022, appendix F.2.
        """
        centre, angle_B = (stored - size) // 2, np.deg2rad(self.angle)
        entries = (
            *(self.flip, np.sin(angle_B), 1.0 - np.cos(angle_B), np.log2(self.zoom)),
            *((self.top - centre) / size, (self.left - centre) / size),
            *(np.log2(self.gamma), np.log2(self.contrast)),
        )
        return np.stack(entries, axis=1).astype(np.float32)

    def window(self, stored: int, size: int, *, flips: bool) -> Window:
        """The crop in the stored slice, if slices are not rotated or zoomed; mirrored too if `flips`, else later."""
        left_B = np.where(self.flip == 1, stored - size - self.left, self.left)
        return Window(self.top, left_B, size, (self.flip == 1) & flips)


def augmentation_at(position_B: np.ndarray, seed: int, config: LoaderConfig, stored: int) -> AugmentationParameters:
    """The parameters at these positions, for slices of `stored` pixels a side."""
    draw = dict(zip(_DRAWS, uniform(seed, STREAM_AUGMENT, position_B, len(_DRAWS)).T, strict=True))
    room = stored - (config.crop_size or stored)
    random = config.crop == "random"

    def around_one(name: str, fraction: float) -> np.ndarray:
        return (1.0 + fraction * (2.0 * draw[name] - 1.0)).astype(np.float32)

    def start(name: str) -> np.ndarray:
        return np.floor(draw[name] * (room + 1)).astype(np.int64) if random else np.full(len(position_B), room // 2)

    return AugmentationParameters(
        flip=((draw["flip"] < 0.5) & config.flip).astype(np.int32),
        angle=(config.rotate_degrees * (2.0 * draw["rotate"] - 1.0)).astype(np.float32),
        zoom=around_one("zoom", config.zoom),
        top=start("crop_y"),
        left=start("crop_x"),
        gamma=around_one("gamma", config.jitter_mr),
        contrast=around_one("contrast", config.jitter_mr),
    )
