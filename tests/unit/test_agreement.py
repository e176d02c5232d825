"""Our metrics against independent implementations on the same inputs: torchmetrics, MONAI, scikit-learn and, where
their extras are installed, torch-fidelity and the packages of the authors of LPIPS and FRD."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

# Here, not in the test: a command that an earlier test runs in this process would import MONAI without SciPy.
from monai.metrics import compute_surface_dice
from scipy.ndimage import gaussian_filter

from segdiff_dist.evaluation.metrics import feature_sets, frechet, perceptual, radiomics, similarity, surfaces


def textures(seed: int, num: int, side: int) -> np.ndarray:
    """Smooth grey patterns of all contrasts, uint8 [num, side, side]."""
    rng = np.random.default_rng(seed)
    smooth = gaussian_filter(rng.normal(size=(num, side, side)), (0, 3, 3))
    low, high = (f(smooth, axis=(1, 2), keepdims=True) for f in (np.min, np.max))
    return ((smooth - low) / (high - low) * rng.uniform(80, 255, (num, 1, 1))).astype(np.uint8)


def blobs(seed: int, side: int = 48) -> np.ndarray:
    """Label map of a few organs, some of them cut off by the border."""
    rng = np.random.default_rng(seed)
    return gaussian_filter(rng.normal(size=(5, side, side)), (0, 5, 5)).argmax(axis=0).astype(np.uint8)


@pytest.mark.parametrize("side", [similarity.MS_SSIM_SMALLEST_SIDE, 203])
def test_similarities_are_torchmetrics(side):
    from torchmetrics.functional.image import (
        multiscale_structural_similarity_index_measure,
        structural_similarity_index_measure,
    )

    real = torch.from_numpy(textures(0, 2, side))
    # One near, one that has nothing to do with it, so that contrast terms are negative too.
    generated = torch.stack([(real[0].float() * 0.9 + 8).to(torch.uint8), torch.from_numpy(textures(1, 1, side)[0])])
    ours = similarity.ssim_and_ms_ssim(real, generated)
    pair = (generated[:, None].float(), real[:, None].float())
    whole = structural_similarity_index_measure(*pair, data_range=255.0, reduction="none")
    scales = multiscale_structural_similarity_index_measure(*pair, data_range=255.0, reduction="none", normalize="relu")
    np.testing.assert_allclose(ours[0], whole.numpy().ravel(), atol=2e-5)
    np.testing.assert_allclose(ours[1], scales.numpy().ravel(), atol=2e-5)
    np.testing.assert_array_equal(ours[0], similarity.ssim(real, generated))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("seed", "spacing_mm"), [(0, (1.5, 1.5)), (1, (1.0, 2.7)), (2, (3.1, 0.8))])
def test_surface_dice_is_monais(seed, spacing_mm):
    reference, predicted, organs = blobs(seed), np.roll(blobs(seed), (1, 2), (0, 1)), (1, 2, 3, 4)
    reference[reference == 3] = 0
    predicted[predicted == 4] = 0
    tolerance_mm = (3.2, 4.0, 5.0, 5.0)
    ours = surfaces.surface_dice(reference, predicted, organs, tolerance_mm, spacing_mm)
    one_hot = [torch.from_numpy(np.stack([labels == o for o in organs])[None]) for labels in (predicted, reference)]
    theirs = compute_surface_dice(*one_hot, list(tolerance_mm), include_background=True, spacing=list(spacing_mm))
    np.testing.assert_allclose(ours[:2], theirs[0, :2].numpy(), rtol=1e-6)
    assert 0 < ours[0] < 1
    # Absent from the reference: no figure (MONAI gives 0). Absent from the prediction: 0.
    assert np.isnan(ours[2])
    assert ours[3] == theirs[0, 3] == 0


def test_kernel_distance_is_torchmetrics_kid_over_all_pairs():
    from torchmetrics.image.kid import poly_mmd

    rng = np.random.default_rng(0)
    real, gen = rng.normal(size=(40, 16)), rng.normal(size=(40, 16)) * 1.2 + 0.3
    theirs = poly_mmd(torch.from_numpy(real), torch.from_numpy(gen))
    assert feature_sets.kernel_distance(real, gen) == pytest.approx(float(theirs), rel=1e-9)


@pytest.mark.parametrize("sizes", [(60, 60), (45, 1100)])  # the second needs more than one block
def test_neighbourhoods_by_scikit_learns_neighbours(sizes):
    from sklearn.metrics import pairwise_distances
    from sklearn.neighbors import NearestNeighbors

    rng = np.random.default_rng(1)
    # A large offset, where single precision would lose the differences.
    real, gen = (rng.normal(size=(n, 6)) + 1000 + shift for n, shift in zip(sizes, (0.0, 0.5), strict=True))

    def radius(features: np.ndarray, k: int) -> np.ndarray:
        return NearestNeighbors(n_neighbors=k + 1).fit(features).kneighbors(features)[0][:, k]

    apart = pairwise_distances(real, gen)
    inside = apart <= radius(real, 5)[:, None]
    found = feature_sets.neighbourhoods(real, gen)
    assert found.precision == pytest.approx((apart <= radius(real, 3)[:, None]).any(axis=0).mean(), abs=2e-3)
    assert found.recall == pytest.approx((apart <= radius(gen, 3)).any(axis=1).mean(), abs=2e-3)
    assert found.density == pytest.approx(inside.sum() / (5 * sizes[1]), rel=1e-2)
    assert found.coverage == pytest.approx(inside.any(axis=1).mean(), abs=2e-3)
    swapped, index = feature_sets.nearest(gen, real)
    np.testing.assert_array_equal(index, apart.argmin(axis=0))
    np.testing.assert_allclose(swapped, apart.min(axis=0), rtol=1e-4)


def test_distances_are_torch_fidelitys():
    pytest.importorskip("torch_fidelity")
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    rng = np.random.default_rng(2)
    real, gen = (torch.from_numpy(rng.normal(size=(80, 8)) + shift).float() for shift in (0.0, 0.4))
    theirs = fid_statistics_to_metric(*(fid_features_to_statistics(side) for side in (real, gen)), verbose=False)
    statistics = [frechet.FeatureStatistics.of(side.numpy()) for side in (real, gen)]
    assert frechet.frechet_distance(*statistics) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    theirs = kid_features_to_metric(real, gen, kid_subsets=1, kid_subset_size=80, verbose=False)
    ours = feature_sets.kernel_distance(real.numpy(), gen.numpy())
    assert ours == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)
    # Its first input is the generated set.
    theirs = prc_features_to_metric(gen, real, prc_neighborhood=3, prc_batch_size=100, save_cpu_ram=True, verbose=False)
    found = feature_sets.neighbourhoods(real.numpy(), gen.numpy())
    assert found.precision == pytest.approx(theirs["precision"])
    assert found.recall == pytest.approx(theirs["recall"])
    assert found.precision != found.recall


def test_lpips_is_torchmetrics(tmp_path: Path):
    pytest.importorskip("lpips")
    torchvision = pytest.importorskip("torchvision")
    from torchmetrics.functional.image import lpips as theirs

    # No pretrained weights needed: the same random AlexNet on both sides.
    torch.manual_seed(0)
    alexnet = torchvision.models.alexnet()
    torch.save(alexnet.state_dict(), tmp_path / "alexnet.pth")
    network = theirs._LPIPS(net="alex", pnet_rand=True)
    network.net.load_state_dict(
        {name: alexnet.state_dict()[f"features.{name.split('.', 1)[1]}"] for name in network.net.state_dict()}
    )
    real, generated = (torch.from_numpy(textures(seed, 3, 64)) for seed in (0, 1))
    ours = perceptual.load_lpips(str(tmp_path / "alexnet.pth"), "cpu")(real, generated)
    rgb = [(images[:, None].float() / 127.5 - 1).expand(-1, 3, -1, -1) for images in (real, generated)]
    np.testing.assert_allclose(ours, network(*rgb).flatten().numpy(), rtol=1e-5)
    assert (ours > 0).all()


@pytest.mark.filterwarnings("ignore")
def test_frd_is_frd_scores(tmp_path: Path, capsys):
    frd_score = pytest.importorskip("frd_score")
    pytest.importorskip("radiomics")
    from PIL import Image

    sides = [textures(seed, 5, 40) for seed in (0, 1)]
    for name, images in zip(("real", "gen"), sides, strict=True):
        (tmp_path / name).mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / name / f"{i}.png")
    theirs = frd_score.compute_frd([str(tmp_path / "real"), str(tmp_path / "gen")], num_workers=1)
    extract = radiomics.load_extractor()
    statistics = [frechet.FeatureStatistics.of(extract(images)) for images in sides]
    assert radiomics.frd(*statistics) == pytest.approx(theirs, abs=1e-3)
