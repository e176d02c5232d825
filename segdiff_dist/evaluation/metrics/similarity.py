"""Measures of a real and a generated image, pixel by pixel: PSNR, SSIM, MS-SSIM, grey values inside an organ.

Dimensions: B batch, H rows, W columns, K label ids (background is id 0).
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from segdiff_dist.evaluation.metrics.arrays import Array

if TYPE_CHECKING:
    import torch

# One window for both images: the full range of the stored uint8 grey values.
GREY_RANGE = 255.0
# Wang et al. 2004, section III.B and III.C: an 11x11 Gaussian window, and constants that keep 0/0 out.
_SSIM_SIGMA, _SSIM_RADIUS = 1.5, 5
# At 256 pixels a side, 32 to 128 pixels a block are about equally fast.
_BLOCK = 64
_SSIM_C1, _SSIM_C2 = (0.01 * GREY_RANGE) ** 2, (0.03 * GREY_RANGE) ** 2
# Wang, Simoncelli, Bovik 2003, section 3.2: how much each scale counts, fine to coarse.
_MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
# The window still fits into the coarsest scale, which halves the image four times.
MS_SSIM_SMALLEST_SIDE = (2 * _SSIM_RADIUS + 1) * 2 ** (len(_MS_SSIM_WEIGHTS) - 1)


def grey_moments(labels_BHW: np.ndarray, images_BHW: np.ndarray, num_classes: int) -> tuple[Array, Array]:
    """Mean and standard deviation (n) [B, K] of uint8 images inside each label id; NaN where the id is absent."""
    shape = (len(labels_BHW), num_classes, 256)
    place = labels_BHW.astype(np.int64) + np.arange(shape[0])[:, None, None] * num_classes
    # How often each grey value occurs: one count is several times as fast as three sums.
    counts_BKG = np.bincount((256 * place + images_BHW).ravel(), minlength=np.prod(shape)).reshape(shape)
    grey_G = np.arange(256)
    counts, sums, squares = (counts_BKG @ weight_G for weight_G in (grey_G**0, grey_G, grey_G**2))
    inside = np.where(counts > 0, counts, np.nan)
    mean = sums / inside
    return mean, np.sqrt(np.maximum(squares / inside - mean**2, 0.0))


def psnr_db(real_BHW: torch.Tensor, generated_BHW: torch.Tensor) -> Array:
    """Peak signal-to-noise ratio [B] in dB of uint8 images in one window, 0..255; infinite for identical images."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    _check_images(real_BHW, generated_BHW)
    values = peak_signal_noise_ratio(
        generated_BHW.double(), real_BHW.double(), data_range=GREY_RANGE, reduction="none", dim=(1, 2)
    )
    return np.asarray(values.cpu().numpy(), dtype=np.float64)


def ssim(real_BHW: torch.Tensor, generated_BHW: torch.Tensor) -> Array:
    """Structural similarity [B] of uint8 images of at least 6x6: Gaussian window, sigma 1.5, data range 255.

    Wang et al. 2004, eq. 13. Every pixel counts; beyond the border the image is reflected, as in torchmetrics.
    """
    _check_images(real_BHW, generated_BHW)
    similarity_B, _ = _similarities(real_BHW.float(), generated_BHW.float())
    return np.asarray(similarity_B.double().cpu().numpy())


def ssim_and_ms_ssim(real_BHW: torch.Tensor, generated_BHW: torch.Tensor) -> tuple[Array, Array]:
    """SSIM [B] as above, and multi-scale SSIM [B] of uint8 images of at least MS_SSIM_SMALLEST_SIDE pixels a side.

    Wang, Simoncelli, Bovik 2003, eq. 7, with exponents for five scales; a scale whose mean contrast term is negative
    counts 0. As in torchmetrics, contrast terms are means over windows inside the image, and the coarsest scale's SSIM
    is a mean over all pixels.
    """
    _check_images(real_BHW, generated_BHW)
    if min(real_BHW.shape[1:]) < MS_SSIM_SMALLEST_SIDE:
        raise ValueError(
            f"real_BHW: {tuple(real_BHW.shape)} is too small; MS-SSIM needs {MS_SSIM_SMALLEST_SIDE} pixels"
        )
    from torch.nn.functional import avg_pool2d

    x_BHW, y_BHW = real_BHW.float(), generated_BHW.float()
    single_scale_B, contrast_B = similarity_B, _ = _similarities(x_BHW, y_BHW)
    product_B = contrast_B.clamp(min=0) ** _MS_SSIM_WEIGHTS[0]
    for weight in _MS_SSIM_WEIGHTS[1:]:
        x_BHW, y_BHW = avg_pool2d(x_BHW, 2), avg_pool2d(y_BHW, 2)
        similarity_B, contrast_B = _similarities(x_BHW, y_BHW)
        # Luminance enters at the coarsest scale alone.
        term_B = similarity_B if weight is _MS_SSIM_WEIGHTS[-1] else contrast_B
        product_B = product_B * term_B.clamp(min=0) ** weight
    return (
        np.asarray(single_scale_B.double().cpu().numpy()),
        np.asarray(product_B.double().cpu().numpy()),
    )


