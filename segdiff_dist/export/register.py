"""The last step of `segdiff evaluate`: the model that made the samples is registered in MLflow as a pipeline folder."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from data_shards.documents import reading
from data_shards.problems import InputProblems, OutOfSpace, problem
from segdiff_dist.denoising.config import DiffusionConfig
from segdiff_dist.denoising.sampler_config import SamplerConfig
from segdiff_dist.export.job import export_model
from segdiff_dist.sampling.job import weights_digest
from segdiff_dist.sampling.store_files import JOB, read_job
from segdiff_dist.tracking.headline import HEADLINE
from segdiff_dist.tracking.tracker import Tracker
from segdiff_dist.weight_files import DESCRIPTION


def register_evaluated(run: Path, summary: dict[str, Any], tracker: Tracker) -> None:
    """Enter the model behind RUN/samples into MLflow's registry, with the headline numbers of `summary` as tags.

    The tag `memorisation` holds the result of the check for training images among the samples, if it was asked for. The
    sampler is that of the samples. A model that cannot be registered is skipped with a warning: its weights have
    changed, it cannot be a pipeline, or the disk is full.
    """
    if not tracker.registers_models:
        return
    job = read_job(run / "samples")
    if "weights" not in job:  # of another system's images
        return
    tags = {"shards_digest": job["shards_digest"]} if "shards_digest" in job else {}
    tags |= {"num_samples": str(summary["num_samples"])}
    metrics = summary["metrics"]
    tags |= {name: f"{metrics[name]['value']:.6g}" for name in HEADLINE if name in metrics}
    if (memorised := summary.get("trust", {}).get("memorisation")) is not None:
        tags["memorisation"] = {True: "passed", False: "failed", None: "not known"}[memorised["passed"]]
    try:
        with reading(run / "samples" / JOB, "the description of a job", "sample and evaluate again"):
            diffusion, sampler = DiffusionConfig(**job["diffusion"]), SamplerConfig(**job["sample"]["sampler"])
        weights = _weights_of(job, run)
        tracker.register_model(
            job["weights_digest"], tags, lambda folder: export_model(weights, folder, diffusion, sampler)
        )
    except (InputProblems, OutOfSpace) as error:
        warnings.warn(f"the model is not entered into MLflow's registry: {error}", stacklevel=2)


def _weights_of(job: dict[str, Any], run: Path) -> Path:
    """The folder of the samples' model, also if the run folder was moved."""
    with reading(run / "samples" / JOB, "the description of a job", "sample and evaluate again"):
        recorded = Path(job["weights"])
    for folder in (recorded, run / "weights" / recorded.name):
        if (folder / DESCRIPTION).is_file() and weights_digest(folder) == job["weights_digest"]:
            return folder
    raise problem(recorded, "weights", "not those that made the samples", "sample and evaluate again")
