"""Copies of training images that training's own augmentation could have made are found; unseen images are not."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import ndimage

from data_shards.phantom.case import make_case
from data_shards.phantom.config import CaseKey, PhantomConfig
from segdiff_dist.evaluation.measure import copies, trust

SIDE, NUM_TRAINING, NUM_COPIED, NUM_UNSEEN = 48, 40, 12, 40
# Of phantom patients: slices of 64 pixels, of which training cuts out 40.
STORED, CROP, SLICES_A_PATIENT, NUM_CROPPED = 64, 40, 4, 24
# What the stated rate is of: docs/metrics.md.
RATE, FALSE_ALARMS = 0.9, 0.03
_CENTRE = (SIDE - 1) / 2


def body(seed: int) -> np.ndarray:
    """A round body of one outline with organs at its own places, uint8 [48, 48]: alike from afar, as slices are."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    image = 90.0 * (((rows - _CENTRE) / 20) ** 2 + ((columns - _CENTRE) / 22) ** 2 < 1)
    for _ in range(7):
        y, x = _CENTRE + random.uniform(-12, 12, 2)
        image += random.uniform(-70, 120) * np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / random.uniform(10, 50))
    return image.clip(0, 255).astype(np.uint8)


def turned(image: np.ndarray, degrees: float) -> np.ndarray:
    return np.asarray(ndimage.rotate(image.astype(float), degrees, reshape=False, order=1))


CHANGES = {
    "exact": lambda x: x,
    "mirrored": lambda x: x[:, ::-1],
    "turned by 5": lambda x: turned(x, 5),
    "turned by 10": lambda x: turned(x, -10),
    "turned by 15": lambda x: turned(x, 15),
    "mirrored and turned": lambda x: turned(x[:, ::-1], 10),
    "shifted": lambda x: ndimage.shift(x.astype(float), (2, -2), order=1),
    "scaled": lambda x: ndimage.affine_transform(x.astype(float), [0.9] * 2, offset=(len(x) - 1) / 2 * 0.1, order=1),
    "brighter": lambda x: 0.7 * x + 30,
    "with noise": lambda x: x + np.random.default_rng(5).normal(0, 10, x.shape),
}


# Also for images that were cut out of a slice.
CROPPED_CHANGES = ("exact", "mirrored", "turned by 10", "mirrored and turned", "brighter")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Distances and rows, of planted copies by change (`gen`) and of unseen images (`real`)."""
    training = np.stack([body(seed) for seed in range(NUM_TRAINING)])
    planted = [change(image) for change in CHANGES.values() for image in training[:NUM_COPIED]]
    unseen = [body(1000 + seed) for seed in range(NUM_UNSEEN)]
    return search(training, planted, unseen, {"rotate_degrees": 10, "zoom": 0.1}, tmp_path_factory.mktemp("copies"))


@pytest.fixture(scope="module")
def found_cropped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same of phantom patients' slices, from which training cuts images at random places. `gen`: copies by change,
    then images of patients that are neither in training nor among `real`."""
    seen, unseen, others = (phantom_slices(patients) for patients in (range(16), range(16, 40), range(40, 60)))
    random = np.random.default_rng(0)
    planted = [cropped(CHANGES[change](image), random) for change in CROPPED_CHANGES for image in seen[:NUM_CROPPED]]
    planted += [cropped(image, random) for image in others]
    loader = {"crop": "random", "crop_size": CROP}
    folder = tmp_path_factory.mktemp("cropped")
    return search(seen, planted, [cropped(image, random) for image in unseen], loader, folder)


def search(
    training: np.ndarray, planted: list[np.ndarray], unseen: list[np.ndarray], loader: dict[str, Any], folder: Path
) -> dict[str, Any]:
    """As evaluation searches, the training set in two parts."""
    sides = {"gen": np.stack(planted).clip(0, 255).round().astype(np.uint8), "real": np.stack(unseen)}
    file = folder / "queries.npz"
    np.savez(file, **{f"pixels_{side}": trust.downscaled(images) for side, images in sides.items()})
    evaluator: Any = SimpleNamespace(
        store=SimpleNamespace(image=sides["real"]),
        shards=SimpleNamespace(read=lambda row: SimpleNamespace(image_uint8=lambda: training[row])),
    )
    ranges = copies.Ranges.of(loader)
    tasks = [copies.CopyCandidates(file, tuple(range(i, len(training), 2)), ranges) for i in (0, 1)]
    candidates = copies.best_candidates(task.run(evaluator) for task in tasks)
    return {side: copies.NearestCopy(file, side, 0, *candidates[side]).run(evaluator) for side in sides}


