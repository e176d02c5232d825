"""Grey values: CT by a fixed window, so that HU can be restored; MR, which has no unit, by its own percentiles."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_shards.ingest.volumes import Volume, planes_in_memory
from data_shards.modalities import GreyRule, grey_rule


@dataclass(frozen=True)
class GreyMap:
    """value = grey * scale + offset, grey in 0..2**bits - 1; values outside of the range are clipped to its ends."""

    scale: float
    offset: float
    bits: int = 8

    @classmethod
    def between(cls, low: float, high: float, bits: int) -> GreyMap:
        """`low` becomes 0 and `high` the highest grey value."""
        return cls((high - low) / (2**bits - 1), float(low), bits)

    def to_grey(self, above_offset: np.ndarray) -> np.ndarray:
        """uint8 or uint16, by `bits`, of float values from which `offset` is already subtracted."""
        grey = np.clip(np.rint(above_offset / np.float32(self.scale)), 0, 2**self.bits - 1)
        return grey.astype(np.uint8 if self.bits == 8 else np.uint16)


def grey_map(
    volume: Volume,
    modality: str | GreyRule,
    *,
    intensity: str,
    hu_window: tuple[float, float],
    mr_percentiles: tuple[float, float],
    bits: int,
    num_padding: int = 0,
) -> GreyMap:
    """The map from a volume's values to grey values of 8 or 16 bits. `modality`: its name, or the rule for its values.

    CT: the window's lower end is 0, its upper end the highest grey (the paper: [-256, 256] HU); with `intensity` paper
    the same of the percentiles of the values clipped to the window. MR: the volume's own percentiles (1 and 99 in the
    paper), over all of its voxels but `num_padding` of the lowest, which are not measured values. Raises ValueError if
    the percentiles are equal: such a volume is nearly empty.
    """
    rule = modality if isinstance(modality, GreyRule) else grey_rule(modality, {})
    window = rule.ends or hu_window
    if rule.kind == "values" or (rule.kind == "hu" and intensity == "window"):
        return GreyMap.between(*window, bits)
    clip = window if rule.kind == "hu" else (-np.inf, np.inf)
    chosen = (rule.ends if rule.kind == "percentiles" else None) or mr_percentiles
    low, high = percentiles(volume, chosen, clip, num_padding)
    if high <= low:
        first, last = chosen
        raise ValueError(f"its percentiles {first:g} and {last:g} are both {low:g}: it shows nothing")
    return GreyMap.between(low, high, bits)


def percentiles(
    volume: Volume, chosen: tuple[float, float], clip: tuple[float, float], num_padding: int = 0
) -> tuple[float, float]:
    """Two percentiles of the volume's values clipped to `clip`, as numpy.percentile gives them; `num_padding` voxels of
    the lowest value are left out."""
    last = volume.voxels_IJK.size - 1
    rank = num_padding + np.array(chosen) / 100.0 * (last - num_padding)
    if volume.slope < 0:
        # The values rise where the stored numbers fall.
        rank = last - rank
    below = np.floor(rank).astype(np.int64)
    stored = _of_rank(volume.voxels_IJK, np.array([below, np.minimum(below + 1, last)]))
    lower, upper = np.clip(stored.astype(np.float64) * volume.slope + volume.intercept, *clip)
    low, high = (lower + (upper - lower) * (rank - below)).tolist()
    return low, high


def _of_rank(voxels_IJK: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """The stored numbers that would have the ranks if all were sorted. Numbers of up to 16 bits are counted; others
    need a copy of the volume."""
    if voxels_IJK.dtype.kind not in "iu" or voxels_IJK.dtype.itemsize > 2:
        flat = voxels_IJK.flatten(order="K")
        flat.partition(np.unique(rank))
        return flat[rank]
    lowest = int(np.iinfo(voxels_IJK.dtype).min)
    counts = np.zeros(2 ** (8 * voxels_IJK.dtype.itemsize), dtype=np.int64)
    for plane in planes_in_memory(voxels_IJK):
        counts += np.bincount(plane.ravel().astype(np.int64) - lowest, minlength=len(counts))
    return lowest + np.searchsorted(np.cumsum(counts), rank, side="right")


def restore(image: np.ndarray, scale: float, offset: float) -> np.ndarray:
    """float32 values of stored grey values: HU for CT, within half a grey level (half of `scale`) inside the window."""
    return image.astype(np.float32) * np.float32(scale) + np.float32(offset)
