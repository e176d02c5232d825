"""What each training sees, and how its scores become a table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sampling_support import DIFFUSION, make_here, write_weights
from tests_support import write_shapes

from data_shards.feed.config import LoaderConfig
from data_shards.host_memory import HostMemory
from data_shards.problems import InputProblems
from data_shards.store.shards import ShardSet
from data_shards.workers import WorkersConfig
from segdiff_dist.downstream.arms import Arm, Training, arms_of, patients_of, rows_of, trainings_of
from segdiff_dist.downstream.config import DownstreamConfig
from segdiff_dist.downstream.job import Sections, plan
from segdiff_dist.downstream.memory import trainings_problems
from segdiff_dist.downstream.summary import format_downstream, scalars, summarise
from segdiff_dist.evaluation.metrics.sums import Interval
from segdiff_dist.export.config import ExportConfig
from segdiff_dist.export.samples import FinishedSamples
from segdiff_dist.export.shards import write_shard_set
from segdiff_dist.planning import memory as memory_planning
from segdiff_dist.planning.memory import Capacity, plan_memory
from segdiff_dist.sampling.config import SampleConfig
from segdiff_dist.segmentation.config import SegmenterConfig
from segdiff_dist.segmentation.network import segmenter_network

INTERVAL, GIB = Interval(200, 0), 2**30


def training_rows(shards: ShardSet) -> np.ndarray:
    return shards.select(split="train")


def test_every_share_is_trained_on_alone_and_with_generated_images() -> None:
    config = DownstreamConfig(real_fractions=(1.0, 0.5), seeds=(3, 4))
    names = [arm.name for arm in arms_of(config)]
    assert names == ["real_50", "real_50_and_generated", "real_100", "real_100_and_generated", "generated"]
    trainings = trainings_of(config)
    assert [t.seed for t in trainings] == [3] * 5 + [4] * 5  # a whole table first


def test_a_smaller_share_is_within_a_larger_one_and_has_both_modalities(shapes: Path) -> None:
    shards = ShardSet.open(shapes)
    rows = training_rows(shards)
    few, half, everyone = (set(patients_of(shards, rows, share, 7)) for share in (0.25, 0.5, 1.0))
    assert few < half < everyone
    assert (len(few), len(half), len(everyone)) == (2, 4, 8)
    for chosen in (few, half):
        assert len({case >= "amos_0507" for case in chosen}) == 2
    assert patients_of(shards, rows, 0.0, 7) == []
    others = {frozenset(patients_of(shards, rows, 0.25, seed)) for seed in range(8)}
    assert len(others) > 1


def test_a_patient_with_both_modalities_is_one(shapes: Path) -> None:
    shards = ShardSet.open(shapes)
    cases = shards.samples["case_id"].unique().to_pylist()
    shards.index["source"] = {case: {"patient": f"p{int(case[5:]) % 506}"} for case in cases}
    assert sorted(patients_of(shards, training_rows(shards), 1.0, 7)) == ["p1", "p2", "p3", "p4"]


@pytest.mark.parametrize(("bits", "soft_edge", "codec"), [(8, False, "raw"), (16, False, "zstd"), (8, True, "raw")])
def test_generated_images_join_a_real_set_of_any_form(tmp_path: Path, bits: int, soft_edge: bool, codec: str) -> None:
    real = write_shapes(tmp_path / "real", codec=codec, bits=bits, soft_edge=soft_edge)
    run = write_weights(tmp_path / "run")
    store = make_here(run, real, split="train", num=6, samples_per_mask=1, diverse_masks=None, cross_modality_masks=0)
    out = tmp_path / "generated"
    export = ExportConfig(format="shards", split="train", codec=codec)
    samples = FinishedSamples.of(store, None)
    write_shard_set(out, samples, samples, export, bits=bits, soft_edge=soft_edge)

    both = ShardSet.open([real, out])
    num_real = len(ShardSet.open(real))
    generated = [both.read(row) for row in range(num_real, len(both))]
    by_name = {sample.name: sample.record for sample in samples}
    for record in generated:
        assert np.array_equal(record.image_uint8(), by_name[record.meta.key].image_HW)
        assert record.meta.split == "train"
        if soft_edge:
            assert (record.edge_2HW[1] == 255).all()
    first = generated[0].meta
    grey = int(generated[0].image_HW[16, 16])
    value = grey * first.intensity_scale + first.intensity_offset
    same = by_name[first.key]
    expected = int(same.image_HW[16, 16]) * same.meta.intensity_scale + same.meta.intensity_offset
    assert value == pytest.approx(expected)

    rows = training_rows(both)
    real_rows = rows[both.member_N[rows] == 0]
    alone = rows_of(Training(Arm(0.5, False), 0), both, real_rows)
    joined = rows_of(Training(Arm(0.5, True), 0), both, real_rows)
    only = rows_of(Training(Arm(0.0, True), 0), both, real_rows)
    assert set(joined) == set(alone) | set(only)
    assert only.tolist() == list(range(num_real, len(both)))
    assert (both.member_N[alone] == 0).all()


def write_scores(folder: Path, training: Training, dice_N: list[float]) -> Path:
    file = folder / f"{training.name}.parquet"
    cases = ["a", "a", "b", "c"]
    columns = {"row": [1, 2, 3, 4], "case_id": cases, "modality": ["CT", "CT", "CT", "MR"], "axis": ["axial"] * 4}
    pq.write_table(pa.table(columns | {"dice": dice_N, "dice/liver": dice_N, "dice/spleen": [float("nan")] * 4}), file)
    return file


def table_of(tmp_path: Path, shapes: Path) -> dict:
    config = DownstreamConfig(real_fractions=(1.0,), seeds=(0, 1))
    nan = float("nan")
    dice = {
        "real_100-seed_0": [0.5, 0.7, 0.6, nan],
        "real_100-seed_1": [0.7, 0.7, 0.4, nan],
        "real_100_and_generated-seed_0": [0.6, 0.8, 0.8, nan],
        "real_100_and_generated-seed_1": [0.8, 0.8, 0.5, nan],
        "generated-seed_0": [0.1, 0.1, 0.1, nan],
        "generated-seed_1": [0.1, 0.1, 0.1, nan],
    }
    files = {t: write_scores(tmp_path, t, dice[t.name]) for t in trainings_of(config)}
    shards = ShardSet.open(shapes)
    return summarise(files, shards, training_rows(shards), num_generated=9, interval=INTERVAL)


def test_the_table_is_of_means_over_seeds_and_of_paired_differences(tmp_path: Path, shapes: Path) -> None:
    summary = table_of(tmp_path, shapes)
    real, both, generated = summary["arms"]
    assert real["dice"]["value"] == pytest.approx((0.6 + 0.7 + 0.5) / 3)
    assert real["dice"]["by_seed"] == pytest.approx([0.6, 0.6])
    assert (real["dice"]["n"], real["dice"]["num_patients"]) == (3, 2)  # a slice without organs counts nothing
    assert both["gain"]["dice"]["value"] == pytest.approx((0.1 + 0.1 + 0.15) / 3)
    assert both["gain"]["dice"]["ci95"] == pytest.approx([0.1, 0.15])
    assert "gain" not in real
    assert "gain" not in generated
    assert set(real["by_modality"]) == {"CT"}
    assert set(real["by_organ"]) == {"liver"}
    counts = [(a["num_real_patients"], a["num_real_slices"], a["num_generated"]) for a in summary["arms"]]
    assert counts == [(8, 48, 0), (8, 48, 9), (0, 0, 9)]
    json.dumps(summary, allow_nan=False)


def test_what_a_person_and_a_tracker_read(tmp_path: Path, shapes: Path) -> None:
    summary = table_of(tmp_path, shapes)
    lines = format_downstream(summary).splitlines()
    assert lines[2].startswith("all real + generated")
    assert "+0.117 [+0.100, +0.150]" in lines[2]
    named = scalars(summary)
    assert named["downstream/real_100/dice"] == pytest.approx(0.6)
    assert not [name for name in named if "/CT/" in name]  # the table has it
    assert named["downstream/real_100_and_generated/gain"] == pytest.approx(0.35 / 3)


def machine(gib: float, gpu_gib: float | None = None) -> Capacity:
    host, gpu = (None if size is None else HostMemory(int(size * GIB), int(size * GIB)) for size in (gib, gpu_gib))
    return Capacity(host, gpu)


def test_trainings_that_do_not_fit_at_a_time_are_refused_with_what_would(shapes: Path) -> None:
    config = SegmenterConfig()
    network = segmenter_network(config, ShardSet.open(shapes), 256)
    needed_gib = plan_memory(network, config.train, ranks=1).needed("lone host") / GIB
    assert trainings_problems(network, config, machine(4 * needed_gib), num_workers=4) == []
    # The plan is an estimate: a third more than it says is free for each in what is suggested.
    [found] = trainings_problems(network, config, machine(2.7 * needed_gib), num_workers=4)
    assert found.field == "segmenter.train.micro_batch_size"
    assert "4 trainings at a time" in found.value
    assert found.remedy.startswith("give --evaluate.num-workers 2, ")
    assert "--segmenter.train.micro-batch-size" in found.remedy
    [alone] = trainings_problems(network, config, machine(0.5 * needed_gib), num_workers=1)
    assert "num-workers" not in alone.remedy


def test_trainings_share_a_gpu_and_its_machine(shapes: Path) -> None:
    config = SegmenterConfig()
    network = segmenter_network(config, ShardSet.open(shapes), 256)
    plan = plan_memory(network, config.train, ranks=1, on_gpu=True)
    gpu_gib, host_gib = (plan.needed(where) / GIB for where in ("GPU", "host"))
    enough = machine(8 * host_gib, 2 * gpu_gib)
    assert trainings_problems(network, config, enough, num_workers=8, num_beside=2) == []
    [found] = trainings_problems(network, config, enough, num_workers=16, num_beside=4)
    assert "the GPU's memory" in found.value
    [found] = trainings_problems(network, config, machine(4 * host_gib, 8 * gpu_gib), num_workers=8)
    assert "the host's memory" in found.value


def test_an_evaluation_knows_its_time_and_is_refused_before_it_measures(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_weights(tmp_path / "run")
    store = make_here(run, shapes, split="val", num=2)
    before = sorted(run.rglob("*"))
    sections = Sections(
        DIFFUSION,
        SampleConfig(),
        SegmenterConfig(channels=(8, 16, 32)),
        LoaderConfig(),
        WorkersConfig("evaluate", num_workers=2),
    )
    twice = (DownstreamConfig(seeds=seeds, num_images=10**6) for seeds in ((0,), (0, 1)))
    once_s, twice_s = (plan(run, store, config, sections, INTERVAL).seconds() for config in twice)
    assert once_s
    assert twice_s == pytest.approx(2 * once_s)
    monkeypatch.setattr(memory_planning, "capacity_of", lambda _: machine(0.2))
    with pytest.raises(InputProblems, match=r"at a time.*--evaluate.num-workers|memory") as refused:
        plan(run, store, DownstreamConfig(seeds=(0,)), sections, INTERVAL)
    assert [problem.where for problem in refused.value.problems] == ["memory"]
    assert sorted(run.rglob("*")) == before


def test_what_is_out_of_range_is_reported_all_at_once() -> None:
    wrong = DownstreamConfig(real_fractions=(0.0, 0.5, 0.5), seeds=(-1,), num_masks=0)
    assert [p.field for p in wrong.problems()] == [
        "downstream.real_fractions",
        "downstream.seeds",
        "downstream.num_masks",
    ]
    assert DownstreamConfig().problems() == []