def phantom_slices(patients: range) -> np.ndarray:
    """Some axial CT slices of each patient, uint8 [N, 64, 64]."""
    config = PhantomConfig(matrix=(STORED, STORED), slice_thickness_mm=(12.0, 12.0))
    slices = []
    for index in patients:
        volume = make_case(CaseKey("CT", "train", index, index + 1), config).image
        chosen = np.linspace(3, volume.shape[2] - 4, SLICES_A_PATIENT).astype(int)
        slices.append((volume[:, :, chosen].T.clip(-160, 240) + 160.0) / 400 * 255)
    return np.concatenate(slices).astype(np.uint8)


def cropped(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A square of 40 pixels at any place."""
    top, left = random.integers(0, STORED - CROP + 1, 2)
    return image[top : top + CROP, left : left + CROP]


def limit(found: dict[str, Any]) -> float:
    return 0.9 * float(np.quantile(found["real"][0], 0.01))


@pytest.mark.parametrize("change", CHANGES)
def test_planted_copies_are_found(found, change: str):
    start = list(CHANGES).index(change) * NUM_COPIED
    distance_Q, row_Q = (values[start : start + NUM_COPIED] for values in found["gen"])
    assert (distance_Q <= limit(found)).mean() >= RATE
    assert (row_Q == np.arange(NUM_COPIED)).mean() >= RATE


@pytest.mark.parametrize("change", CROPPED_CHANGES)
def test_copies_that_were_cut_out_anywhere_are_found(found_cropped, change: str):
    start = CROPPED_CHANGES.index(change) * NUM_CROPPED
    distance_Q, row_Q = (values[start : start + NUM_CROPPED] for values in found_cropped["gen"])
    assert (distance_Q <= limit(found_cropped)).mean() >= RATE
    assert (row_Q == np.arange(NUM_CROPPED)).mean() >= RATE


def test_images_of_other_patients_are_no_copies(found_cropped):
    distance_Q, _ = (values[len(CROPPED_CHANGES) * NUM_CROPPED :] for values in found_cropped["gen"])
    assert len(distance_Q) == 20 * SLICES_A_PATIENT
    assert (distance_Q <= limit(found_cropped)).mean() <= FALSE_ALARMS


def test_an_exact_and_a_mirrored_copy_are_at_no_distance(found):
    assert found["gen"][0][: 2 * NUM_COPIED].max() < 0.02


def test_unseen_images_are_no_copies(found, tmp_path: Path):
    assert (found["real"][0] <= limit(found)).mean() <= 0.01


def test_any_order_of_the_parts_gives_the_same():
    random = np.random.default_rng(0)
    parts = [
        {
            "gen": (
                random.normal(size=(3, 4)).round(1),
                random.integers(0, 99, (3, 4)),
                random.normal(size=(3, 4, 5)).astype(np.float32),
            )
        }
        for _ in range(3)
    ]
    first, second = (copies.best_candidates(order)["gen"] for order in (parts, parts[::-1]))
    assert all((one == other).all() for one, other in zip(first, second, strict=True))


def test_the_trainings_ranges_are_searched():
    assert copies.Ranges.of({}) == copies.Ranges(15.0, 0.15, anywhere=False)
    wide = copies.Ranges.of({"rotate_degrees": 30, "zoom": 0.3})
    assert (wide.angle, wide.zoom) == (30, 0.3)
    variants = wide.variants()
    assert np.rad2deg(variants[:, 1].max()) == pytest.approx(30)
    assert variants[:, 2].min() == pytest.approx(0.7)


def test_places_are_those_that_training_cut_at():
    # One place of a sixteenth of the side more on either side: 0.3 of the side either way is five sixteenths.
    assert copies.Ranges.of({"crop": "random"}).num_places(room=0.6) == 2 * (5 + 1) + 1
    assert copies.Ranges.of({"crop": "centre"}).num_places(room=0.6) == 3
    assert copies.Ranges.of({"crop": "random"}).num_places(room=0.0) == 3
    # A run whose configuration is not there may have cropped anywhere.
    assert copies.Ranges.of(None).anywhere
