"""Metrics of label maps and images against known answers and other people's implementations; intervals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from evaluation_support import random_images
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from data_shards.labels import LABEL_TABLES
from segdiff_dist.evaluation.metrics import (
    estimates,
    overlaps,
    similarity,
    surfaces,
)

NUM_CLASSES = 5
ORGANS = (1, 2, 3)  # 4 stands for body

label_pairs = hnp.arrays(
    np.uint8, st.tuples(st.just(2), st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)), elements=st.integers(0, 4)
)


def one_hot(labels_BHW: np.ndarray) -> torch.Tensor:
    encoded = torch.nn.functional.one_hot(torch.from_numpy(labels_BHW).long(), NUM_CLASSES)
    return encoded.permute(0, 3, 1, 2).float()


def random_labels(seed: int, shape: tuple[int, ...] = (4, 24, 24)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, NUM_CLASSES, shape).astype(np.uint8)


class TestDice:
    def test_known_answer(self):
        reference = np.array([[[1, 1, 2, 0]]], np.uint8)
        predicted = np.array([[[1, 0, 2, 3]]], np.uint8)
        dice = overlaps.dice_per_class(overlaps.confusion(reference, predicted, NUM_CLASSES))
        # Background: one pixel of the reference, missed. Id 3: a stray pixel of an absent organ has no Dice.
        np.testing.assert_allclose(dice[0], [0.0, 2 / 3, 1.0, np.nan, np.nan])
        assert overlaps.mean_dice(dice, ORGANS)[0] == pytest.approx(5 / 6)

    def test_body_and_background_do_not_count_as_organs(self):
        reference = np.full((1, 4, 4), 4, np.uint8)
        dice = overlaps.dice_per_class(overlaps.confusion(reference, reference, NUM_CLASSES))
        assert dice[0, 4] == 1.0
        assert np.isnan(overlaps.mean_dice(dice, ORGANS)[0])

    def test_ids_outside_the_table_are_refused(self):
        with pytest.raises(ValueError, match="id 7 is outside"):
            overlaps.confusion(np.zeros((1, 2, 2), np.uint8), np.full((1, 2, 2), 7, np.uint8), NUM_CLASSES)

    def test_shapes_must_agree(self):
        with pytest.raises(ValueError, match="differ in shape"):
            overlaps.confusion(np.zeros((1, 2, 2), np.uint8), np.zeros((1, 2, 3), np.uint8), NUM_CLASSES)

    @pytest.mark.parametrize("seed", range(3))
    def test_agrees_with_monai(self, seed):
        from monai.metrics import DiceMetric

        reference, predicted = random_labels(seed), random_labels(seed + 100)
        reference[0][reference[0] == 2] = 0  # absent from one reference: NaN in both
        theirs = DiceMetric(include_background=True, ignore_empty=True)(one_hot(predicted), one_hot(reference))
        ours = overlaps.dice_per_class(overlaps.confusion(reference, predicted, NUM_CLASSES))
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6)
        assert np.isnan(ours[0, 2])

    @settings(max_examples=50, deadline=None)
    @given(label_pairs)
    def test_bounds_and_identity(self, pair):
        reference, predicted = pair
        counts = overlaps.confusion(reference, predicted, NUM_CLASSES)
        assert counts.sum() == reference.size
        dice = overlaps.dice_per_class(counts)
        assert ((dice >= 0) & (dice <= 1) | np.isnan(dice)).all()
        of_itself = overlaps.confusion(reference, reference, NUM_CLASSES)
        itself = overlaps.mean_dice(overlaps.dice_per_class(of_itself), ORGANS)
        has_organ = np.isin(reference, ORGANS).any(axis=(1, 2))
        np.testing.assert_array_equal(itself, np.where(has_organ, 1.0, np.nan))

    @pytest.mark.parametrize("seed", range(3))
    def test_a_sample_does_not_depend_on_its_batch(self, seed):
        reference, predicted = random_labels(seed), random_labels(seed + 7)
        together = overlaps.confusion(reference, predicted, NUM_CLASSES)
        alone = [overlaps.confusion(r[None], p[None], NUM_CLASSES) for r, p in zip(reference, predicted, strict=True)]
        np.testing.assert_array_equal(together, np.concatenate(alone))


class TestAreaError:
    def test_known_answer(self):
        reference = np.array([[[1, 1, 2, 0, 0]]], np.uint8)
        predicted = np.array([[[1, 0, 2, 2, 3]]], np.uint8)
        errors = overlaps.area_errors(overlaps.confusion(reference, predicted, NUM_CLASSES))
        # Id 1 at half its area, id 2 at twice its; id 3 is not in the reference.
        np.testing.assert_allclose(errors[0, 1:], [0.5, 1.0, np.nan, np.nan])
        assert overlaps.mean_over_organs(errors, ORGANS)[0] == pytest.approx(0.75)


class TestSurfaceDice:
    square = np.zeros((20, 20), np.uint8)
    square[5:15, 5:15] = 1

    def dice(self, predicted: np.ndarray, tolerance_mm: float, spacing_mm: tuple[float, float] = (1.0, 1.0)) -> float:
        return surfaces.surface_dice(self.square, predicted, (1,), (tolerance_mm,), spacing_mm)[0]

    def test_a_shift_within_the_tolerance_costs_nothing(self):
        shifted = np.roll(self.square, 2, 1)
        assert self.dice(shifted, 2.0) == 1.0
        # The two sides that moved lie beyond a smaller one; those along the shift, most of them, do not.
        assert 0.5 < self.dice(shifted, 1.0) < 0.8

    def test_tolerance_and_spacing_are_in_mm(self):
        shifted = np.roll(self.square, 1, 1)
        assert self.dice(shifted, 3.0, (1.0, 3.0)) == 1.0
        assert self.dice(np.roll(self.square, 3, 0), 3.0, (3.0, 1.0)) < 1.0

    def test_less_than_a_pixel_counts_as_one(self):
        assert self.dice(np.roll(self.square, 1, 0), 2.0, (4.0, 4.0)) == 1.0

    def test_every_organ_has_a_tolerance(self):
        for table in LABEL_TABLES.values():
            found = surfaces.tolerances_mm(table)
            assert len(found) == len(table.organ_ids)
            assert (found["liver"], found["sacrum" if "sacrum" in found else "urinary_bladder"]) == (5.0, 3.0)


class TestLegacyDice:
    @pytest.mark.parametrize("seed", range(3))
    def test_is_one_minus_monais_dice_loss(self, seed):
        from monai.losses import DiceLoss

        reference, predicted = random_labels(seed), random_labels(seed + 50)
        reference[reference == 3], predicted[predicted == 3] = 0, 0  # absent from both: counts 1
        predicted[1, 0, 0] = 3  # one stray pixel: counts about 0
        loss = DiceLoss(include_background=True, reduction="none")(one_hot(predicted), one_hot(reference))
        ours = overlaps.legacy_dice(overlaps.confusion(reference, predicted, NUM_CLASSES))
        np.testing.assert_allclose(ours, 1 - loss.flatten(1).mean(dim=1).numpy(), rtol=1e-5)

    def test_flatters_where_most_classes_are_absent(self):
        """15 classes of 73 at Dice 0.635 and no stray pixel give the 0.925 that the paper reports."""
        num_classes, overlap, size = 73, 635, 1000
        counts = np.zeros((1, num_classes, num_classes), np.int64)
        for label_id in range(15):
            counts[0, label_id, label_id] = overlap
            counts[0, label_id, (label_id + 1) % 15] = size - overlap
        assert overlaps.legacy_dice(counts)[0] == pytest.approx(0.925, abs=1e-3)
        assert np.nanmean(overlaps.dice_per_class(counts)) == pytest.approx(0.635)


class TestImageMetrics:
    def test_psnr_known_answer(self):
        real = torch.full((1, 16, 16), 100, dtype=torch.uint8)
        # A constant difference of 10: 20 log10(255 / 10).
        assert similarity.psnr_db(real, real + 10)[0] == pytest.approx(28.1308, abs=1e-4)
        assert np.isinf(similarity.psnr_db(real, real)[0])

    def test_psnr_and_ssim_agree_with_skimage(self):
        from skimage.metrics import peak_signal_noise_ratio, structural_similarity

        real, generated = random_images(0), random_images(1)
        psnr = similarity.psnr_db(torch.from_numpy(real), torch.from_numpy(generated))
        ssim = similarity.ssim(torch.from_numpy(real), torch.from_numpy(generated))
        # skimage leaves out pixels whose window reaches over the border; torchmetrics reflects the image there instead.
        beyond = [np.pad(images, ((0, 0), (5, 5), (5, 5)), mode="reflect") for images in (real, generated)]
        gaussian = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
        for i in range(len(real)):
            assert psnr[i] == pytest.approx(peak_signal_noise_ratio(real[i], generated[i], data_range=255), rel=1e-6)
            assert ssim[i] == pytest.approx(structural_similarity(beyond[0][i], beyond[1][i], **gaussian), abs=1e-5)

    def test_what_is_not_8_bit_is_refused(self):
        images = torch.from_numpy(random_images(0))
        broken = images.float()
        broken[0, 0, 0] = float("nan")
        with pytest.raises(ValueError, match=r"generated_BHW: torch.float32; give uint8"):
            similarity.psnr_db(images, broken)
        with pytest.raises(ValueError, match=r"real_BHW: torch.float32"):
            similarity.ssim(broken, images)
        with pytest.raises(ValueError, match="is not real_BHW's"):
            similarity.ssim(images, images[:2])
        with pytest.raises(ValueError, match="MS-SSIM needs 176"):
            similarity.ssim_and_ms_ssim(images, images)

    def test_one_window_for_both_images(self):
        """A dark image is not stretched: the same difference costs the same wherever it lies."""
        dark, bright = (torch.full((1, 16, 16), value, dtype=torch.uint8) for value in (10, 200))
        assert similarity.psnr_db(dark, dark + 20)[0] == pytest.approx(similarity.psnr_db(bright, bright + 20)[0])

    def test_ssim_of_an_image_with_itself_is_one(self):
        images = torch.from_numpy(random_images(4))
        np.testing.assert_allclose(similarity.ssim(images, images), 1.0, atol=1e-6)

    def test_pixel_std_counts_the_patient_only(self):
        images = np.zeros((2, 2, 2), np.uint8)
        images[1] = [[0, 10], [0, 200]]
        mask = np.array([[4, 1], [0, 0]], np.uint8)
        # Two values 0 and 10 have the standard deviation 7.07 (n - 1); the other pixel of the patient does not vary.
        assert similarity.pixel_std(images, mask) == pytest.approx(10 / np.sqrt(2) / 2)
        assert np.isnan(similarity.pixel_std(images, np.zeros((2, 2), np.uint8)))


class TestEstimate:
    patients = np.repeat(["a", "b", "c", "d"], 25)

    def test_mean_n_and_what_is_left_out(self):
        values = np.array([1.0, 3.0, np.nan, np.inf])
        found = estimates.estimate(values, np.array(["a", "b", "a", "c"]), resamples=100, seed=0)
        assert found is not None
        assert (found.value, found.num_samples, found.num_patients) == (2.0, 2, 2)

    def test_interval_is_over_patients_not_slices(self):
        """25 equal slices of each of 4 patients tell no more than one slice of each."""
        values = np.repeat([0.2, 0.4, 0.6, 0.8], 25)
        many = estimates.estimate(values, self.patients, resamples=2000, seed=0)
        single = estimates.estimate(values[::25], self.patients[::25], resamples=2000, seed=0)
        assert many is not None
        assert single is not None
        assert many.interval == pytest.approx(single.interval)
        assert many.interval[1] - many.interval[0] > 0.35  # slices as units would give 0.09

    def test_matches_a_plain_loop(self):
        rng = np.random.default_rng(5)
        values = rng.normal(size=100)
        draws = []
        for _ in range(4000):
            chosen = rng.choice(["a", "b", "c", "d"], 4)
            draws.append(np.concatenate([values[self.patients == patient] for patient in chosen]).mean())
        found = estimates.estimate(values, self.patients, resamples=4000, seed=1)
        assert found is not None
        assert found.interval == pytest.approx(np.percentile(draws, (2.5, 97.5)), abs=0.02)

    def test_seeded(self):
        values = np.random.default_rng(0).normal(size=100)
        runs = [estimates.estimate(values, self.patients, resamples=200, seed=seed) for seed in (3, 3, 4)]
        assert runs[0] == runs[1] != runs[2]

    def test_one_patient_has_no_interval(self):
        found = estimates.estimate(np.array([1.0, 2.0]), np.array(["a", "a"]), resamples=10, seed=0)
        assert found is not None
        assert found.interval is None

    def test_nothing_finite(self):
        assert estimates.estimate(np.array([np.nan]), np.array(["a"]), resamples=10, seed=0) is None
