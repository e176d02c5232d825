"""EDM and rectified flow through training, resume, sampling and a pipeline folder."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sampling_support import make_here, pixels_of, write_weights
from training_support import NET, losses, run_training

from data_shards.problems import InputProblems
from data_shards.store.shards import ShardSet
from segdiff_dist.denoising.config import DiffusionConfig
from segdiff_dist.denoising.sampler_config import SamplerConfig
from segdiff_dist.denoising.sigma_data import measure_sigma_data
from segdiff_dist.export.job import export_model
from segdiff_dist.pipeline import SegGuidedPipeline
from segdiff_dist.sampling.config import SampleConfig
from segdiff_dist.sampling.job import prepare_job

EDM = DiffusionConfig(objective="edm", lognormal=(-0.4, 1.4), mask_dropout=0.1)
FLOW = DiffusionConfig(objective="flow", lognormal=(0.0, 1.0), mask_dropout=0.1)


@pytest.mark.parametrize(
    ("diffusion", "net"), [(EDM, replace(NET, net="efficient")), (FLOW, NET)], ids=["edm-efficient", "flow"]
)
def test_a_resumed_run_is_bit_identical_and_knows_its_process(
    shapes: Path, tmp_path: Path, diffusion: DiffusionConfig, net: Any
) -> None:
    net = replace(net, attention_resolutions=())
    whole = run_training(shapes, tmp_path / "whole", net, diffusion)
    assert whole[-1] < 0.9 * whole[0]
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", cut)
    shutil.rmtree(cut / "checkpoints" / f"{96:012d}")
    assert run_training(shapes, cut, net, diffusion) == whole == losses(tmp_path / "whole")
    folders = [run / "weights" / "ema_0.05" for run in (cut, tmp_path / "whole")]
    first, second = ((folder / "diffusion_pytorch_model.safetensors").read_bytes() for folder in folders)
    assert first == second
    said = json.loads((folders[0] / "segdiff.json").read_text())["diffusion"]
    assert said["objective"] == diffusion.objective
    shards = ShardSet.open(shapes)
    expected = measure_sigma_data(shards, shards.select(split="train")) if diffusion is EDM else None
    assert said["sigma_data"] == expected
    row = json.loads((cut / "log.jsonl").read_text().splitlines()[-1])
    assert any(name.startswith("loss_sigma_") for name in row)


TRAINED: dict[str, Any] = {"objective": "edm", "sigma_data": 0.37, "lognormal": (-0.4, 1.4), "mask_dropout": 0.1}
GUIDED = SamplerConfig(solver="heun", num_steps=4, guidance=1.5, guidance_interval=(0.1, 5.0), churn=2.0)


def test_a_job_takes_its_process_from_the_weights(shapes: Path, tmp_path: Path) -> None:
    run, sampler = write_weights(tmp_path, **TRAINED), GUIDED
    shards, config = ShardSet.open(shapes), SampleConfig(num=3, sampler=sampler)
    rows = shards.select(split="test")
    job = prepare_job(run, shards, rows, replace(EDM, lognormal=(-0.4, 1.4)), config)
    process = {"objective": "edm", "sigma_data": 0.37, "lognormal": [-0.4, 1.4], "snr_shift": 1.0}
    assert job.job_settings["diffusion"] == process
    assert job.job_settings["sample"]["sampler"]["timestep_spacing"] == "karras"
    assert job.job_settings["sample"]["sampler"]["guidance_interval"] == [0.1, 5.0]
    with pytest.raises(InputProblems, match=r"diffusion\.objective: 'ddpm'.*trained with 'edm'"):
        prepare_job(run, shards, rows, DiffusionConfig(), config)
    with pytest.raises(InputProblems, match=r"diffusion\.lognormal.*trained with \(-0\.4, 1\.4\)"):
        prepare_job(run, shards, rows, replace(EDM, lognormal=(0.0, 1.0)), config)
    without = write_weights(tmp_path / "no", **{**TRAINED, "mask_dropout": 0.0})
    with pytest.raises(InputProblems, match=r"guidance.*trained without diffusion\.mask_dropout"):
        prepare_job(without, shards, rows, EDM, config)


@pytest.mark.parametrize("trained", [TRAINED, {"objective": "flow", "lognormal": (0.0, 1.0), "mask_dropout": 0.1}])
def test_images_of_a_pipeline_are_those_of_sampling(shapes: Path, tmp_path: Path, trained: dict[str, Any]) -> None:
    run, process = write_weights(tmp_path, **trained), replace(DiffusionConfig(), **trained)
    store = make_here(run, shapes, diffusion=process, num=2, sampler=GUIDED)
    export_model(run / "weights" / "ema", tmp_path / "model", DiffusionConfig(), GUIDED)
    assert trained["objective"] in json.loads((tmp_path / "model" / "segdiff.json").read_text())["diffusion"].values()
    precision = store.job["sample"]["precision"]
    pipeline = SegGuidedPipeline.from_pretrained(tmp_path / "model", device="cpu", precision=precision)
    item = store.items.to_pylist()[1]
    image = pipeline(store.mask[1], modality=item["target_modality"], axis=item["axis"], first_item=1)
    np.testing.assert_array_equal(np.asarray(image), store.image[1])
    words = "EDM's preconditioning" if trained is TRAINED else "rectified flow"
    assert words in (tmp_path / "model" / "README.md").read_text()


def test_autoguidance_moves_away_from_the_weaker_net(shapes: Path, tmp_path: Path) -> None:
    run = write_weights(write_weights(tmp_path, **TRAINED), seed=1, average="early", **TRAINED)
    plain = SamplerConfig(num_steps=3)

    def images(out: str, **settings: Any) -> np.ndarray:
        sampler = replace(plain, **settings)
        return pixels_of(make_here(run, shapes, diffusion=EDM, num=2, sampler=sampler, out=tmp_path / out))[0]

    alone, away, itself = (
        images("a"),
        images("b", guidance=1.5, guidance_weights="early"),
        images("c", guidance=1.5, guidance_weights="ema"),
    )
    assert (away != alone).any()
    assert np.abs(itself.astype(int) - alone).max() <= 2  # away from itself is nowhere
    config = SampleConfig(num=2, sampler=replace(plain, guidance=1.5, guidance_weights="missing"))
    shards = ShardSet.open(shapes)
    with pytest.raises(InputProblems, match="train first"):
        prepare_job(run, shards, shards.select(split="test"), EDM, config)
    write_weights(tmp_path, seed=1, average="other", objective="flow")
    config = replace(config, sampler=replace(config.sampler, guidance_weights="other"))
    with pytest.raises(InputProblems, match="of another net"):
        prepare_job(run, shards, shards.select(split="test"), EDM, config)
