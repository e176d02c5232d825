"""Distances between sets of features, against known answers and other people's implementations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from evaluation_support import random_images
from hypothesis import given, settings
from hypothesis import strategies as st

from segdiff_dist.evaluation.metrics import (
    distances,
    feature_sets,
    frechet,
    radiomics,
)


class _Pool(torch.nn.Module):
    """A small extractor that torchmetrics' FID accepts: block means of each channel, 48 features."""

    num_features = 48

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), 4).flatten(1)


class TestFrechet:
    @pytest.mark.parametrize("num_samples", [200, 20])  # more and fewer samples than features
    def test_agrees_with_torchmetrics_fid(self, num_samples):
        from torchmetrics.image.fid import FrechetInceptionDistance

        from segdiff_dist.evaluation.metrics.inception import grey_extractor

        real, generated = (torch.from_numpy(random_images(seed, (num_samples, 32, 32))) for seed in (0, 1))
        theirs = FrechetInceptionDistance(feature=_Pool()).set_dtype(torch.float64)
        for images, is_real in ((real, True), (generated, False)):
            theirs.update(images[:, None].expand(-1, 3, -1, -1), real=is_real)
        extract = grey_extractor(_Pool())
        modality = torch.zeros(num_samples, dtype=torch.int64)
        ours = frechet.frechet_distance(
            *(frechet.FeatureStatistics.of(extract(images, modality).numpy()) for images in (real, generated))
        )
        assert ours == pytest.approx(float(theirs.compute()), rel=1e-3, abs=1e-4)

    def test_known_answer(self):
        """Diagonal Gaussians: |m1 - m2|^2 + sum (s1 - s2)^2."""
        means, spreads = np.array([[0.0, 1.0], [3.0, 1.0]]), np.array([[1.0, 2.0], [2.0, 5.0]])
        first, second = (
            frechet.FeatureStatistics(101, mean, np.diag(spread**2) * 100)
            for mean, spread in zip(means, spreads, strict=True)
        )
        assert frechet.frechet_distance(first, second) == pytest.approx(9 + 1 + 9)

    def test_nothing_between_a_set_and_itself(self):
        statistics = frechet.FeatureStatistics.of(np.random.default_rng(0).normal(size=(10, 64)) * 50 + 1e4)
        assert frechet.frechet_distance(statistics, statistics) == pytest.approx(0, abs=1e-6)

    def test_constant_features(self):
        same, shifted = (frechet.FeatureStatistics.of(np.full((4, 3), value)) for value in (1.0, 3.0))
        assert frechet.frechet_distance(same, shifted) == pytest.approx(12.0)

    def test_symmetric(self):
        rng = np.random.default_rng(1)
        first, second = (frechet.FeatureStatistics.of(rng.normal(size=(n, 30)) + n) for n in (12, 90))
        assert frechet.frechet_distance(first, second) == pytest.approx(frechet.frechet_distance(second, first))

    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(0, 2**32 - 1))
    def test_parts_merge_to_the_whole(self, sizes, seed):
        parts = [np.random.default_rng([seed, i]).normal(size=(n, 4)) for i, n in enumerate(sizes)]
        merged = frechet.FeatureStatistics.empty(4)
        for part in parts:
            merged = merged.merge(frechet.FeatureStatistics.of(part))
        whole = frechet.FeatureStatistics.of(np.concatenate(parts))
        assert merged.count == whole.count
        np.testing.assert_allclose(merged.mean_D, whole.mean_D, atol=1e-12)
        np.testing.assert_allclose(merged.scatter_DD, whole.scatter_DD, atol=1e-10)

    def test_a_small_spread_around_a_large_mean_survives(self):
        features = np.random.default_rng(2).normal(size=(1000, 3)) * 1e-3 + 1e6
        merged = frechet.FeatureStatistics.of(features[:300]).merge(frechet.FeatureStatistics.of(features[300:]))
        np.testing.assert_allclose(merged.covariance_DD, np.cov(features.T), rtol=1e-3, atol=1e-9)

    def test_a_stream_in_small_parts_is_the_whole(self):
        features = np.random.default_rng(3).normal(size=(1300, 5)) + 100
        moments = distances.Moments(5)
        for part in np.split(features, np.arange(17, 1300, 17)):
            moments.add(part)
        half_way = moments.statistics  # may be asked for at any time
        moments.add(features)
        assert (half_way.count, moments.statistics.count) == (1300, 2600)
        np.testing.assert_allclose(half_way.covariance_DD, np.cov(features.T), rtol=1e-10)
        np.testing.assert_allclose(moments.statistics.mean_D, features.mean(axis=0), rtol=1e-12)


class TestFeatureSample:
    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.integers(1, 12), min_size=1, max_size=8), st.randoms(use_true_random=False))
    def test_order_and_parts_do_not_matter(self, sizes, random):
        num = sum(sizes)
        priority = np.array(random.sample(range(1000), num))
        features = np.random.default_rng(num).normal(size=(num, 2)).astype(np.float32)
        kept = features[np.argsort(priority)[:5]]
        parts = np.split(np.arange(num), np.cumsum(sizes)[:-1])
        random.shuffle(parts)
        one, two = (feature_sets.FeatureSample(5) for _ in range(2))
        for i, part in enumerate(parts):
            (one if i % 2 else two).add(priority[part], features[part], part)
        merged = one.merge([two])
        np.testing.assert_array_equal(merged.features_ND, kept)
        np.testing.assert_array_equal(merged.patient_N, np.argsort(priority)[:5])

    def test_memory_is_bounded(self):
        sample = feature_sets.FeatureSample(10)
        for start in range(0, 1000, 8):
            sample.add(np.arange(start, start + 8), np.zeros((8, 3)), np.zeros(8, np.int64))
            assert sample.num_held <= 20
        assert len(sample) == 10


class TestNeighbourhoods:
    def test_known_answer(self):
        """Real images on a line one apart; generated ones on top of one of them, and one far away."""
        real, gen = np.arange(10.0)[:, None], np.array([[0.0]] * 5 + [[100.0]])
        found = feature_sets.neighbourhoods(real, gen)
        assert found.precision == pytest.approx(5 / 6)
        # The balls around the five coincident images have no extent; that around 100 reaches to them.
        assert found.recall == 1.0
        # Zero lies in the balls of 0 to 3, whose 5th neighbours are 5, 4, 3 and 3 away.
        assert found.density == pytest.approx(5 * 4 / (5 * 6))
        assert found.coverage == pytest.approx(4 / 10)

    def test_slices_of_a_patient_are_no_neighbours_of_each_other(self):
        """Patients at 0, 10 and 20 on a line, slices 0.1 apart; generated ones are 2 away from them."""
        patient = np.repeat([0, 1, 2], 4)
        real = (10.0 * patient + 0.1 * np.tile(range(4), 3))[:, None]
        gen = real + 2.0
        assert feature_sets.neighbourhoods(real, gen).precision == 0
        found = feature_sets.patient_neighbourhoods(real, patient, gen, patient)
        assert (found.patient_precision, found.patient_recall) == (1, 1)
        far = feature_sets.patient_neighbourhoods(real, patient, real + 100.0, patient)
        assert (far.patient_precision, far.patient_recall) == (0, 0)
        # The third nearest slice of another patient: 10 - 0.1 from the last slice of patient 0, so up to 10.2.
        at = [feature_sets.patient_neighbourhoods(real, patient, real - x, patient).patient_precision for x in (9, 11)]
        assert at == [1, pytest.approx(8 / 12)]

    def test_one_patient_has_no_neighbours(self):
        real, patient = np.arange(8.0)[:, None], np.repeat([0, 1], 4)
        assert feature_sets.patient_neighbourhoods(real, patient, real, np.zeros(8)) is None
        assert feature_sets.patient_neighbourhoods(real[:6], patient[:6], real, patient) is None

    def test_a_set_and_itself(self):
        features = np.random.default_rng(0).normal(size=(40, 4))
        found = feature_sets.neighbourhoods(features, features)
        assert (found.precision, found.recall, found.coverage) == (1.0, 1.0, 1.0)
        assert feature_sets.kernel_distance(features, features) < 0  # unbiased: its own pairs count on one side only

    def test_kernel_distance_over_several_blocks_of_rows(self):
        real, gen = (np.random.default_rng(i).normal(size=(n, 6)) + i for i, n in ((0, 2100), (1, 1500)))

        def kernel(x, y):
            return (x @ y.T / 6 + 1) ** 3

        within = [(kernel(x, x).sum() - np.trace(kernel(x, x))) / (len(x) * (len(x) - 1)) for x in (real, gen)]
        assert feature_sets.kernel_distance(real, gen) == pytest.approx(sum(within) - 2 * kernel(real, gen).mean())

    def test_nearest_skips_itself(self):
        features = np.array([[0.0], [1.0], [5.0]])
        distance, index = feature_sets.nearest(features, features, skip_self=True)
        np.testing.assert_allclose(distance, [1, 1, 4])
        np.testing.assert_array_equal(index, [1, 0, 1])


class TestRadiomicsDistance:
    def test_does_not_depend_on_a_features_unit(self):
        rng = np.random.default_rng(0)
        real, gen = rng.normal(size=(50, 3)), rng.normal(size=(60, 3)) + 0.5
        plain, scaled = (
            radiomics.frd(*(frechet.FeatureStatistics.of(side * unit + 7) for side in (real, gen)))
            for unit in (np.ones(3), np.array([1e-3, 1.0, 1e4]))
        )
        assert plain == pytest.approx(scaled, rel=1e-6)

    def test_constant_features_and_equal_sets(self):
        same = frechet.FeatureStatistics.of(np.full((4, 2), 3.0))
        assert radiomics.frd(same, same) is None
