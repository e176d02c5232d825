"""The inputs of an evaluation as summary.json records them, and the reasons for missing metrics."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_shards.store.set_index import file_sha256
from segdiff_dist.evaluation.metrics import inception, perceptual, radiomics
from segdiff_dist.evaluation.metrics.columns import HEADLINE_METRICS
from segdiff_dist.evaluation.metrics.distances import DISTANCE_METRICS, fewest_samples
from segdiff_dist.evaluation.metrics.sharpness import SHARPNESS_METRICS, missing_reason
from segdiff_dist.evaluation.metrics.similarity import MS_SSIM_SMALLEST_SIDE
from segdiff_dist.evaluation.metrics.surfaces import tolerances_mm

if TYPE_CHECKING:
    from data_shards.store.shards import ShardSet
    from segdiff_dist.evaluation.measure.worker import Inputs
    from segdiff_dist.sampling.store import SampleStore

_PACKAGES = (
    *("segdiff-dist", "torch", "torchmetrics", "monai", "diffusers", "numpy", "scipy", "zarr", "ray"),
    *("torch-fidelity", "torchvision", "lpips", "frd-score", "pyradiomics"),
)


def not_available(summary: dict[str, Any], inputs: Inputs, store: SampleStore) -> dict[str, str]:
    """Metrics without a value, each with the reason and the remedy."""
    # The other metrics on Inception's features are missing for the same reason as fid; it is given once.
    of_inception = () if "fid" in summary["metrics"] else ("kid", "inception_")
    names = [n for n in (*HEADLINE_METRICS, *SHARPNESS_METRICS, *DISTANCE_METRICS) if n not in summary["metrics"]]
    return {n: _reason(n, summary, inputs, store) for n in names if not (of_inception and n.startswith(of_inception))}


def provenance(inputs: Inputs, store: SampleStore, shards: ShardSet) -> dict[str, Any]:
    """Everything the numbers depend on, so that they can be computed again."""
    return {
        "shards": shards.root,
        "shards_digest": shards.digest,
        "label_table": shards.label_table.name,
        "fid_weights": _digest(inputs.fid_weights),
        "lpips_weights": _digest(inputs.lpips_weights),
        "frd_images": len(inputs.radiomics_items),
        "surface_dice_tolerance_mm": tolerances_mm(shards.label_table) if inputs.surface_dice else None,
        "sample_job": store.job,
        "device": inputs.device,
        "versions": {"python": sys.version.split()[0], **_versions()},
    }


def _reason(name: str, summary: dict[str, Any], inputs: Inputs, store: SampleStore) -> str:
    reasons = {
        "fid": lambda: inception.missing_for_fid(inputs.fid_weights),
        "lpips": lambda: perceptual.missing_for_lpips(inputs.lpips_weights),
        "frd": lambda: radiomics.missing_for_frd(len(inputs.radiomics_items)),
    }
    if name in reasons and (reason := reasons[name]()):
        return reason
    if name in DISTANCE_METRICS:
        return f"a distribution needs at least {fewest_samples(name)} samples, there are {summary['num_samples']}"
    side = store.image.shape[1]
    if name == "ms_ssim" and side < MS_SSIM_SMALLEST_SIDE:
        return f"five scales need images of {MS_SSIM_SMALLEST_SIDE} pixels a side, these have {side}"
    if name in SHARPNESS_METRICS:
        return missing_reason(name)
    if name.startswith("surface_dice") and not inputs.surface_dice:
        return "evaluate.surface_dice is off"
    return "no sample gives it a finite value"


def _digest(weights: str | None) -> dict[str, str] | None:
    """Name and SHA-256 of a file of weights."""
    return None if weights is None else {"file": Path(weights).name, "sha256": file_sha256(Path(weights))}


def _versions() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions
