"""Distances on the features of a network in a file: a ResNet-50's weights by either naming, or TorchScript."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_support import evaluate_here, random_images
from safetensors.torch import save_file

from data_shards.problems import InputProblems
from data_shards.records import MODALITIES
from segdiff_dist.evaluation.measure.checks import cannot_extract, unreadable
from segdiff_dist.evaluation.measure.config import EvaluateConfig
from segdiff_dist.evaluation.measure.result_files import read_summary
from segdiff_dist.evaluation.metrics.distances import DISTANCE_METRICS, Distributions, Group
from segdiff_dist.evaluation.metrics.given_network import described, load_network
from segdiff_dist.segmentation.monai_parts import resnet50

ITEM = ("CT", "CT", "axial")
# The children of torchvision's ResNet in order; RadImageNet's file has them by number.
CHILDREN = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """Of an untrained ResNet-50, under torchvision's names."""
    torch.manual_seed(0)
    net = resnet50(spatial_dims=2, n_input_channels=3, conv1_t_stride=2, bias_downsample=False, num_classes=10)
    return net.state_dict()


class Moments(torch.nn.Module):
    """Mean and square of each channel, as maps of one place."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, x * x], 1).mean(dim=(2, 3), keepdim=True)


def script(file: Path, network: torch.nn.Module) -> Path:
    torch.jit.save(torch.jit.script(network), str(file))
    return file


def images(num: int = 2, side: int = 64) -> torch.Tensor:
    return torch.from_numpy(random_images(0, (num, side, side)))


def features(file: Path, image_BHW: torch.Tensor) -> Any:
    return load_network(str(file), "cpu")(image_BHW, torch.zeros(len(image_BHW))).numpy()


def test_both_namings_are_one_network_with_their_own_input(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    torch.save(weights, tmp_path / "resnet50.pth")
    numbered = {
        f"backbone.{CHILDREN.index(name.split('.')[0])}.{name.split('.', 1)[1]}": tensor
        for name, tensor in weights.items()
        if not name.startswith("fc.")
    }
    save_file(numbered, tmp_path / "RadImageNet.safetensors")
    assert described(str(tmp_path / "resnet50.pth"))["mean"][0] == pytest.approx(0.485)
    assert described(str(tmp_path / "RadImageNet.safetensors"))["range"] == (-1.0, 1.0)
    ours, theirs = (features(tmp_path / name, images()) for name in ("resnet50.pth", "RadImageNet.safetensors"))
    assert ours.shape == theirs.shape == (2, 2048)
    assert not np.allclose(ours, theirs)
    (tmp_path / "RadImageNet.yaml").write_text("{range: [0, 1], mean: [.485, .456, .406], std: [.229, .224, .225]}")
    np.testing.assert_allclose(ours, features(tmp_path / "RadImageNet.safetensors", images()), rtol=1e-5)


def test_keras_weights_have_biases_and_their_own_input(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    def keras(bias: float) -> Path:
        """The same network for every bias, since batch normalisation subtracts what it adds."""
        own = {name: tensor for name, tensor in weights.items() if not name.startswith("fc.")}
        for name, tensor in weights.items():
            if name.endswith("running_mean"):
                convolution = name.replace("bn", "conv").replace("downsample.1", "downsample.0")
                own[convolution.replace("running_mean", "bias")] = torch.full_like(tensor, bias)
                own[name] = tensor + bias
        save_file(own, tmp_path / f"keras-{bias}.safetensors")
        return tmp_path / f"keras-{bias}.safetensors"

    plain, biased = keras(0.0), keras(0.5)
    takes = described(str(plain))
    assert (takes["size"], takes["mean"], takes["std"]) == (None, (0.406, 0.456, 0.485), (1.0, 1.0, 1.0))
    np.testing.assert_allclose(features(biased, images()), features(plain, images()), rtol=1e-3, atol=1e-4)
    # Keras has its strides at other places than torchvision.
    torch.save(weights, tmp_path / "net.pth")
    (tmp_path / "net.yaml").write_text("{size: null, mean: [.406, .456, .485], std: [1, 1, 1]}")
    assert not np.allclose(features(plain, images()), features(tmp_path / "net.pth", images()), rtol=0.01)


def test_a_torchscript_network_has_its_input_as_described(tmp_path: Path) -> None:
    file = script(tmp_path / "net.pt", Moments())
    image = torch.full((2, 8, 8), 255, dtype=torch.uint8)
    np.testing.assert_allclose(features(file, image), 1.0)
    file.with_suffix(".yaml").write_text("{range: [-2, 4], mean: [1], std: [2]}")
    np.testing.assert_allclose(features(file, image), [[1.5, 2.25]] * 2)


def test_distances_have_names_of_their_own(tmp_path: Path) -> None:
    found = features(script(tmp_path / "net.pt", Moments()), images(8))
    measured = Distributions(capacity=8)
    both = {("network", "real"): found, ("network", "gen"): found}
    measured.add(both, [ITEM] * 8, ["a", "b"] * 4, np.ones(8, bool), np.arange(8))
    entries = measured.entries(Group.of(MODALITIES[0]), Group.of(MODALITIES[0]))
    assert set(entries) == {name for name in DISTANCE_METRICS if name.startswith("network_")}
    assert entries["network_frechet"]["value"] == pytest.approx(0, abs=1e-6)
    assert str(entries["network_frechet"]["value"])[0] != "-"
    assert entries["network_frechet"]["too_few"]
    measured.failed["network"] = "out of memory"
    assert measured.entries(Group.of(MODALITIES[0]), Group.of(MODALITIES[0])) == {}


def test_files_that_are_no_network_are_refused_before_any_work(
    tmp_path: Path, weights: dict[str, torch.Tensor]
) -> None:
    (tmp_path / "noise.pth").write_bytes(b"\x80\x04nothing of that kind")
    torch.save({name: tensor for name, tensor in weights.items() if "layer4" not in name}, tmp_path / "part.pth")
    torch.save({"epoch": 3}, tmp_path / "other.pth")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    for name in ("noise.pth", "part.pth", "other.pth", "empty.safetensors"):
        [found] = unreadable(EvaluateConfig(feature_network=tmp_path / name))
        assert found.field == "evaluate.feature_network"
        assert name in found.value
    [missing] = EvaluateConfig(feature_network=tmp_path / "nowhere.pth").problems()
    assert "no such file" in missing.value
    file = script(tmp_path / "net.pt", Moments())
    file.with_suffix(".yaml").write_text("{mean: [1, 2], std: [2]}")
    with pytest.raises(InputProblems, match="as many as of mean"):
        load_network(str(file), "cpu")


def test_a_network_that_cannot_take_the_images_is_refused(tmp_path: Path) -> None:
    file = script(tmp_path / "net.pt", torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 4)))
    assert not list(cannot_extract(32, EvaluateConfig(feature_network=file)))
    [found] = cannot_extract(64, EvaluateConfig(feature_network=file))
    assert "net.yaml" in str(found)
    file.with_suffix(".yaml").write_text("size: 32")
    assert not list(cannot_extract(64, EvaluateConfig(feature_network=file)))


class FailsWhereBright(torch.nn.Module):
    """Features that are no numbers for images with more than a tenth of white."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sqrt(0.1 - x.mean(dim=(2, 3)))


def test_a_network_that_fails_costs_its_own_distances_alone(shapes: Path, tmp_path: Path) -> None:
    summary = read_summary(
        evaluate_here(tmp_path / "run", shapes, feature_network=script(tmp_path / "net.pt", FailsWhereBright()))
    )
    assert "segmenter_frechet" in summary["metrics"]
    assert not [name for name in summary["metrics"] if name.startswith("network_")]
    assert "its network failed" in summary["not_available"]["network_frechet"]
    assert "not finite" in summary["not_available"]["network_frechet"]
    assert summary["provenance"]["feature_network"]["file"] == "net.pt"
