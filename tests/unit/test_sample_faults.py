"""Sampling where something is not as it should be: folders of others, broken and replaced networks, damaged files."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sampling_support import QUICK, arguments, make_here, pixels_of, write_weights
from tests_support import bytes_of

from data_shards.fan_out import num_cores
from data_shards.labels import AMOS, LabelTable
from data_shards.problems import InputProblems
from segdiff_dist.sampling.config import SampleConfig
from segdiff_dist.sampling.job import prepare_job, sample
from segdiff_dist.sampling.store import SampleStore, locked
from segdiff_dist.sampling.worker import WorkerFactory

WEIGHTS = Path("weights/ema")
NETWORK = WEIGHTS / "diffusion_pytorch_model.safetensors"
# Regions of four images and, the last, of two.
SIX: dict[str, Any] = {"num": 6, "samples_per_mask": 1, "cross_modality_masks": 0}


def begin(run: Path, shapes: Path, **changes: Any) -> SampleStore:
    """The job, laid out, without an image."""
    job = prepare_job(*arguments(run, shapes, **changes))
    return SampleStore.create(job.path, job.job_settings | {"device": "cpu"}, job.items, job.size, job.masks_MHW)


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def write_segmenter(folder: Path, seed: int = 0) -> Path:
    import torch

    from segdiff_dist.segmentation.config import SegmenterConfig
    from segdiff_dist.segmentation.network import SegmenterNet
    from segdiff_dist.segmentation.segmenter import save_segmenter

    torch.manual_seed(seed)
    config = SegmenterConfig(channels=(8, 16), first_stride=1)
    save_segmenter(folder, SegmenterNet(config, AMOS.num_classes).state_dict(), config, AMOS)
    return folder


def test_masks_of_another_table_of_the_same_name_are_refused(shapes: Path, tmp_path: Path) -> None:
    names = list(AMOS.names)
    names[1], names[2] = names[2], names[1]
    run = write_weights(tmp_path / "run", table=LabelTable(AMOS.name, tuple(names)))
    with pytest.raises(InputProblems, match=r"'amos' with other classes at .* prepare the masks so"):
        prepare_job(*arguments(run, shapes))


# --- where the images are written ---


@pytest.mark.parametrize("out", ["mine", "run", "mine/thesis.txt"])
def test_folders_of_other_things_are_refused_and_left_alone(shapes: Path, tmp_path: Path, out: str) -> None:
    run = write_weights(tmp_path / "run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    before = bytes_of(tmp_path)
    with pytest.raises(InputProblems, match=r"output folder: (holds other things than samples|a file); give a new"):
        sample(*arguments(run, shapes, out=tmp_path / out))
    assert bytes_of(tmp_path) == before


def test_an_empty_folder_is_taken_and_a_killed_creation_replaced(shapes: Path, tmp_path: Path) -> None:
    run, out = write_weights(tmp_path / "run"), tmp_path / "out"
    out.mkdir()
    (tmp_path / ".out.unfinished").mkdir()
    (tmp_path / ".out.unfinished" / "items.parquet").write_text("half of it")
    assert make_here(run, shapes, out=out, **SIX).missing() == []
    assert not (tmp_path / ".out.unfinished").exists()


def test_a_store_without_images_gives_way_to_another_job(shapes: Path, tmp_path: Path) -> None:
    run = write_weights(tmp_path)
    first = begin(run, shapes, **SIX)
    write_weights(tmp_path, seed=1)
    (first.path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputProblems, match="weights_digest"):
        begin(run, shapes, **SIX)
    (first.path / "thesis.txt").unlink()
    outlived = WorkerFactory(begin(write_weights(tmp_path), shapes, **SIX).path, "cpu")()
    write_weights(tmp_path, seed=1)
    second = make_here(run, shapes, **SIX)
    assert second.missing() == []
    before = bytes_of(second.path)
    with pytest.raises(InputProblems, match="weights_digest"):
        outlived(0)
    assert bytes_of(second.path) == before
    assert second.job["weights_digest"] != first.job["weights_digest"]


def test_two_commands_that_start_at_once_do_not_lay_out_one_store(shapes: Path, tmp_path: Path) -> None:
    run = write_weights(tmp_path)
    with (run / ".samples.lock").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(InputProblems, match="is making them"):
            sample(*arguments(run, shapes, **SIX))
    assert not (run / "samples").exists()
    with locked(run / "samples"), pytest.raises(InputProblems, match=f"process {os.getpid()} on .* is making them"):
        sample(*arguments(run, shapes, **SIX))


# --- networks ---


@pytest.mark.parametrize("harm", ["cut short", "missing", "about cut short"])
def test_broken_networks_are_refused_before_there_is_a_store(shapes: Path, tmp_path: Path, harm: str) -> None:
    run = write_weights(tmp_path)
    if harm == "missing":
        (run / NETWORK).unlink()
    else:
        cut_short(run / (NETWORK if harm == "cut short" else WEIGHTS / "segdiff.json"))
    with pytest.raises(InputProblems, match="weights: "):
        sample(*arguments(run, shapes))
    assert not (run / "samples").exists()


def test_a_broken_guiding_segmenter_is_refused(shapes: Path, tmp_path: Path) -> None:
    run, segmenter = write_weights(tmp_path), write_segmenter(tmp_path / "segmenter")
    cut_short(segmenter / "model.safetensors")
    guided = replace(QUICK["sampler"], segmenter_guidance=0.1, guidance_segmenter=str(segmenter))
    with pytest.raises(InputProblems, match="segmenter: its bytes are not those that were written"):
        prepare_job(*arguments(run, shapes, sampler=guided))


def test_folders_beside_the_weights_are_none_of_them(shapes: Path, tmp_path: Path) -> None:
    run = write_weights(tmp_path)
    before = prepare_job(*arguments(run, shapes)).job_settings
    (run / WEIGHTS / ".ipynb_checkpoints").mkdir()
    assert prepare_job(*arguments(run, shapes)).job_settings == before


def test_predictions_that_are_not_finite_become_no_images(shapes: Path, tmp_path: Path) -> None:
    """The weights themselves are finite here, and clipping would make grey values of what they predict."""
    from safetensors.torch import load_file, save_file

    run = write_weights(tmp_path)
    weights = load_file(run / NETWORK)
    weights["conv_out.weight"] = weights["conv_out.weight"].sign() * 3e38
    save_file(weights, run / NETWORK, metadata={"format": "pt"})
    (run / NETWORK).with_name("digests.json").unlink()  # as if training had written these
    with pytest.raises(InputProblems, match="not finite, in items 0, 1, 2, 3; sample from other weights"):
        make_here(run, shapes, **SIX)
    assert SampleStore.open(run / "samples").done_regions() == []


@pytest.mark.parametrize("what", ["weights", "segmenter", "shards"])
def test_workers_refuse_what_changed_since_the_job_began(shapes: Path, tmp_path: Path, what: str) -> None:
    run, segmenter = write_weights(tmp_path / "run"), write_segmenter(tmp_path / "segmenter")
    shutil.copytree(shapes, tmp_path / "set")
    guided = replace(QUICK["sampler"], segmenter_guidance=0.1, guidance_segmenter=str(segmenter))
    store = begin(run, tmp_path / "set", sampler=guided, **SIX)
    WorkerFactory(store.path, "cpu")()(0)
    if what == "weights":
        write_weights(tmp_path / "run", seed=1)
    elif what == "segmenter":
        write_segmenter(segmenter, seed=1)
    else:
        index = tmp_path / "set" / "index.json"
        index.write_text(index.read_text() + "\n")
    with pytest.raises(InputProblems, match="changed since the job began"):
        WorkerFactory(store.path, "cpu")()
    assert store.done_regions() == [0]


# --- damaged stores ---


@pytest.mark.parametrize("harm", ["chunk", "index", "cut short", "emptied"])
def test_a_damaged_short_region_is_made_again(shapes: Path, tmp_path: Path, harm: str) -> None:
    run = write_weights(tmp_path)
    store = make_here(run, shapes, **SIX)
    whole = pixels_of(store)
    file = store.path / "images.zarr" / "image" / "c" / "1" / "0" / "0"
    content = bytearray(file.read_bytes())
    content[40] ^= 0xFF if harm == "chunk" else 0
    content[-6] ^= 0xFF if harm == "index" else 0
    file.write_bytes(content[: {"cut short": len(content) // 2, "emptied": 0}.get(harm)])
    assert [damage.region for damage in store.damaged()] == [1]
    store.unmark(1)
    again = make_here(run, shapes, **SIX)
    assert list(again.damaged()) == []
    assert all(np.array_equal(a, b) for a, b in zip(pixels_of(again), whole, strict=True))


@pytest.fixture
def mask_job(tmp_path: Path) -> dict[str, Any]:
    """Settings of a job of two masks of a folder."""
    from PIL import Image

    (tmp_path / "masks").mkdir()
    for name, label in (("a", 6), ("b", 16)):
        Image.fromarray(np.full((32, 32), label, np.uint8)).save(tmp_path / "masks" / f"{name}.png")
    return {"masks": tmp_path / "masks", "target_modality": "CT", "cross_modality_masks": 0}


LAID_OUT = ("items.parquet", "images.zarr/zarr.json", "images.zarr/image/zarr.json", "images.zarr/item_id/c/0")


@pytest.mark.parametrize("name", [*LAID_OUT, "masks.zarr/zarr.json", "masks.zarr/c/0/0/0", "layout.json"])
def test_damaged_files_of_the_layout_are_named_and_made_again(
    shapes: Path, tmp_path: Path, mask_job: dict[str, Any], name: str
) -> None:
    run = write_weights(tmp_path / "run")
    store = make_here(run, shapes, **mask_job)
    before = bytes_of(store.path)
    cut_short(store.path / name)
    with pytest.raises(InputProblems, match=f"{name}: samples: damaged or missing; run the same"):
        SampleStore.open(store.path)
    with pytest.warns(UserWarning, match=f"damaged or missing: {name}; made again"):
        again = begin(run, shapes, **mask_job)
    assert again.missing() == []
    assert bytes_of(store.path) == before
    assert not (run / ".samples.unfinished").exists()


def test_what_can_not_be_made_again_as_it_was_is_refused(shapes: Path, tmp_path: Path) -> None:
    run = write_weights(tmp_path)
    store = make_here(run, shapes, **SIX)
    checksums = json.loads((store.path / "layout.json").read_text())
    (store.path / "layout.json").write_text(json.dumps(checksums | {"items.parquet": 1}))
    with (
        pytest.warns(UserWarning, match="made again"),
        pytest.raises(InputProblems, match=r"items\.parquet: samples: damaged, and the file made again differs"),
    ):
        begin(run, shapes, **SIX)
    assert store.missing() == []


def test_a_damaged_job_file_is_a_problem_for_people(shapes: Path, tmp_path: Path) -> None:
    run = write_weights(tmp_path)
    store = make_here(run, shapes, **SIX)
    cut_short(store.path / "job.json")
    for attempt in (lambda: SampleStore.open(store.path), lambda: sample(*arguments(run, shapes, **SIX))):
        with pytest.raises(InputProblems, match=r"job\.json: samples: damaged .* restore it, or remove"):
            attempt()
    assert len(store.done_regions()) == 2


def test_stores_from_before_there_was_a_layout_file_open_as_they_are(shapes: Path, tmp_path: Path) -> None:
    run = write_weights(tmp_path)
    store = make_here(run, shapes, **SIX)
    (store.path / "layout.json").unlink()
    assert sample(*arguments(run, shapes, **SIX)).missing() == []
    cut_short(store.path / "items.parquet")
    with pytest.raises(InputProblems, match=r"samples: cannot be read .* remove it and sample again"):
        SampleStore.open(store.path)


# --- moved ---


def test_a_moved_run_and_shard_set_are_the_same_job(shapes: Path, tmp_path: Path) -> None:
    shutil.copytree(shapes, tmp_path / "set")
    first = make_here(write_weights(tmp_path / "run"), tmp_path / "set", **SIX)
    images = pixels_of(first)[0]
    run, data = tmp_path / "elsewhere" / "run", tmp_path / "elsewhere" / "set"
    run.parent.mkdir()
    (tmp_path / "run").rename(run)
    (tmp_path / "set").rename(data)
    store = sample(*arguments(run, data, **SIX))  # nothing to make, so no Ray
    assert np.array_equal(pixels_of(store)[0], images)
    job = SampleStore.open(run / "samples").job
    assert job == first.job | {"weights": str(run / WEIGHTS), "shards": str(data)}
    cut_short(run / "samples" / "items.parquet")
    with pytest.warns(UserWarning, match=r"items\.parquet; made again"):
        assert begin(run, data, **SIX).missing() == []


# --- cores ---


def test_workers_are_as_many_as_the_cores_that_may_be_used() -> None:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert num_cores() == 1
        assert SampleConfig(device="cpu").workers.pool().num_workers == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert num_cores() == len(allowed)
