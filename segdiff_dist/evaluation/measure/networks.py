"""The networks and the radiomics library that a worker of the evaluation loads, beside the segmenter."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from segdiff_dist.evaluation.measure.worker import Inputs
    from segdiff_dist.evaluation.metrics.feature_sets import Extractor


def load_extractors(inputs: Inputs) -> dict[str, Extractor]:
    """The networks whose features give distances between sets of images, by name."""
    extractors: dict[str, Extractor] = {}
    if inputs.fid_weights is not None:
        from segdiff_dist.evaluation.metrics.inception import load_inception

        extractors["inception"] = load_inception(inputs.fid_weights, inputs.device)
    if inputs.imagenet:
        from segdiff_dist.evaluation.metrics.imagenet import load_imagenet

        extractors["imagenet_lite"] = load_imagenet(inputs.device)
    if inputs.feature_network is not None:
        from segdiff_dist.evaluation.metrics.given_network import load_network

        extractors["network"] = load_network(inputs.feature_network, inputs.device)
    return extractors


def lpips_of(inputs: Inputs) -> Callable[[Any, Any], np.ndarray] | None:
    """LPIPS [B] of two batches of images; None without its weights."""
    if inputs.lpips_weights is None:
        return None
    from segdiff_dist.evaluation.metrics.perceptual import load_lpips

    return load_lpips(inputs.lpips_weights, inputs.device)


def radiomics_of(inputs: Inputs) -> Callable[[np.ndarray], np.ndarray] | None:
    """Radiomics features [B, D] of images; None if no item's are computed."""
    if not inputs.radiomics_items:
        return None
    from segdiff_dist.evaluation.metrics.radiomics import load_extractor

    return load_extractor()
