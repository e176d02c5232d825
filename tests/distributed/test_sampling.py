"""Sampling jobs on Ray: the same images whoever makes them, and after a kill only what is missing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_shards.fan_out import Done, TaskFailure, fan_out, ray_session
from data_shards.labels import AMOS
from data_shards.problems import InputProblems
from data_shards.store.shards import ShardSet
from segdiff_dist.denoising.diffusion import DiffusionConfig, SamplerConfig
from segdiff_dist.sampling.job import SampleConfig, generate, item_conditions, list_items, sample
from segdiff_dist.sampling.store import SampleStore

DIFFUSION = DiffusionConfig(prediction_type="v", zero_terminal_snr=True)
QUICK: dict[str, Any] = {
    "num": 10,
    "region_size": 4,
    "samples_per_mask": 2,
    "diverse_masks": 2,
    "cross_modality_masks": 2,
    "sampler": SamplerConfig(num_steps=3, timestep_spacing="trailing", eta=0.5),
}


@pytest.fixture(scope="module", autouse=True)
def ray() -> Iterator[None]:
    with ray_session(num_cpus=2):
        yield


def write_weights(run: Path, seed: int = 0, soft_masks: bool = False, **trained_with: Any) -> Path:
    """An untrained denoiser: its images mean nothing, but are the same every time."""
    import torch

    from segdiff_dist.denoising.denoiser import Denoiser, DenoiserConfig

    torch.manual_seed(seed)
    config = DenoiserConfig(
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        attention_resolutions=(16,),
        soft_masks=soft_masks,
    )
    model = Denoiser(config, AMOS, 32)
    training = {"diffusion": asdict(replace(DIFFUSION, **trained_with))} if trained_with else None
    model.save(run / "weights" / "ema", model.state_dict(), training)
    return run


def make(run: Path, shapes: Path, **changes: Any) -> SampleStore:
    shards = ShardSet.open(shapes)
    config = SampleConfig(**{**QUICK, **changes})
    return sample(run, shards, shards.select(split=config.split), DIFFUSION, config)


def test_one_worker_and_two_make_the_same_images(shapes: Path, tmp_path: Path) -> None:
    one = make(write_weights(tmp_path / "one"), shapes, num_workers=1)
    two = make(write_weights(tmp_path / "two"), shapes, num_workers=2)
    assert len(one) == len(two) == 10 + 2 + 4
    assert np.array_equal(one.image[:], two.image[:])
    assert one.missing() == []
    shards = ShardSet.open(shapes)
    rows = one.items["row"].to_pylist()
    assert np.array_equal(one.mask[:], np.stack([shards.read(row).mask_HW for row in rows]))
    images = one.image[:]
    assert len({image.tobytes() for image in images}) == len(images)  # each item has noise of its own


def test_an_unfinished_job_makes_only_what_is_missing(shapes: Path, tmp_path: Path) -> None:
    store = make(write_weights(tmp_path), shapes, num_workers=2)
    whole = store.image[:]
    (store.path / "done" / "000001").unlink()
    store.image[4:8] = 0
    store.image[0:4] = 77  # marked done: must not be made again
    assert store.missing() == [4, 5, 6, 7]
    again = make(tmp_path, shapes, num_workers=1)
    assert np.array_equal(again.image[4:], whole[4:])
    assert (again.image[0:4] == 77).all()


def test_a_killed_job_goes_on(shapes: Path, tmp_path: Path) -> None:
    """The whole command is killed with SIGKILL in the middle; the same command then finishes the same images."""
    expected = make(write_weights(tmp_path / "whole"), shapes, sampler=SamplerConfig(num_steps=40))
    run = write_weights(tmp_path / "killed")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from test_sampling_job import go\n"
        "go(Path(sys.argv[2]), Path(sys.argv[3]))\n"
    )
    (tmp_path / "test_sampling_job.py").write_text(
        "from data_shards.store.shards import ShardSet\n"
        "from segdiff_dist.denoising.diffusion import DiffusionConfig, SamplerConfig\n"
        "from segdiff_dist.sampling.job import SampleConfig, sample\n"
        "def go(run, shapes):\n"
        "    shards = ShardSet.open(shapes)\n"
        "    config = SampleConfig(num=10, region_size=4, samples_per_mask=2, diverse_masks=2, num_workers=1,\n"
        "        cross_modality_masks=2, sampler=SamplerConfig(num_steps=40))\n"
        "    diffusion = DiffusionConfig(prediction_type='v', zero_terminal_snr=True)\n"
        "    sample(run, shards, shards.select(split='test'), diffusion, config)\n"
    )
    job = [sys.executable, "-c", code, str(tmp_path), str(run), str(shapes)]
    process = subprocess.Popen(job, stderr=subprocess.DEVNULL, start_new_session=True)
    done = run / "samples" / "done"
    deadline = time.time() + 120
    while time.time() < deadline and not (done.is_dir() and list(done.iterdir())):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finished_before = {p.name: p.stat().st_mtime_ns for p in done.iterdir()}
    assert finished_before
    store = make(run, shapes, sampler=SamplerConfig(num_steps=40))
    assert store.missing() == []
    assert np.array_equal(store.image[:], expected.image[:])
    assert finished_before == {name: (done / name).stat().st_mtime_ns for name in finished_before}


def test_another_job_in_the_same_folder_is_refused(shapes: Path, tmp_path: Path) -> None:
    run = write_weights(tmp_path)
    make(run, shapes)
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
    settings = {**QUICK, "num": 4, "sampler": sampler, "without_organs": ("liver",), "precision": "fp32"}
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
        make(write_weights(tmp_path, soft_masks=True), shapes, num=1, cross_modality_masks=0)


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


def _worker() -> Any:
    def work(task: int) -> int:
        if task == 3:
            raise ValueError("three is bad")
        if task == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return task * task

    return work


def test_a_failing_task_costs_only_itself() -> None:
    results: dict[int, Any] = {}
    for done in fan_out(_worker, range(8), num_workers=2):
        assert isinstance(done, Done)
        results[done.task] = done.result
    assert {k: v for k, v in results.items() if k not in (3, 4)} == {0: 0, 1: 1, 2: 4, 5: 25, 6: 36, 7: 49}
    assert isinstance(results[3], TaskFailure)
    assert "ValueError: three is bad" in results[3].error
    assert isinstance(results[4], TaskFailure)
    assert "worker process died" in results[4].error
