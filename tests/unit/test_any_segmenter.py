"""Segmenters of other projects: a TorchScript file, described beside it, and a MONAI bundle."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from data_shards.labels import AMOS, LabelTable
from data_shards.problems import InputProblems
from segdiff_dist.experiment import Withheld, load_experiment
from segdiff_dist.segmentation.any_segmenter import TorchScriptSegmenter, open_any_segmenter

NAMES = {0: "background", 1: "liver", 2: "spleen", 3: "kidney_left"}
ORGANS = LabelTable("organs", ("background", "spleen", "liver"))


class ByBrightness(nn.Module):
    """Scores of background, liver from 0.5 on, spleen from 0.8 on, and a class that it never gives."""

    def forward(self, x: Tensor) -> Tensor:
        first = x[:, :1]
        return torch.cat([0.5 - first, torch.zeros_like(first), 2 * (first - 0.8), first * 0 - 9], 1)


class Labels(nn.Module):
    """Label ids of an image of side 8 alone."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[2] == 8
        return (x[:, 0] > 0.5).long() + (x[:, 0] > 0.8).long()


def write_segmenter(file: Path, net: nn.Module | None = None, **described: Any) -> Path:
    """A TorchScript file and its description."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(net or ByBrightness()).save(str(file))
    file.with_suffix(".yaml").write_text(yaml.safe_dump({"names": NAMES} | described))
    return file


def opened(file: Path, hu: tuple[float, float] | None = None) -> TorchScriptSegmenter:
    found = open_any_segmenter(file)
    assert isinstance(found, TorchScriptSegmenter)
    return found.suited(ORGANS, hu)


def labels_of(segmenter: TorchScriptSegmenter, grey: list[int], side: int = 4) -> list[int]:
    """The labels of a column of squares of these grey values."""
    image_HW = np.repeat(np.repeat(np.array(grey, np.uint8)[:, None], side, 0), side, 1)
    image_HW = np.repeat(image_HW, len(grey), 1)
    labels, features = segmenter.predict_and_features(
        torch.from_numpy(image_HW)[None], torch.zeros(1, dtype=torch.int64)
    )
    assert features is None
    assert labels.shape == (1, *image_HW.shape)
    return labels[0, side // 2 :: side, 0].tolist()


def test_its_ids_become_those_of_the_masks_table(tmp_path: Path) -> None:
    segmenter = opened(write_segmenter(tmp_path / "segmenter.pt"))
    assert labels_of(segmenter, [0, 100, 140, 250]) == [0, 0, 2, 1]
    assert len(segmenter.weights_sha256) == 64


def test_images_are_windowed_and_resampled_as_described(tmp_path: Path) -> None:
    described = {"window_hu": [0, 100], "size": 8, "output": "labels"}
    segmenter = opened(write_segmenter(tmp_path / "segmenter.pt", Labels(), **described), (-255.0, 255.0))
    # A grey value is 2 HU: 140 is 25 HU, 170 is 85 HU.
    assert labels_of(segmenter, [0, 140, 160, 175], side=8) == [0, 0, 2, 1]
    shifted = opened(write_segmenter(tmp_path / "shifted.pt", range=[0, 255], mean=51, std=255, channels=3))
    assert labels_of(shifted, [140, 190, 250]) == [0, 2, 2]


def test_a_bundle_of_monai_is_described_by_its_metadata(tmp_path: Path) -> None:
    def bundle(shape: list[int]) -> Path:
        (tmp_path / "configs").mkdir(exist_ok=True)
        image = {"num_channels": 1, "spatial_shape": shape, "value_range": [0, 1]}
        pred = {"channel_def": {str(i): name for i, name in NAMES.items()}}
        formats = {"network_data_format": {"inputs": {"image": image}, "outputs": {"pred": pred}}}
        (tmp_path / "configs" / "metadata.json").write_text(json.dumps(formats))
        return tmp_path

    write_segmenter(tmp_path / "models" / "model.ts")
    assert labels_of(opened(bundle([16, 16])), [0, 140, 250, 250]) == [0, 2, 1, 1]
    with pytest.raises(InputProblems, match="3 dimensions; give the bundle of a 2-D network"):
        open_any_segmenter(bundle([96, 96, 96]))


def test_what_cannot_segment_is_refused(tmp_path: Path) -> None:
    def refused(path: Path) -> str:
        with pytest.raises(InputProblems) as caught:
            open_any_segmenter(path)
        [one] = caught.value.problems
        assert "\n" not in str(one)
        return str(one)

    file = write_segmenter(tmp_path / "segmenter.pt")
    assert "ids [0, 2]; name the ids 0, 1, 2" in refused(
        write_segmenter(tmp_path / "gap.pt", names={0: "background", 2: "liver"})
    )
    assert "must be unique and start with" in refused(write_segmenter(tmp_path / "first.pt", names={0: "liver"}))
    assert "windows: unknown key; did you mean window_hu" in refused(
        write_segmenter(tmp_path / "key.pt", windows=[0, 1])
    )
    file.with_suffix(".yaml").unlink()
    assert "segmenter.yaml: description of the segmenter: not there" in refused(file)
    gap = tmp_path / "gap.pt"
    gap.write_bytes(b"no network")
    gap.with_suffix(".yaml").write_text(yaml.safe_dump({"names": NAMES}))
    assert "no TorchScript" in refused(gap)
    assert "no such file" in refused(tmp_path / "none.pt")


def test_organs_and_modalities_that_it_does_not_know_are_named(tmp_path: Path) -> None:
    segmenter = opened(write_segmenter(tmp_path / "segmenter.pt", modalities=["CT"], window_hu=[0, 100]))
    assert not list(segmenter.problems(ORGANS, ["CT"], (-256, 256)))
    organs, modality, window = map(str, segmenter.problems(AMOS, ["CT", "MR"], None))
    assert "12 of the masks' 15 organs are not in it: kidney_right, gallbladder" in organs
    assert "trained on CT, the images are MR" in modality
    assert "the HU of the images' grey values are not known" in window


def test_a_run_folder_cannot_name_a_file_that_runs_code(tmp_path: Path) -> None:
    file = write_segmenter(tmp_path / "segmenter.pt")
    ours = tmp_path / "ours"
    ours.mkdir()
    (ours / "segdiff.json").write_text("{}")
    for named, used in ((file, None), (ours, ours)):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({"evaluate": {"segmenter": str(named)}}))
        withheld: list[Withheld] = []
        assert load_experiment(None, tmp_path, withheld=withheld).evaluate.segmenter == used
        assert [one.key for one in withheld] == (["evaluate.segmenter"] if used is None else [])
