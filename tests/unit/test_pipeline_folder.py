"""A model as a pipeline folder: diffusers reads it, and its images are those of sampling."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sampling_support import DIFFUSION, QUICK, make_here, write_weights
from tests_support import write_shapes

from data_shards.problems import InputProblems
from segdiff_dist.denoising.config import DiffusionConfig
from segdiff_dist.denoising.denoiser import Denoiser
from segdiff_dist.denoising.schedule import make_scheduler
from segdiff_dist.export.job import export_model
from segdiff_dist.pipeline import SegGuidedPipeline

SAMPLER = QUICK["sampler"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("run"), mask_dropout=0.1)


@pytest.fixture(scope="module")
def folder(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the configuration's defaults, which are not how the net was trained: its weights know better."""
    out = tmp_path_factory.mktemp("model") / "pipeline"
    export_model(run / "weights" / "ema", out, DiffusionConfig(), SAMPLER)
    return out


def test_diffusers_reads_the_folder_without_us(run: Path, folder: Path) -> None:
    from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DModel

    unet = UNet2DModel.from_pretrained(folder, subfolder="unet")
    for name, values in Denoiser.load(run / "weights" / "ema").unet.state_dict().items():
        assert torch.equal(values, unet.state_dict()[name])
    scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    assert torch.equal(scheduler.alphas_cumprod, make_scheduler(DIFFUSION).alphas_cumprod)
    assert scheduler.config.prediction_type == "v_prediction"
    assert DiffusionPipeline.load_config(folder)["_class_name"] == ["pipeline", "SegGuidedDiffusionPipeline"]


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_images_are_those_of_sampling(run: Path, folder: Path, tmp_path: Path, precision: str) -> None:
    """To the bit, on this machine, whatever else is in the batch."""
    shapes = write_shapes(tmp_path / "shards", num_patients=1, slices=2)
    (tmp_path / "run").symlink_to(run)
    store = make_here(tmp_path / "run", shapes, precision=precision, out=tmp_path / "samples", num=3)
    pipeline = SegGuidedPipeline.from_pretrained(folder, device="cpu", precision=precision)
    for item in store.items.to_pylist():
        at = item["item_id"]
        image = pipeline(store.mask[at], modality=item["target_modality"], axis=item["axis"], first_item=at)
        np.testing.assert_array_equal(np.asarray(image), store.image[at])


def test_one_mask_or_many(folder: Path) -> None:
    pipeline = SegGuidedPipeline.from_pretrained(folder, device="cpu")
    mask_BHW = np.zeros((2, pipeline.size, pipeline.size), np.int64)
    mask_BHW[1, 8:20, 8:20] = 6
    images = pipeline(mask_BHW, modality="MR", seed=3)
    assert [image.mode for image in images] == ["L", "L"]
    assert images[0].size == (pipeline.size, pipeline.size)
    alone = pipeline(mask_BHW[1], modality="MR", seed=3, first_item=1)
    np.testing.assert_array_equal(np.asarray(alone), np.asarray(images[1]))
    assert alone.tobytes() != pipeline(mask_BHW[1], seed=4, first_item=1).tobytes()
    assert alone.tobytes() != pipeline(mask_BHW[1], seed=3, first_item=1, num_inference_steps=7).tobytes()
    assert pipeline.labels[6] == "liver"


def test_what_is_refused(run: Path, folder: Path, tmp_path: Path) -> None:
    pipeline = SegGuidedPipeline.from_pretrained(folder, device="cpu")
    good = np.zeros((pipeline.size, pipeline.size), np.uint8)
    with pytest.raises(InputProblems, match=r"label ids \[77\]"):
        pipeline(np.where(np.eye(pipeline.size, dtype=bool), 77, good))
    with pytest.raises(InputProblems, match=r"modality: PET.*\n.*axis: oblique.*\n.*shape \(8, 8\)"):
        pipeline(good[:8, :8], modality="PET", axis="oblique")
    with pytest.raises(InputProblems, match="dtype float"):
        pipeline(good / 2)
    with pytest.raises(InputProblems, match="num_steps"):
        pipeline(good, num_inference_steps=2000)
    for name, value in (("num_inference_steps", 0), ("seed", 1.5), ("seed", 2**63), ("first_item", "1")):
        with pytest.raises(InputProblems, match=f"{name.removeprefix('num_inference_')}: {value!r}"):
            pipeline(good, **{name: value})
    with pytest.raises(InputProblems, match="not empty"):
        export_model(run / "weights" / "ema", folder, DIFFUSION, SAMPLER)
    with pytest.raises(InputProblems, match="train first"):
        export_model(tmp_path, tmp_path / "new", DIFFUSION, SAMPLER)
    with pytest.raises(InputProblems, match="zero_terminal_snr"):
        export_model(run / "weights" / "ema", tmp_path / "new", DIFFUSION, replace(SAMPLER, timestep_spacing="leading"))
    with pytest.raises(InputProblems, match=r"no segdiff\.json"):
        SegGuidedPipeline.from_pretrained(tmp_path)
