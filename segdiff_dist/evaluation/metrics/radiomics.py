"""Radiomics features, and the Frechet distance on them that is published as FRD. frd-score extracts the features."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from segdiff_dist.evaluation.metrics.frechet import FeatureStatistics, frechet_distance

HOW_TO_GET = (
    "on Python 3.11 pip install 'numpy>=2' 'setuptools<81' wheel, pip install --no-build-isolation pyradiomics==3.0.1, "
    "then the extra, pip install 'segdiff-dist[frd]' (docs/metrics.md), and set evaluate.frd_images to the number of "
    "images on either side"
)


def missing_for_frd(frd_images: int) -> str | None:
    """Why `frd` cannot be computed, with what to do about it; None when it can."""
    if not frd_images:
        return f"radiomics features were not requested (they take about a second an image); {HOW_TO_GET}"
    absent = [name for name in ("frd_score", "radiomics") if find_spec(name) is None]
    if absent:
        return f"{' and '.join(absent)} not installed; {HOW_TO_GET}"
    return None


def load_extractor() -> Callable[[np.ndarray], np.ndarray]:
    """Features float64 [B, D] of uint8 images [B, H, W]: frd-score's version 1 on the full image.

    Konz et al. 2026: first order and texture of the image, its Laplacians of Gaussians and its wavelets, and
    pyradiomics' facts about the image file.
    """
    import logging

    from frd_score.frd import FRD_VERSION_V1, get_feature_extractor, process_image_mask_pair
    from PIL import Image

    logging.getLogger("radiomics").setLevel(logging.CRITICAL)
    extractor = get_feature_extractor(FRD_VERSION_V1, image_dim=2)

    def extract(images_BHW: np.ndarray) -> np.ndarray:
        features = []
        with tempfile.TemporaryDirectory() as folder:
            # Through a file, because the package reads files: so the package defines the features.
            file = Path(folder) / "image.png"
            for image_HW in images_BHW:
                Image.fromarray(image_HW).save(file)
                values, _, _ = process_image_mask_pair((file, None), None, extractor, frd_version=FRD_VERSION_V1)
                features.append(values)
        return np.asarray(features, dtype=np.float64)

    return extract


def frd(real: FeatureStatistics, generated: FeatureStatistics) -> float | None:
    """Frechet radiomics distance: log of the squared Frechet distance of features scaled by the real ones' mean and
    standard deviation; each side needs two images. None if it is not finite: equal sets, or no feature varies.

    Konz et al. 2026, eq. 3, with the squared distance in the logarithm, as in their package by default. A feature
    that is constant over the real images is left out.
    """
    scale_D = np.sqrt(np.diag(real.scatter_DD) / real.count)
    kept = scale_D > 0
    if not kept.any():
        return None
    scaled = [
        FeatureStatistics(
            side.count,
            (side.mean_D - real.mean_D)[kept] / scale_D[kept],
            side.scatter_DD[np.ix_(kept, kept)] / np.outer(scale_D[kept], scale_D[kept]),
        )
        for side in (real, generated)
    ]
    square = frechet_distance(scaled[0], scaled[1])
    return float(np.log(square)) if square > 0 else None
