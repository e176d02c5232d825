"""`evaluate --downstream` on real engines: sampling, shards, trainings on Ray workers, the table."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sampling_support import DIFFUSION, make_here, write_weights

from data_shards.feed.loader import LoaderConfig
from data_shards.problems import InputProblems
from segdiff_dist.denoising.samplers import SamplerConfig
from segdiff_dist.downstream.config import DownstreamConfig
from segdiff_dist.downstream.job import Downstream, DownstreamFailed, plan
from segdiff_dist.evaluation.sums import Interval
from segdiff_dist.sampling.config import SampleConfig
from segdiff_dist.segmentation import SegmenterConfig
from segdiff_dist.training.config import TrainConfig


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A Ray cluster to join, of one node with two cores."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 100 * 2**20})
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

    sections: dict[str, Any] = {
        "diffusion": DIFFUSION,
        "sample": SampleConfig(
            sampler=SamplerConfig(num_steps=3, timestep_spacing="trailing"),
            region_size=4,
            device="cpu",
            ray_address=address,
        ),
        "segmenter": SEGMENTER,
        "loader": LoaderConfig(num_threads=1),
        "interval": Interval(100, 0),
    }
    return plan(run, SampleStore.open(run / "samples"), config, **sections | changes)


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


def test_everything_wrong_is_told_before_work(run: Path) -> None:
    with pytest.raises(InputProblems) as error:
        planned(run, replace(CONFIG, seeds=()), loader=LoaderConfig(axes=("coronal",)))
    told = str(error.value)
    assert "downstream.seeds" in told
    assert "train split" in told
    assert "test split" in told
