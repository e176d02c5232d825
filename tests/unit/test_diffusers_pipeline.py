"""An exported model as diffusers' own: loaded, moved, saved, uploaded, and run as other pipelines are."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from hub_support import Hub
from sampling_support import QUICK, write_weights

from data_shards.problems import InputProblems
from segdiff_dist.denoising.config import DiffusionConfig
from segdiff_dist.export.job import export_model
from segdiff_dist.painting.model_source import STARTER
from segdiff_dist.pipeline import SegGuidedPipeline
from segdiff_dist.pipeline.for_diffusers import SegGuidedDiffusionPipeline

# A process of its own: diffusers copies pipeline.py into HF_HOME, whose place is fixed when it is imported.
THROUGH_A_HUB = """
import sys
import numpy as np
import torch
from diffusers import DiffusionPipeline
folder, saved, out = sys.argv[1:]
try:
    DiffusionPipeline.from_pretrained(folder)
except ValueError as error:
    print("refused:", error)
mask_BHW = np.load(f"{out}/mask.npy")
pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
pipeline.set_progress_bar_config(disable=True)
print("at:", pipeline.push_to_hub("me/model", token="hf_none"))
pipeline.save_pretrained(saved)
for name in (folder, saved, "me/model"):
    one = DiffusionPipeline.from_pretrained(name, trust_remote_code=True, torch_dtype=torch.bfloat16)
    one.set_progress_bar_config(disable=True)
    np.save(f"{out}/{name.split('/')[-1]}.npy", one(mask_BHW, "MR", seed=3, output_type="np").images)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = write_weights(tmp_path_factory.mktemp("run"), mask_dropout=0.1)
    export_model(run / "weights" / "ema", run / "pipeline", DiffusionConfig(), QUICK["sampler"])
    return run / "pipeline"


@pytest.fixture(scope="module")
def mask_BHW() -> np.ndarray:
    masks = np.zeros((3, 32, 32), np.uint8)
    masks[1, 8:20, 8:20], masks[2, 3:9, 5:30] = 6, 1
    return masks