def _similarities(x_BHW: torch.Tensor, y_BHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean SSIM over all pixels, and the mean of its contrast and structure term over windows inside the image, each
    [B]. Wang et al. 2004, eq. 13 and 9, 10."""
    import torch

    maps = torch.stack((x_BHW, y_BHW, x_BHW * x_BHW, y_BHW * y_BHW, x_BHW * y_BHW))
    mean_x, mean_y, xx, yy, xy = _blurred(maps)
    var_x, var_y, covariance = xx - mean_x * mean_x, yy - mean_y * mean_y, xy - mean_x * mean_y
    contrast = (2 * covariance + _SSIM_C2) / (var_x + var_y + _SSIM_C2)
    luminance = (2 * mean_x * mean_y + _SSIM_C1) / (mean_x * mean_x + mean_y * mean_y + _SSIM_C1)
    inside = slice(_SSIM_RADIUS, -_SSIM_RADIUS)
    return (luminance * contrast).mean(dim=(1, 2)), contrast[:, inside, inside].mean(dim=(1, 2))


def _blurred(maps: torch.Tensor) -> torch.Tensor:
    """Under the Gaussian window, [..., H, W].

    Two matrix products, since the window is separable: this is several times as fast as a convolution. Blocks of pixels
    need only those near them, so a product is of a part of the matrix.
    """
    import torch

    rows_HH, columns_WW = (_blur_matrix(side).to(maps.device) for side in maps.shape[-2:])
    along_rows = [maps[..., near] @ columns_WW[block, near].T for block, near in _blocks(maps.shape[-1])]
    maps = torch.cat(along_rows, dim=-1)
    return torch.cat([rows_HH[block, near] @ maps[..., near, :] for block, near in _blocks(maps.shape[-2])], dim=-2)


def _blocks(side: int) -> list[tuple[slice, slice]]:
    """Blocks of places along an axis, each with the places that the window reaches from it."""
    starts = range(0, side, _BLOCK)
    return [(slice(a, a + _BLOCK), slice(max(0, a - _SSIM_RADIUS), a + _BLOCK + _SSIM_RADIUS)) for a in starts]


@lru_cache(maxsize=16)
def _blur_matrix(side: int) -> torch.Tensor:
    """float32 [side, side]: the Gaussian window along one axis, reflected at the border."""
    import torch

    if side <= _SSIM_RADIUS:
        raise ValueError(f"images of {side} pixels a side are too small for SSIM's window; give {_SSIM_RADIUS + 1}")
    offsets = np.arange(-_SSIM_RADIUS, _SSIM_RADIUS + 1)
    weights = np.exp(-(offsets**2) / (2 * _SSIM_SIGMA**2))
    matrix = np.zeros((side, side))
    at = np.abs(np.arange(side)[:, None] + offsets)
    at = np.where(at >= side, 2 * (side - 1) - at, at)
    np.add.at(matrix, (np.arange(side)[:, None], at), weights / weights.sum())
    return torch.from_numpy(matrix.astype(np.float32))


def _check_images(real_BHW: torch.Tensor, generated_BHW: torch.Tensor) -> None:
    """Both sides must have 8 bits: floating point could hold NaN, and its range would not be known."""
    import torch

    for name, images in (("real_BHW", real_BHW), ("generated_BHW", generated_BHW)):
        if images.dtype != torch.uint8:
            raise ValueError(f"{name}: {images.dtype}; give uint8 grey values")
    if real_BHW.ndim != 3 or real_BHW.shape != generated_BHW.shape:
        raise ValueError(f"generated_BHW: {tuple(generated_BHW.shape)} is not real_BHW's {tuple(real_BHW.shape)}")


def pixel_std(images_BHW: np.ndarray, mask_HW: np.ndarray) -> float:
    """The difference of images made from one mask: the standard deviation over B (B >= 2, n - 1) of each pixel, in grey
    values, averaged over the patient (mask > 0); NaN for an empty mask."""
    inside = mask_HW > 0
    if not inside.any():
        return float("nan")
    return float(images_BHW[:, inside].astype(np.float64).std(axis=0, ddof=1).mean())
