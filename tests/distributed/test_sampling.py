"""Sampling jobs on Ray: the same images whoever makes them, and after a kill only what is missing."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sampling_support import DIFFUSION, QUICK, arguments, flip_a_byte, make_here, pixels_of, write_weights

from data_shards.fan_out import Done, TaskFailure, fan_out, ray_session
from data_shards.labels import AMOS
from data_shards.problems import InputProblems
from data_shards.store.shards import ShardSet
from segdiff_dist.sampling.config import SampleConfig
from segdiff_dist.sampling.generation import generate
from segdiff_dist.sampling.items import list_items
from segdiff_dist.sampling.job import prepare_job, sample
from segdiff_dist.sampling.store import SampleStore
from segdiff_dist.sampling.worker import item_conditions


@pytest.fixture(scope="module", autouse=True)
def ray() -> Iterator[None]:
    with ray_session(num_cpus=2):
        yield


def make(run: Path, shapes: Path, **changes: Any) -> SampleStore:
    return sample(*arguments(run, shapes, **changes))


def test_two_workers_make_the_images_that_one_process_makes(shapes: Path, tmp_path: Path) -> None:
    one = make_here(write_weights(tmp_path / "one"), shapes)
    two = make(write_weights(tmp_path / "two"), shapes, num_workers=2)
    assert len(one) == len(two) == 10 + 2 + 4
    assert np.array_equal(one.image[:], two.image[:])
    assert one.missing() == []
    shards = ShardSet.open(shapes)
    rows = one.items["row"].to_pylist()
    assert np.array_equal(one.mask[:], np.stack([shards.read(row).mask_HW for row in rows]))
    images = one.image[:]
    assert len({image.tobytes() for image in images}) == len(images)  # each item has noise of its own


def test_an_unfinished_job_makes_only_what_is_missing_or_damaged(shapes: Path, tmp_path: Path) -> None:
    store = make_here(write_weights(tmp_path), shapes)
    whole = pixels_of(store)
    store.unmark(1)
    store.image[4:8] = 0
    flip_a_byte(store, "mask", 2)
    assert store.missing() == [4, 5, 6, 7]
    kept = {index: (store.path / "done" / f"{index:06d}").stat().st_mtime_ns for index in (0, 3)}
    with pytest.warns(UserWarning, match=r"items 8\); region 2 is made again"):
        again = make(tmp_path, shapes, num_workers=1)
    assert all(np.array_equal(a, b) for a, b in zip(pixels_of(again), whole, strict=True))
    assert kept == {index: (store.path / "done" / f"{index:06d}").stat().st_mtime_ns for index in kept}


def test_another_job_in_the_same_folder_is_refused(shapes: Path, tmp_path: Path) -> None:
    run = write_weights(tmp_path)
    make_here(run, shapes)
    with pytest.raises(InputProblems, match=r"sample\.seed"):
        make(run, shapes, seed=1)
    make(run, shapes, num_workers=1)  # who makes the images is no part of the job
    write_weights(tmp_path, seed=1)
    with pytest.raises(InputProblems, match="weights_digest"):
        make(run, shapes)


def test_workers_guide_and_see_soft_masks_less_the_organs_left_out(tmp_path: Path) -> None:
    """A whole job against its own functions, called here."""
    import torch
    from tests_support import write_shapes

    from segdiff_dist.denoising.denoiser import Denoiser

    shards = ShardSet.open(write_shapes(tmp_path / "set", num_patients=1, slices=2, soft_edge=True))
    run = write_weights(tmp_path / "run", soft_masks=True, mask_dropout=0.1)
    sampler = replace(QUICK["sampler"], guidance=3.0)
    settings = {
        **QUICK,
        "num": 4,
        "num_workers": 1,
        "sampler": sampler,
        "without_organs": ("liver",),
        "precision": "fp32",
    }
    store = sample(run, shards, shards.select(split="test"), DIFFUSION, SampleConfig(**settings))
    assert sample(run, shards, shards.select(split="test"), DIFFUSION, SampleConfig(**settings)).missing() == []

    model, items = Denoiser.load(run / "weights" / "ema"), store.items.slice(0, 4).to_pylist()
    whole = np.stack([shards.read(item["row"]).mask_HW for item in items])
    liver = AMOS.names.index("liver")
    assert (whole == liver).any()
    assert np.array_equal(store.mask[:4], np.where(whole == liver, AMOS.body_id, whole))
    conditions = item_conditions(model, shards, items, ("liver",), torch.device("cpu"))
    assert conditions.edge_B2HW is not None
    torch.set_num_threads(1)
    expected = generate(model, items, conditions, DIFFUSION, sampler, 0)
    assert np.array_equal(store.image[:4], expected)
    for other in (
        generate(model, items, conditions, DIFFUSION, QUICK["sampler"], 0),
        generate(model, items, conditions._replace(edge_B2HW=None), DIFFUSION, sampler, 0),
    ):
        assert not np.array_equal(other, expected)


def test_guidance_needs_weights_that_were_trained_for_it(shapes: Path, tmp_path: Path) -> None:
    guided = replace(QUICK["sampler"], guidance=3.0)
    for run in (write_weights(tmp_path / "old"), write_weights(tmp_path / "other", class_dropout=0.1)):
        with pytest.raises(InputProblems, match=r"trained without diffusion\.mask_dropout"):
            make(run, shapes, sampler=guided)
        assert not (run / "samples").exists()


def test_what_the_weights_were_not_trained_for_is_refused(shapes: Path, tmp_path: Path) -> None:
    run = write_weights(tmp_path, snr_shift=0.5)
    with pytest.raises(InputProblems) as error:
        make(run, shapes, without_organs=("lever",))
    organs, shift = map(str, error.value.problems)
    assert "['lever']; choose from spleen" in organs
    assert "diffusion.snr_shift: 1.0" in shift
    assert "trained with 0.5" in shift


def test_a_set_without_soft_edges_is_said_to_be_one(shapes: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="keeps no soft edges"):
        prepare_job(*arguments(write_weights(tmp_path, soft_masks=True), shapes))


def test_items_are_listed_by_rule(shapes: Path) -> None:
    shards = ShardSet.open(shapes)
    rows = shards.select(split="test")
    items = list_items(shards, rows, SampleConfig(**QUICK)).to_pylist()
    assert [item["item_id"] for item in items] == list(range(16))
    own, cross = items[:12], items[12:]
    assert all(item["target_modality"] == item["source_modality"] for item in own)
    again = [item["row"] for item in own if item["seed_index"] == 1]
    assert len(again) == 2
    assert {item["row"] for item in cross} == set(again)  # Figures 6 and 7 show both for the same mask
    assert len({item["row"] for item in own}) == 10
    assert {(i["source_modality"], i["target_modality"]) for i in cross} == {("CT", "MR"), ("MR", "CT")}
    everything = list_items(shards, rows, SampleConfig(num=None, target_modality="MR"))
    assert set(everything["row"].to_pylist()) == set(rows.tolist())
    assert set(everything["target_modality"].to_pylist()) == {"MR"}


def test_a_split_without_masks_is_refused(shapes: Path, tmp_path: Path) -> None:
    shards = ShardSet.open(shapes)
    with pytest.raises(InputProblems, match="no labelled slice"):
        sample(write_weights(tmp_path), shards, np.array([], dtype=np.int64), DIFFUSION, SampleConfig())


def worker_factory() -> Any:
    """Of tasks that fail or kill their worker. Local, as Ray's processes cannot import this file."""

    def make_worker() -> Any:

        def work(task: int) -> int:
            if task == 3:
                raise ValueError("three is bad")
            if task == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            return task * task

        return work

    return make_worker