def opened(folder: Path) -> SegGuidedDiffusionPipeline:
    """As diffusers builds it."""
    scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    pipeline = SegGuidedDiffusionPipeline(UNet2DModel.from_pretrained(folder / "unet"), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> SegGuidedDiffusionPipeline:
    return opened(folder)


def test_its_images_in_every_form(folder: Path, pipeline: SegGuidedDiffusionPipeline, mask_BHW: np.ndarray) -> None:
    expected = SegGuidedPipeline.from_pretrained(folder, device="cpu")(mask_BHW, modality="CT", seed=5)
    expected_BHW = np.stack([np.asarray(one) for one in expected])
    images = pipeline(mask_BHW, seed=5).images
    np.testing.assert_array_equal(np.stack([np.asarray(one) for one in images]), expected_BHW)
    (arrays,) = pipeline(list(mask_BHW), "CT", seed=5, output_type="np", return_dict=False)
    np.testing.assert_array_equal(np.rint(arrays * 255)[..., 0], expected_BHW)
    tensors = pipeline(torch.from_numpy(mask_BHW), "CT", seed=5, output_type="pt").images
    assert tensors.shape == (3, 1, 32, 32)
    np.testing.assert_array_equal(tensors[:, 0].numpy(), arrays[..., 0])
    assert pipeline.size == 32
    assert pipeline.labels[6] == "liver"
    assert pipeline.modalities == ("CT", "MR")


def test_generators(pipeline: SegGuidedDiffusionPipeline, mask_BHW: np.ndarray) -> None:
    """An image depends on its own generator, not on the others of its batch; a generator goes on."""

    def generator(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    def made(mask: np.ndarray, generator: object) -> np.ndarray:
        return pipeline(mask, generator=generator, output_type="np").images

    batch = made(mask_BHW, [generator(1), generator(2), generator(3)])
    np.testing.assert_array_equal(made(mask_BHW[1], generator(2))[0], batch[1])
    one = generator(4)
    first, second = made(mask_BHW[0], one), made(mask_BHW[0], one)
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(made(np.stack([mask_BHW[0]] * 2), generator(4)), np.concatenate((first, second)))


def test_precision_steps_and_guidance(folder: Path, mask_BHW: np.ndarray) -> None:
    pipeline = opened(folder)

    def made(**how: object) -> np.ndarray:
        return pipeline(mask_BHW[1], seed=1, output_type="np", **how).images

    usual = made()
    assert not np.array_equal(made(num_inference_steps=7), usual)
    assert not np.array_equal(made(guidance_scale=3.0), usual)
    assert pipeline.to(torch.bfloat16).unet.dtype == torch.bfloat16
    assert 0 < np.abs(made() - usual).max() < 0.2
    with pytest.raises(InputProblems, match=r"float32 or torch\.bfloat16"):
        pipeline.to(torch.float16)


def test_its_progress_bar(folder: Path, mask_BHW: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = opened(folder)
    pipeline(mask_BHW, seed=1)
    assert capsys.readouterr().err == ""
    pipeline.set_progress_bar_config(disable=False, desc="painting")
    pipeline(mask_BHW, seed=1, guidance_scale=2.0)
    assert "painting: 100%" in capsys.readouterr().err


def test_saved_or_uploaded_it_is_the_same(folder: Path, mask_BHW: np.ndarray, tmp_path: Path) -> None:
    """Every byte of the folder, and the images of what is loaded from it."""
    np.save(tmp_path / "mask.npy", mask_BHW)
    with Hub() as hub:
        # A process that takes too long is killed, and removes no temporary folder.
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "TMPDIR": str(tmp_path)}
        settings |= {"HF_HUB_DISABLE_XET": "1"}
        arguments = [sys.executable, "-c", THROUGH_A_HUB, str(folder), str(tmp_path / "saved"), str(tmp_path)]
        done = subprocess.run(arguments, env=os.environ | settings, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "refused: The directory" in done.stdout
    assert "trust_remote_code=True" in done.stdout
    assert f"at: {hub.url}/me/model/commit/" in done.stdout
    files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert {"pipeline.py", "README.md", "unet/digests.json"} <= files.keys()
    assert hub.files["me/model"] == files
    assert {name: (tmp_path / "saved" / name).read_bytes() for name in files} == files
    images = [np.load(tmp_path / f"{name}.npy") for name in ("pipeline", "saved", "model")]
    expected = SegGuidedPipeline.from_pretrained(folder, device="cpu", precision="bf16")(mask_BHW, "MR", seed=3)
    for found in images:
        np.testing.assert_array_equal(np.rint(found[..., 0] * 255), np.stack([np.asarray(one) for one in expected]))


def test_its_code_names_a_missing_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (STARTER / "pipeline.py").read_bytes() == (folder / "pipeline.py").read_bytes()
    monkeypatch.setitem(sys.modules, "segdiff_dist.pipeline.for_diffusers", None)
    with pytest.raises(ImportError, match=r"needs the package segdiff-dist.*pip install segdiff-dist"):
        runpy.run_path(str(folder / "pipeline.py"))


def test_what_is_refused(folder: Path, pipeline: SegGuidedDiffusionPipeline, mask_BHW: np.ndarray) -> None:
    def refused(match: str, *arguments: object, **options: object) -> None:
        with pytest.raises(InputProblems, match=match):
            pipeline(*arguments, **options)

    refused("output_type: latent", mask_BHW, output_type="latent")
    refused("2 for 3 masks", mask_BHW, generator=[torch.Generator()] * 2)
    refused("beside a generator", mask_BHW, generator=torch.Generator(), seed=1)
    refused("seed: -1; give a whole number from 0", mask_BHW, seed=-1)
    refused("different sizes", [mask_BHW[0], mask_BHW[0, :8]])
    refused("modality: PET", mask_BHW, "PET")
    refused("num_steps", mask_BHW, num_inference_steps=2000)
    with pytest.raises(InputProblems, match="the one that the model was loaded from"):
        pipeline.save_pretrained(folder)
    with pytest.raises(InputProblems, match="safetensors"):
        pipeline.save_pretrained(folder / "new", safe_serialization=False)
    assert not (folder / "new").exists()
