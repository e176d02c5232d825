"""Grey values: CT by a fixed window, so that HU can be restored; MR, which has no unit, by its own percentiles."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_shards.volumes import Volume


@dataclass(frozen=True)
class GreyMap:
    """stored value = uint8 * scale + offset; values outside [offset, offset + 255 * scale] are clipped."""

    scale: float
    offset: float

    def to_uint8(self, above_offset: np.ndarray) -> np.ndarray:
        """uint8 of float values from which `offset` is already taken away."""
        return np.clip(np.rint(above_offset / np.float32(self.scale)), 0, 255).astype(np.uint8)


def ct_grey_map(hu_window: tuple[float, float]) -> GreyMap:
    """The window's lower end is 0, its upper end 255. The paper clips CT to [-256, 256] HU."""
    low, high = hu_window
    return GreyMap((high - low) / 255.0, float(low))


def mr_grey_map(volume: Volume, percentiles: tuple[float, float]) -> GreyMap:
    """The volume's own percentiles (1 and 99 in the paper), over all of its voxels, are 0 and 255.

    Raises ValueError when they are equal: such a volume is all but empty.
    """
    low, high = sorted(
        float(p) * volume.slope + volume.intercept for p in np.percentile(volume.voxels_IJK, percentiles)
    )
    if high <= low:
        raise ValueError(
            f"its percentiles {percentiles[0]:g} and {percentiles[1]:g} are both {low:g}: it shows nothing"
        )
    return GreyMap((high - low) / 255.0, low)


def restore(image: np.ndarray, scale: float, offset: float) -> np.ndarray:
    """float32 values of a uint8 image: HU for CT, within half a grey level (half of `scale`) inside the window."""
    return image.astype(np.float32) * np.float32(scale) + np.float32(offset)
