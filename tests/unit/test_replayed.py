"""`sample.cuda_graph`: replayed passes give the eager images, bit for bit, and what cannot be replayed stays eager.

A graph's behaviour is that of graph_support.Recording: operators again, on the same memory, without Python.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from graph_support import Recording
from sampling_support import QUICK, make_here, pixels_of, write_weights

from segdiff_dist.cli import main
from segdiff_dist.denoising import replayed
from segdiff_dist.denoising.sampler_config import SamplerConfig

CASES: dict[str, dict[str, Any]] = {
    "guided in an interval": {
        "sampler": SamplerConfig(num_steps=6, timestep_spacing="trailing", guidance=2.0, guidance_interval=(0.2, 5.0))
    },
    "autoguided": {
        "sampler": replace(QUICK["sampler"], num_steps=4, guidance=2.0, guidance_weights="early"),
    },
}


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Recording]:
    """The recordings that are made in a test."""
    made: list[Recording] = []

    def recorder_for(_: torch.device) -> Recording:
        made.append(Recording())
        return made[-1]

    monkeypatch.setattr(replayed, "recorder_for", recorder_for)
    return made


@pytest.mark.parametrize("name", CASES)
def test_replayed_images_are_the_eager_ones(
    name: str, shapes: Path, tmp_path: Path, recorded: list[Recording], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten items in batches of 4, 4 and 2, which is filled up to 4: each kind of batch is one recording."""
    # In bf16 a CPU rounds differently under the recorder than without it.
    settings = {"samples_per_mask": 1, "cross_modality_masks": 0, "precision": "fp32", **CASES[name]}
    runs = [tmp_path / "replayed", tmp_path / "eager"]
    for run in runs:
        write_weights(run, mask_dropout=0.1)
        write_weights(run, seed=1, average="early", mask_dropout=0.1)
    images = pixels_of(make_here(runs[0], shapes, **settings))[0]
    used = [one.replays for one in recorded if one.replays]
    monkeypatch.setattr(replayed, "recorder_for", lambda _: None)
    assert np.array_equal(images, pixels_of(make_here(runs[1], shapes, **settings))[0])
    # Of a recording's first three passes two are eager, and the third is replayed to be compared.
    assert len(used) == 2
    assert all(count > 2 for count in used)


def test_a_recording_with_other_bits_is_not_used(
    shapes: Path, tmp_path: Path, recorded: list[Recording], monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    def spoilt(self: Recording) -> None:
        """The last operator's result, which is the prediction."""
        self.replays += 1
        self.operators[-1][3].zero_()

    monkeypatch.setattr(Recording, "replay", spoilt)
    make_here(write_weights(tmp_path / "a"), shapes)
    assert len([one for one in recorded if one.replays]) == 1, "one attempt"
    assert "not the eager one, bit for bit" in capfd.readouterr().err


def test_on_without_a_gpu_is_refused(shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_weights(tmp_path)
    given = ["sample", "--run", str(run), "--data", str(shapes), "--sample.cuda-graph", "on", "--sample.device", "cpu"]
    assert main(given) == 2
    assert "sample.cuda_graph: on" in capsys.readouterr().err
    assert not (run / "samples").exists()
