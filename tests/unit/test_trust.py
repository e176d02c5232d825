"""Copies of training images, spread within a mask and leaked patients are found; on real engines, without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from evaluation_support import items_of
from tests_support import write_shapes

from data_shards.labels import AMOS
from data_shards.store.shards import ShardSet
from segdiff_dist.evaluation.measure import trust
from segdiff_dist.evaluation.measure.config import EvaluateConfig
from segdiff_dist.evaluation.measure.memorisation import memorisation_cost, memorisation_search
from segdiff_dist.evaluation.measure.subject import Subject
from segdiff_dist.evaluation.measure.worker import Evaluator, Inputs
from segdiff_dist.sampling.store import SampleStore
from segdiff_dist.segmentation.config import SegmenterConfig
from segdiff_dist.segmentation.network import SegmenterNet
from segdiff_dist.segmentation.segmenter import save_segmenter

NUM_COPIED = 3


def evaluator_of(run: Path, shapes: Path, items: list[dict[str, Any]], images_NHW: np.ndarray) -> Evaluator:
    import zarr

    shards = ShardSet.open(shapes)
    job = {"shards": str(shapes), "shards_digest": shards.digest, "weights_digest": "", "region_size": len(items)}
    store = SampleStore.create(run / "samples", job, pa.Table.from_pylist(items), shards.size)
    store.write_region(0, images_NHW, np.stack([shards.read(item["row"]).mask_HW for item in items]))
    config = SegmenterConfig(channels=(8, 8, 8))
    torch.manual_seed(0)
    save_segmenter(run / "segmenter", SegmenterNet(config, AMOS.num_classes).state_dict(), config, AMOS)
    zarr.create_group(run / "predictions.zarr")
    return Evaluator(
        Inputs(
            samples=run / "samples",
            shards=str(shapes),
            segmenter=run / "segmenter",
            predictions=run / "predictions.zarr",
            fid_weights=None,
            lpips_weights=None,
            radiomics_items=frozenset(),
            surface_dice=False,
            batch_size=4,
            device="cpu",
        )
    )


def noisy(shards: ShardSet, rows: list[int], seed: int, spread: float = 15) -> np.ndarray:
    images = np.stack([shards.read(row).image_HW for row in rows])
    return (images + np.random.default_rng(seed).normal(0, spread, images.shape)).clip(0, 255).astype(np.uint8)


def checked(evaluator: Evaluator, folder: Path, most: float) -> dict[str, Any]:
    """The memorisation check of all items, as the job makes it: the training set in parts, in any order."""
    shards, items = evaluator.shards, evaluator.store.items
    ids = list(range(items.num_rows))
    unseen = trust.unseen_rows(items["row"].to_numpy(), shards, seed=0)
    asked = trust.Queries(tuple(ids)).run(evaluator) | trust.UnseenQueries(tuple(unseen)).run(evaluator)
    np.savez(folder / "queries.npz", **{"_".join(key): values for key, values in asked.items()})
    train = shards.select(split="train").tolist()
    parts = [trust.NearestInTraining(folder / "queries.npz", tuple(train[i::3])).run(evaluator) for i in (2, 0, 1)]
    return trust.memorisation(ids, items, shards, trust.nearest_over_parts(parts), most=most, unseen=unseen)


def test_copies_of_training_images_are_found(tmp_path: Path, shapes: Path):
    shards = ShardSet.open(shapes)
    test, train = (shards.select(split=split).tolist() for split in ("test", "train"))
    images = noisy(shards, test, 0)
    # Copies need not be exact: here with a little noise.
    images[:NUM_COPIED] = noisy(shards, train[:NUM_COPIED], 1, spread=2)
    evaluator = evaluator_of(tmp_path, shapes, items_of(shards, test), images)
    found = checked(evaluator, tmp_path, most=0.01)
    suspects = [neighbour for neighbour in found["nearest"] if neighbour["suspect"]]
    assert {suspect["item_id"] for suspect in suspects} == set(range(NUM_COPIED))
    assert found["nearest"][:NUM_COPIED] == suspects
    for suspect in suspects:
        assert suspect["training_key_pixels"] == shards.meta(train[suspect["item_id"]]).key
    assert found["memorised_share"] == pytest.approx(NUM_COPIED / len(test))
    assert found["num_unseen"] == found["false_alarms"]["num_images"] == len(test)
    assert found["false_alarms"]["num_patients"] == len({shards.meta(row).case_id for row in test})
    assert found["false_alarms"]["rate"] < 0.2
    assert not found["passed"]
    summary = {"trust": {"leakage": trust.leakage(evaluator.store.items, shards), "memorisation": found}}
    assert "look like training images, more than 1.0%" in trust.warnings(summary)[-1]
    assert checked(evaluator, tmp_path, most=0.5)["passed"]


def test_copies_are_found_where_masks_are_those_of_training(tmp_path: Path, shapes: Path):
    """Their own slices are what was copied: they are no measure of how near an unseen image comes."""
    shards = ShardSet.open(shapes)
    train = shards.select(split="train").tolist()
    exact = np.stack([shards.read(row).image_HW for row in train])
    copied = checked(evaluator_of(tmp_path / "copied", shapes, items_of(shards, train), exact), tmp_path, most=0.05)
    assert (copied["memorised_share"], copied["passed"]) == (1.0, False)
    others = evaluator_of(tmp_path / "others", shapes, items_of(shards, train), noisy(shards, train, 0, spread=60))
    assert checked(others, tmp_path, most=0.05)["passed"]


def test_what_images_are_held_against_was_not_trained_on(tmp_path: Path, shapes: Path):
    shards = ShardSet.open(shapes)
    train, test = (shards.select(split=split, modalities=["CT"]) for split in ("train", "test"))
    assert trust.unseen_rows(test, shards, seed=0) == test.tolist()
    # Two that training knows are replaced by two of the same modality that it does not know, the others stay.
    mixed = trust.unseen_rows(np.concatenate((train[:2], test[2:])), shards, seed=0)
    assert set(test[2:]) < set(mixed)
    assert len(mixed) == len(test)
    assert not set(mixed) & set(train)
    assert {shards.meta(row).modality for row in mixed} == {"CT"}

    everything = ShardSet.open(write_shapes(tmp_path / "set", num_patients=1, slices=2, held_out=0))
    rows = everything.select(split="train")
    assert trust.unseen_rows(rows, everything, seed=0) == []
    assert "no slice to compare with" in (trust.why_not_checked([0], rows.tolist(), []) or "")


def test_a_copy_is_found_beside_unseen_images_that_have_a_twin_in_training(shapes: Path):
    """The same slice in two splits under two names: the limit is 0, and a copy is not below it."""
    shards = ShardSet.open(shapes)
    rows = shards.select(split="test").tolist()[:4]
    items = pa.Table.from_pylist(items_of(shards, rows))
    sides = {"gen": np.array([0.0, 1.0, 1.0, 1.0]), "real": np.zeros(4)}
    nearest = {(space, side): (d, np.zeros(4, np.int64)) for space in trust.SPACES for side, d in sides.items()}
    assert trust.memorisation(range(4), items, shards, nearest, most=0.05)["num_suspects"] == 1


def test_spread_of_a_mask(tmp_path: Path, shapes: Path):
    shards = ShardSet.open(shapes)
    rows = shards.select(split="test").tolist()[:2]
    items = items_of(shards, rows, seeds=3)
    images = noisy(shards, [item["row"] for item in items], 0)
    images[3:] = images[3]  # all images of the second mask are the same
    evaluator = evaluator_of(tmp_path, shapes, items, images)
    tasks = trust.images_of_masks(evaluator.store.items)
    assert {task.ids for task in tasks} == {(0, 1, 2), (3, 4, 5)}
    differing, same = (task.run(evaluator) for task in sorted(tasks, key=lambda task: task.ids))
    assert 10 < differing.pixel_std < 15
    assert differing.pairwise_ssim < 0.95
    assert differing.pairwise_feature_distance > 0
    assert np.isnan(differing.pairwise_ms_ssim)  # 32 pixels a side
    assert (same.pixel_std, same.pairwise_feature_distance) == (0, 0)
    assert same.pairwise_ssim == pytest.approx(1)


def test_patients_of_the_train_split_are_named(shapes: Path):
    shards = ShardSet.open(shapes)
    apart = pa.Table.from_pylist(items_of(shards, shards.select(split="test").tolist()))
    assert trust.leakage(apart, shards)["patients"] == []
    row = int(shards.select(split="train")[0])
    leaked = trust.leakage(pa.Table.from_pylist(items_of(shards, [row])), shards)
    assert leaked["patients"] == [shards.meta(row).case_id]
    assert "in the train split too" in trust.warnings({"trust": {"leakage": leaked}})[0]


def test_false_alarms_are_counted_on_patients_that_did_not_set_the_limits(tmp_path: Path, shapes: Path):
    """One patient's images are all nearer to training than the others': its own images must not hide that."""
    shards = ShardSet.open(shapes)
    rows = shards.select(split="test").tolist()
    patients = np.array([shards.meta(row).case_id for row in rows])
    far = np.linspace(1.0, 2.0, len(rows))
    real = np.where(patients == patients[0], 0.01, far)
    nearest_by: Any = {(space, side): (real, np.array(rows)) for space in trust.SPACES for side in ("real", "gen")}
    items = pa.Table.from_pylist(items_of(shards, rows))
    found = trust.memorisation(range(len(rows)), items, shards, nearest_by, most=0.05, unseen=rows)["false_alarms"]
    others = [patient for patient in np.unique(patients) if patient != patients[0]]
    assert found["num_patients_with_alarms"] == 1
    assert found["rate"] == pytest.approx((patients == patients[0]).mean())
    assert found["num_patients"] == 1 + len(others)
    one = [row for row, patient in zip(rows, patients, strict=True) if patient == patients[0]]
    alone: Any = {key: (values[: len(one)], rows_of[: len(one)]) for key, (values, rows_of) in nearest_by.items()}
    assert trust.memorisation(range(len(one)), items, shards, alone, most=0.05, unseen=one)["false_alarms"] is None


def test_the_search_is_bounded_and_its_time_is_reported(tmp_path: Path, shapes: Path):
    shards = ShardSet.open(shapes)
    rows = shards.select(split="test").tolist()
    store = evaluator_of(tmp_path, shapes, items_of(shards, rows), noisy(shards, rows, 0)).store
    subject = Subject(store, shards)
    config = EvaluateConfig(memorisation=True, memorisation_images=5)
    ids, training, unseen = memorisation_search(config, subject, shards)
    assert (len(ids), len(unseen)) == (5, 5)
    assert training == shards.select(split="train", labelled_only=False).tolist()
    cost = memorisation_cost(tmp_path, config, subject)
    assert cost is not None
    assert cost[0].startswith("5 images and 5 unseen real ones against")
    more = memorisation_cost(tmp_path, EvaluateConfig(memorisation=True), subject)
    assert more is not None
    assert more[1] > cost[1] > 0
    assert memorisation_cost(tmp_path, EvaluateConfig(), subject) is None
