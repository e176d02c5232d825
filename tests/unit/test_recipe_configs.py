"""The shipped recipes: what the paper says is what its configs do, and no config contradicts itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_shards.labels import LABEL_TABLES
from segdiff_dist.config import as_dict, differences
from segdiff_dist.denoising.denoiser import Denoiser
from segdiff_dist.denoising.noise_levels import spaced_timesteps
from segdiff_dist.denoising.schedule import make_scheduler
from segdiff_dist.experiment import Experiment, load_experiment
from segdiff_dist.training.config import learning_rate

FOLDER = Path(__file__).parents[2] / "launch" / "configs"
CONFIGS = sorted(FOLDER.glob("*.yaml"))
PAPER = ("paper_ct_axial", "paper_ct_all", "paper_mri_axial", "paper_mri_all")


def shipped(name: str) -> Experiment:
    return load_experiment(FOLDER / f"{name}.yaml", None)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_sections_agree(path: Path) -> None:
    config = load_experiment(path, None)
    assert set(config.loader.axes) <= set(config.prepare.axes)
    if config.prepare.modalities is not None:
        assert set(config.loader.modalities or config.prepare.modalities) <= set(config.prepare.modalities)
    assert not config.denoiser.soft_masks or config.prepare.soft_edge
    assert config.denoiser.class_conditioning or config.diffusion.class_dropout + config.diffusion.joint_dropout == 0
    dropped = {"mask": "mask_dropout", "class": "class_dropout", "both": "joint_dropout"}
    needed = dropped[config.sample.sampler.guidance_removes]
    assert config.sample.sampler.guidance == 1.0 or getattr(config.diffusion, needed) > 0
    assert config.sample.sampler.problems(config.diffusion) == []


def test_the_papers_four_differ_in_their_slices_alone() -> None:
    first = as_dict(shipped(PAPER[0]))
    for name in PAPER[1:]:
        keys = {key for key, _, _ in differences(first, as_dict(shipped(name)))}
        assert keys <= {"prepare.axes", "prepare.modalities", "loader.axes", "loader.modalities"}
    slices = [(shipped(name).loader.modalities, len(shipped(name).loader.axes)) for name in PAPER]
    assert slices == [(("CT",), 1), (("CT",), 3), (("MR",), 1), (("MR",), 3)]


def test_the_papers_recipe_is_the_papers() -> None:
    from diffusers import DDIMScheduler

    config = shipped(PAPER[0])
    with torch.device("meta"):
        model = Denoiser(config.denoiser, LABEL_TABLES[config.prepare.label_set], config.prepare.size)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(113.67e6, rel=1e-4)
    assert model.unet.config.in_channels == 2  # the noised image and 2 * label / 255 - 1
    alphas_cumprod = make_scheduler(config.diffusion).alphas_cumprod
    assert torch.equal(alphas_cumprod, DDIMScheduler(num_train_timesteps=1000).alphas_cumprod)
    sampler = config.sample.sampler.resolved()
    assert (sampler.solver, sampler.num_steps, sampler.timestep_spacing) == ("ddim", 50, "leading")
    assert spaced_timesteps(1000, 50, "leading").tolist() == list(range(980, -1, -20))
    assert sampler.clip_sample
    train = config.train
    assert train.warmup_images == 500 * train.global_batch_size
    assert learning_rate(train.warmup_images, train) == 1e-5
    assert learning_rate(train.num_images, train) == 0.0
    assert (train.precision, config.sample.precision, config.sample.weights) == ("fp32", "fp32", "online")
    diffusion = config.diffusion
    assert diffusion.loss_weighting == "none"
    assert diffusion.mask_dropout + diffusion.class_dropout + diffusion.joint_dropout + diffusion.organ_dropout == 0
    assert (config.prepare.intensity, config.prepare.mask_resize, config.prepare.fit) == (
        "paper",
        "bilinear_ids",
        "crop",
    )


def test_the_best_is_one_model_for_everything() -> None:
    config = shipped("best_ct_mr")
    assert config.loader.modalities is None  # all that the set has
    assert config.loader.axes == ("axial", "coronal", "sagittal")
    table = LABEL_TABLES[config.prepare.label_set]
    assert table.body_id is not None
    with torch.device("meta"):
        model = Denoiser(config.denoiser, table, config.prepare.size)
    assert model.unet.config.in_channels == 4 * (1 + table.num_classes)  # of 2x2 pixels
    assert model.unet.mid_block.attentions[0].heads == 512 // 64
    assert (config.diffusion.objective, config.sample.sampler.timestep_spacing) == ("edm", "karras")


def test_recipes_of_one_objective_differ_by_what_follows_from_size() -> None:
    """At four times the pixels a side the noise that hides as much is four times as strong."""
    small, large = shipped("amos_small"), shipped("best_ct_mr")
    assert small.prepare.size / large.prepare.size == large.diffusion.snr_shift == 0.25
    assert small.diffusion == replace(large.diffusion, snr_shift=small.diffusion.snr_shift)
    assert small.sample.sampler.guidance_interval is not None
    scaled = tuple(4 * sigma for sigma in small.sample.sampler.guidance_interval)
    assert large.sample.sampler.guidance_interval == pytest.approx(scaled)