def test_a_failing_task_costs_only_itself() -> None:
    results: dict[int, Any] = {}
    for done in fan_out(worker_factory(), range(8), num_workers=2):
        assert isinstance(done, Done)
        results[done.task] = done.result
    assert {k: v for k, v in results.items() if k not in (3, 4)} == {0: 0, 1: 1, 2: 4, 5: 25, 6: 36, 7: 49}
    assert isinstance(results[3], TaskFailure)
    assert "ValueError: three is bad" in results[3].error
    assert isinstance(results[4], TaskFailure)
    assert "worker process died" in results[4].error


def test_workers_that_cannot_set_themselves_up_say_why() -> None:
    def unready() -> Any:
        raise ValueError("no model here")

    with pytest.warns(UserWarning, match="no model here; going on without it"):
        results = [done.result for done in fan_out(unready, range(3), num_workers=1)]
    assert results == [TaskFailure("a worker could not set itself up: ValueError: no model here")] * 3


def test_a_cluster_without_room_is_waited_for_and_then_reported() -> None:
    with pytest.warns(UserWarning, match="waiting for a machine"):
        [done] = fan_out(worker_factory(), [1], num_workers=1, threads_per_worker=64, patience_s=1.0)
    assert isinstance(done.result, TaskFailure)
    assert "no machine had room for a worker within 1 s (64 CPU)" in done.result.error
