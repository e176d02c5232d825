"""What the tests of sampling share: an untrained denoiser, a small job, and its images made without Ray."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from tests_support import bytes_of

from data_shards.labels import AMOS, LabelTable
from data_shards.store.shards import ShardSet
from segdiff_dist.denoising.config import DiffusionConfig
from segdiff_dist.denoising.sampler_config import SamplerConfig
from segdiff_dist.sampling.config import SampleConfig
from segdiff_dist.sampling.job import prepare_job
from segdiff_dist.sampling.store import SampleStore
from segdiff_dist.sampling.worker import WorkerFactory

DIFFUSION = DiffusionConfig(prediction_type="v", zero_terminal_snr=True)
QUICK: dict[str, Any] = {
    "num": 10,
    "region_size": 4,
    "samples_per_mask": 2,
    "diverse_masks": 2,
    "cross_modality_masks": 2,
    "sampler": SamplerConfig(num_steps=3, timestep_spacing="trailing", eta=0.5),
}


def write_weights(
    run: Path,
    seed: int = 0,
    soft_masks: bool = False,
    average: str = "ema",
    table: LabelTable = AMOS,
    **trained_with: Any,
) -> Path:
    """An untrained denoiser: its images mean nothing, but are the same every time."""
    import torch

    from segdiff_dist.denoising.config import DenoiserConfig
    from segdiff_dist.denoising.denoiser import Denoiser

    torch.manual_seed(seed)
    config = DenoiserConfig(
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        attention_resolutions=(16,),
        soft_masks=soft_masks,
    )
    model = Denoiser(config, table, 32)
    process = DiffusionConfig() if "objective" in trained_with else DIFFUSION
    training = {"diffusion": asdict(replace(process, **trained_with))} if trained_with else None
    model.save(run / "weights" / average, model.state_dict(), training)
    return run


def arguments(run: Path, shapes: Path, diffusion: DiffusionConfig = DIFFUSION, **changes: Any) -> tuple[Any, ...]:
    """Of job.sample, job.prepare_job and plan.plan, for QUICK with some settings changed."""
    shards, config = ShardSet.open(shapes), SampleConfig(**{**QUICK, **changes})
    return run, shards, shards.select(split=config.split), diffusion, config


def make_here(run: Path, shapes: Path, batch_size: int | None = None, **changes: Any) -> SampleStore:
    """The job's images, made in this process by what runs in a worker: an undisturbed run."""
    job = prepare_job(*arguments(run, shapes, batch_size=batch_size, **changes))
    store = SampleStore.create(job.path, job.job_settings | {"device": "cpu"}, job.items, job.size, job.masks_MHW)
    make_region = WorkerFactory(store.path, "cpu", batch_size)()
    for index in store.missing_regions():
        make_region(index)
    return store


def pixels_of(store: SampleStore) -> tuple[np.ndarray, np.ndarray]:
    """All images and masks."""
    return np.asarray(store.image[:]), np.asarray(store.mask[:])


def flip_a_byte(store: SampleStore, part: str, region: int) -> Path:
    """Damage the first item of a region; returns the file."""
    file = store.path / "images.zarr" / part / "c" / str(region) / "0" / "0"
    content = bytearray(file.read_bytes())
    content[40] ^= 0xFF
    file.write_bytes(content)
    return file


def sample_and_compare_pipeline(weights: Path, shapes: Path, num: int) -> None:
    """Sample with RUN/weights/NAME into RUN/samples, export RUN/pipeline, and compare their images bit by bit. As
    diffusers' pipeline it makes the same, and saves the same folder."""
    import torch
    from diffusers import UNet2DModel

    from segdiff_dist.export.job import export_model
    from segdiff_dist.pipeline import SegGuidedPipeline
    from segdiff_dist.pipeline.for_diffusers import SegGuidedDiffusionPipeline

    run = weights.parents[1]
    store = make_here(run, shapes, num=num, out=run / "samples")
    export_model(weights, run / "pipeline", DIFFUSION, QUICK["sampler"])
    precision = store.job["sample"]["precision"]
    pipeline = SegGuidedPipeline.from_pretrained(run / "pipeline", device="cpu", precision=precision)
    for item in store.items.to_pylist():
        at = item["item_id"]
        image = pipeline(store.mask[at], modality=item["target_modality"], axis=item["axis"], first_item=at)
        np.testing.assert_array_equal(np.asarray(image), store.image[at])
    of_diffusers = SegGuidedDiffusionPipeline(UNet2DModel.from_pretrained(run / "pipeline" / "unet"), None)
    of_diffusers.save_pretrained(run / "saved")
    assert bytes_of(run / "saved") == bytes_of(run / "pipeline")
    of_diffusers.to(torch.bfloat16 if precision == "bf16" else torch.float32).set_progress_bar_config(disable=True)
    first = store.items.to_pylist()[0]
    image = of_diffusers(store.mask[0], first["target_modality"], axis=first["axis"], seed=0).images[0]
    np.testing.assert_array_equal(np.asarray(image), store.image[0])
