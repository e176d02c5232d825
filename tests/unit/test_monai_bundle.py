"""A model as a MONAI bundle: MONAI's own tools load, verify and run it, and its images are those of `paint`."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow, load, verify_net_in_out
from sampling_support import write_weights

from data_shards.problems import InputProblems
from segdiff_dist import paint
from segdiff_dist.cli import main
from segdiff_dist.denoising.config import DiffusionConfig
from segdiff_dist.export.job import export_model
from segdiff_dist.painting.model_source import EXAMPLE_MASK
from segdiff_dist.pipeline import SegGuidedPipeline

# The required keys of MONAI's schema meta_schema_20240725.json.
REQUIRED = {
    *("schema", "version", "monai_version", "pytorch_version", "numpy_version", "required_packages_version"),
    *("task", "description", "authors", "copyright", "network_data_format"),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("run"), average="ema_0.05", mask_dropout=0.1)


@pytest.fixture(scope="module")
def bundle(run: Path) -> Path:
    (run / "few.yaml").write_text("sample: {sampler: {num_steps: 3, timestep_spacing: trailing, eta: 0.5}}")
    command = ["export", str(run / "bundle"), "--run", str(run), "--format", "monai"]
    assert main([*command, "--config", str(run / "few.yaml")]) == 0
    return run / "bundle"


def test_monai_runs_it_as_paint_does(bundle: Path, tmp_path: Path) -> None:
    workflow = ConfigWorkflow(
        config_file=str(bundle / "configs" / "inference.json"),
        meta_file=str(bundle / "configs" / "metadata.json"),
        logging_file=False,
        bundle_root=str(bundle),
        mask=str(EXAMPLE_MASK),
        output=str(tmp_path / "ours.png"),
        modality="MR",
        seed=7,
    )
    workflow.initialize()
    workflow.run()
    paint(EXAMPLE_MASK, bundle, modality="MR", seed=7).save(tmp_path / "again.png")
    assert (tmp_path / "ours.png").read_bytes() == (tmp_path / "again.png").read_bytes()


def test_its_network_is_the_pipelines(run: Path, bundle: Path, tmp_path: Path) -> None:
    """Loaded by MONAI with the weights in model.pt, also with others put there."""
    configs, mask_B1HW = bundle / "configs", torch.zeros(2, 1, 32, 32)
    mask_B1HW[1, 0, 8:20, 8:20] = 6
    where = {"bundle": str(bundle), "device": "cpu"}
    network = load(bundle.name, bundle_dir=bundle.parent, workflow_type="inference", net_override=where, device="cpu")
    grey_B1HW = network(mask_B1HW, "CT", seed=3)
    sampler = SegGuidedPipeline.from_pretrained(bundle, device="cpu").sampler
    export_model(run / "weights" / "ema_0.05", tmp_path / "pipeline", DiffusionConfig(), sampler)
    pipeline = SegGuidedPipeline.from_pretrained(tmp_path / "pipeline", device="cpu")
    expected = pipeline(mask_B1HW[:, 0].long().numpy(), "CT", seed=3)
    np.testing.assert_array_equal(grey_B1HW[:, 0] * 255, np.stack([np.asarray(one) for one in expected]))
    verify_net_in_out(
        "network_def",
        meta_file=str(configs / "metadata.json"),
        config_file=str(configs / "inference.json"),
        device="cpu",
        bundle_root=str(bundle),
    )
    metadata = ConfigParser.load_config_file(configs / "metadata.json")
    assert metadata.keys() >= REQUIRED
    assert metadata["network_data_format"]["inputs"]["image"]["channel_def"]["6"] == "liver"
    assert "python -m monai.bundle run" in (bundle / "docs" / "README.md").read_text()
    with pytest.raises(InputProblems, match=r"shape \(2, 32, 32\)"):
        network(mask_B1HW[:, 0])
    with pytest.raises(InputProblems, match="seed: -1; give a whole number from 0"):
        network(mask_B1HW, seed=-1)
    with pytest.raises(InputProblems, match=r"mask: dtype torch\.complex64"):
        network(mask_B1HW.to(torch.complex64))
    inside_B1HW = mask_B1HW > 0
    np.testing.assert_array_equal(network(inside_B1HW), network(inside_B1HW.to(torch.uint8)))


def test_damaged_weights_are_refused(bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    (copy / "models" / "model.pt").write_bytes((bundle / "models" / "model.pt").read_bytes()[:-100])
    with pytest.raises(InputProblems, match="not those that were written"):
        SegGuidedPipeline.from_pretrained(copy, device="cpu")
    (copy / "models" / "digests.json").unlink()
    with pytest.raises(InputProblems, match="cannot be read"):
        SegGuidedPipeline.from_pretrained(copy, device="cpu")
    torch.save({"a": Path("b")}, copy / "models" / "model.pt")  # an object, which a reader would have to run
    with pytest.raises(InputProblems, match="cannot be read"):
        SegGuidedPipeline.from_pretrained(copy, device="cpu")
