"""`evaluate --downstream` on real engines: sampling, shards, trainings on Ray workers, the table."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from sampling_support import DIFFUSION, make_here, write_weights

from data_shards.fan_out import ray_session
from data_shards.feed.config import LoaderConfig
from data_shards.problems import InputProblems
from data_shards.store.shards import ShardSet
from data_shards.workers import WorkerPool, WorkersConfig
from segdiff_dist.denoising.sampler_config import SamplerConfig
from segdiff_dist.downstream.arms import Arm, Training
from segdiff_dist.downstream.config import DownstreamConfig
from segdiff_dist.downstream.job import Downstream, DownstreamFailed, Sections, plan
from segdiff_dist.downstream.trainer import SCORES, Inputs, Trainer
from segdiff_dist.evaluation.measure.config import EvaluateConfig
from segdiff_dist.evaluation.metrics.sums import Interval
from segdiff_dist.evaluation.report.shared_terms import shared_terms
from segdiff_dist.sampling.config import SampleConfig
from segdiff_dist.segmentation.config import SegmenterConfig
from segdiff_dist.training.config import TrainConfig

HEAD = {"num_cpus": 2, "num_gpus": 8, "object_store_memory": 100 * 2**20}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A Ray cluster to join, of one node with two cores and, as it says, eight GPUs."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args=HEAD)
    yield cluster.address
    cluster.shutdown()


SEGMENTER = SegmenterConfig(
    channels=(8, 16, 32),
    first_stride=1,
    train=TrainConfig(
        num_images=320,
        global_batch_size=8,
        micro_batch_size=8,
        lr=1e-2,
        warmup_images=16,
        checkpoint_every_images=160,
        precision="fp32",
        ema_lengths=(0.05,),
    ),
)
CONFIG = DownstreamConfig(real_fractions=(1.0,), seeds=(0,), num_masks=8)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Path:
    """A run whose model was never trained: its images are noise."""
    run = write_weights(tmp_path_factory.mktemp("downstream") / "run")
    make_here(run, shapes, num=4)
    return run


def planned(run: Path, config: DownstreamConfig = CONFIG, address: str | None = None, **changes: Any) -> Downstream:
    from segdiff_dist.sampling.store import SampleStore

    sections = Sections(
        diffusion=DIFFUSION,
        sample=SampleConfig(
            sampler=SamplerConfig(num_steps=3, timestep_spacing="trailing"),
            region_size=4,
            device="cpu",
        ),
        segmenter=SEGMENTER,
        loader=LoaderConfig(num_threads=1),
        workers=WorkersConfig("evaluate", device="cpu", ray_address=address),
    )
    return plan(run, SampleStore.open(run / "samples"), config, replace(sections, **changes), Interval(100, 0))


def test_images_of_noise_teach_nothing_and_real_ones_do(
    run: Path, address: str, capfd: pytest.CaptureFixture[str]
) -> None:
    # A training that fails, here of a file where its folder is to be, is named, and the others are kept.
    blocked = run / "downstream" / "trainings" / "generated-seed_0"
    blocked.parent.mkdir(parents=True)
    blocked.write_text("")
    with pytest.raises(DownstreamFailed, match=r"1 of 3 trainings failed, the first: generated-seed_0"):
        planned(run, address=address).make()
    blocked.unlink()

    summary = planned(run, address=address).make()
    dice = {arm["name"]: arm["dice"]["value"] for arm in summary["arms"]}
    assert dice["real_100"] > 0.6
    assert dice["generated"] < dice["real_100"] - 0.3
    assert set(summary["arms"][0]["by_modality"]) == {"CT", "MR"}
    assert min(summary["granted"].values()) > 0
    assert f"{summary['granted']['num_validation_slices']} slices of" in shared_terms(summary)
    assert "no validation slice is used" in shared_terms({"granted": summary["granted"] | {"num_validation_slices": 0}})
    assert summary["num_tested"] == 24
    assert json.loads((run / "downstream" / "summary.json").read_text()) == json.loads(json.dumps(summary))
    trainings = run / "downstream" / "trainings"
    assert not list(trainings.glob("*/checkpoints"))
    assert "segmenter:" in (trainings / "real_100-seed_0" / "output.txt").read_text()
    said = capfd.readouterr().err
    assert "segmenter:" not in said  # a bar of each would overwrite the job's own
    assert "laio" not in said  # nor what DeepSpeed's search for libraries says

    # The same again trains nothing, and another one only what is missing.
    files = {file: file.stat().st_mtime_ns for file in trainings.glob("*/scores.parquet")}
    assert planned(run, address=address).make()["arms"] == summary["arms"]
    missing = trainings / "generated-seed_0" / "scores.parquet"
    missing.unlink()
    assert planned(run, address=address).make()["arms"] == summary["arms"]  # trained anew, to the same scores
    after = {file: file.stat().st_mtime_ns for file in trainings.glob("*/scores.parquet")}
    assert {file for file in files if files[file] != after[file]} == {missing}


def test_other_settings_are_refused_where_trainings_lie(run: Path) -> None:
    planned(run).folder.mkdir(exist_ok=True)
    wider = replace(SEGMENTER, channels=(8, 16, 64))
    with pytest.raises(InputProblems) as error:
        planned(run, segmenter=wider)
    assert "segmenter.channels" in str(error.value)
    assert "remove" in str(error.value)


def test_everything_wrong_is_reported_before_work(run: Path) -> None:
    with pytest.raises(InputProblems) as error:
        planned(run, replace(CONFIG, seeds=()), loader=LoaderConfig(axes=("coronal",)))
    problems = str(error.value)
    assert "downstream.seeds" in problems
    assert "train split" in problems
    assert "test split" in problems


@pytest.mark.parametrize(
    ("device", "num_workers", "pool"),
    [
        ("auto", None, WorkerPool(8, "cuda", 1.0)),
        ("auto", 3, WorkerPool(3, "cuda", 1.0)),  # Ray has no 8 / 3 GPUs to give
        ("cuda", 16, WorkerPool(16, "cuda", 0.5)),
        ("cpu", None, WorkerPool(2, "cpu", 0.0)),
    ],
)
def test_evaluation_counts_what_the_cluster_has(
    address: str, device: Any, num_workers: int | None, pool: WorkerPool
) -> None:
    config = EvaluateConfig(device=device, num_workers=num_workers, ray_address=address)
    assert config.problems() == []
    with ray_session(address):
        found = config.workers.pool()
    assert found == pool
    # Those that have to share a GPU's memory, or this machine's.
    assert (
        found.num_beside
        == {(8, "cuda"): 1, (3, "cuda"): 1, (16, "cuda"): 2, (2, "cpu"): 2}[pool.num_workers, pool.device]
    )


def test_where_the_test_is_on_val_no_training_looks_at_it(tmp_path: Path, shapes: Path) -> None:
    """Weights that were chosen by their Dice on the test's own slices would be flattered."""
    run = write_weights(tmp_path / "run")
    make_here(run, shapes, num=2, split="val")
    made = planned(run, segmenter=replace(SEGMENTER, train=replace(SEGMENTER.train, num_images=32, warmup_images=8)))
    assert made.split == "val"
    inputs = Inputs(str(shapes), shapes, made.folder, made.segmenter, made.loader, made.split, "cpu")
    training = Training(Arm(1.0, False), 0)
    Trainer(inputs)(training)
    folder = made.folder / training.name
    scores = pq.read_table(folder / SCORES)
    assert scores["row"].to_pylist() == ShardSet.open(shapes).select(split="val").tolist()
    assert "val_dice" not in (folder / "log.jsonl").read_text()

    with pytest.raises(InputProblems, match="give val or test"):
        planned(make_here(write_weights(tmp_path / "other"), shapes, num=2, split="train").path.parent)
