"""What each setting does is said on its field, and what is recorded of a result is what was recorded before."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from data_shards.feed.config import LoaderConfig
from data_shards.ingest.prepare_config import PrepareConfig
from data_shards.modalities import MODALITIES
from data_shards.phantom.config import PhantomConfig
from data_shards.settings import Setting, execution_settings, identity, settings_of
from segdiff_dist.config import as_dict, flatten
from segdiff_dist.denoising.sampler_config import SamplerConfig
from segdiff_dist.evaluation.measure.config import EvaluateConfig
from segdiff_dist.experiment import Experiment
from segdiff_dist.sampling.config import SampleConfig
from segdiff_dist.segmentation.config import SegmenterConfig

STORED = json.loads((Path(__file__).parents[1] / "assets" / "stored_settings.json").read_text())
SECTIONS = {one.name: one.default_factory for one in fields(Experiment) if is_dataclass(one.default_factory)}


def without_seed(settings: dict[str, Any]) -> dict[str, Any]:
    return settings | {"train": {key: value for key, value in settings["train"].items() if key != "seed"}}


def recorded() -> dict[str, Any]:
    # `auto` is never recorded: a job has the precision that it began with.
    sample, segmenter = SampleConfig(precision="bf16"), SegmenterConfig()
    segmenter = replace(segmenter, train=replace(segmenter.train, precision="bf16"))
    guided = SamplerConfig(preset="best", rho=5.0, guidance=2.0, guidance_interval=(0.1, 2.0))
    folder = {"masks": Path("/m"), "label_map": Path("/l.yaml"), "out": Path("/o"), "target_modality": "CT"}
    workers = {"num_workers": 3, "threads_per_worker": 2, "batch_size": 8}
    heun = SamplerConfig(churn=1.0, solver="heun", sigma_min=0.02)
    measured = EvaluateConfig(
        segmenter=Path("/s"), fid_weights=Path("/w.pth"), num_workers=3, batch_size=2, frd_images=6
    )
    return {
        "sample": sample.result_settings("ddpm"),
        "sample_edm": replace(sample, split="val", num=None, without_organs=("liver",), sampler=guided).result_settings(
            "edm"
        ),
        "sample_folder": replace(sample, **folder, **workers, sampler=heun).result_settings("flow"),
        "prepare": PrepareConfig().result_settings(),
        "prepare_mr": PrepareConfig(
            modality="MR", store="zarr", codec="png", axes=("sagittal", "axial"), num_workers=3, bits=16
        ).result_settings(),
        "phantom": PhantomConfig().to_json(),
        "phantom_wholebody": PhantomConfig(wholebody=True, num_train=1).to_json(),
        "downstream_segmenter": without_seed(identity(segmenter)),
        "downstream_loader": identity(
            LoaderConfig(mix={"CT": 1.0}, cache_dir=Path("/c"), zoom=0.1).resolved(MODALITIES)
        ),
        "evaluate": identity(measured),
    }


@pytest.mark.parametrize("name", [name for name in STORED if name != "fixed_by_training"])
def test_what_is_recorded_of_a_result_is_what_was_recorded_before(name: str) -> None:
    """Byte for byte: job.json, index.json, phantom.json, settings.json and measured.json of old results still match."""
    assert json.dumps(recorded()[name]) == json.dumps(STORED[name])


def test_a_training_is_resumed_with_the_same_settings_as_before() -> None:
    sections = ("denoiser", "diffusion", "train", "loader", "segmenter")
    may_change = {key for name in sections for key in execution_settings(SECTIONS[name], f"{name}.")}
    plain = as_dict(Experiment())
    fixed = {key for name in sections for key in flatten(plain[name], f"{name}.")} - may_change
    # Slices a rank validates at once were among the fixed ones, though Dice is counted over all of them.
    assert set(STORED["fixed_by_training"]) - fixed == {"segmenter.validation_batch_size"}


@pytest.mark.parametrize("name", SECTIONS)
def test_the_effect_of_every_setting_is_marked(name: str) -> None:
    def settings(section: type) -> list[Setting]:
        nested = [one for setting in settings_of(section) if setting.effect is None for one in settings(setting.type)]
        return [*settings_of(section), *nested]

    found = settings(SECTIONS[name])  # refuses a field without a mark
    assert len(found) > 0
    assert [one.name for one in found if one.effect is None and not is_dataclass(one.type)] == []


def test_a_setting_that_says_nothing_is_refused() -> None:
    @dataclass(frozen=True)
    class Section:
        size: int = 1

    with pytest.raises(TypeError, match="size: its effect is not marked"):
        settings_of(Section)


def test_what_is_left_out_of_a_record() -> None:
    sampled = SampleConfig(num_workers=7, device="cpu", region_size=4, batch_size=9, out=Path("elsewhere"))
    assert identity(sampled) == identity(SampleConfig())
    assert identity(replace(sampled, seed=1)) != identity(sampled)
    assert "churn" not in identity(SamplerConfig())
    assert identity(SamplerConfig(churn=1.0))["churn"] == 1.0
