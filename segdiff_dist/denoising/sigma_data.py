"""The standard deviation of the training slices, which EDM's preconditioning needs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from data_shards.problems import problem
from segdiff_dist.denoising.config import DiffusionConfig

if TYPE_CHECKING:
    from data_shards.store.shards import ShardSet

# Enough for three digits, and read in a second or two.
_MOST_SLICES = 512


def with_sigma_data(
    diffusion: DiffusionConfig, shards: ShardSet, rows: np.ndarray, *, on_latents: bool = False, factor: int = 1
) -> DiffusionConfig:
    """The same with sigma_data measured on the slices `rows`, if the objective needs it and none is given. That of
    latents is 1. `factor`: by which they are shrunk."""
    if diffusion.objective == "edm" and diffusion.sigma_data is None and on_latents:
        return replace(diffusion, sigma_data=1.0)
    if diffusion.objective != "edm" or diffusion.sigma_data is not None or len(rows) == 0:
        return diffusion
    return replace(diffusion, sigma_data=measure_sigma_data(shards, rows, factor))


def measure_sigma_data(shards: ShardSet, rows: np.ndarray, factor: int = 1) -> float:
    """Standard deviation of the pixels in [-1, 1] of at most 512 of the slices, evenly spaced; to four digits.

    It depends on set and rows alone, so every rank and every restart gets the same. Raises InputProblems if all pixels
    are equal.
    """
    chosen = rows[np.linspace(0, len(rows) - 1, min(len(rows), _MOST_SLICES)).round().astype(np.int64)]
    sums = np.zeros(3)  # of 1, x, x^2
    for row in chosen:
        image_HW = shards.read(int(row)).image_HW
        x_HW = image_HW / (np.iinfo(image_HW.dtype).max / 2.0) - 1.0
        if factor > 1:
            height, width = (side // factor for side in x_HW.shape)
            x_HW = x_HW[: height * factor, : width * factor].reshape(height, factor, width, factor).mean(axis=(1, 3))
        sums += (x_HW.size, x_HW.sum(), np.square(x_HW).sum())
    mean = sums[1] / sums[0]
    variance = sums[2] / sums[0] - mean**2
    if variance < 1e-6:
        raise problem(shards.root, "training slices", "all pixels alike", "prepare the set again, and look at it")
    return float(f"{np.sqrt(variance):.4g}")
