"""The evaluated model in MLflow's registry: once, loadable through MLflow, whatever happens on the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sampling_support import make_here, write_weights
from tests_support import write_shapes
from tracking_support import Server, until

from data_shards.problems import InputProblems
from segdiff_dist.export.register import register_evaluated
from segdiff_dist.pipeline import SegGuidedPipeline
from segdiff_dist.sampling.store import SampleStore
from segdiff_dist.tracking.config import TrackingConfig
from segdiff_dist.tracking.mlflow_run import tracking_uri
from segdiff_dist.tracking.spool import Spool, num_waiting
from segdiff_dist.tracking.tracker import SPOOL, Tracker, send_spool

QUIET = TrackingConfig(system_metrics=False)
IMPATIENT = TrackingConfig(system_metrics=False, flush_timeout_s=0.2)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes") / "shards", num_patients=1, slices=2)


def sampled(run: Path, shapes: Path, seed: int = 0) -> SampleStore:
    """A run folder with a model, as trained with zero terminal SNR, and its samples."""
    write_weights(run, seed, mask_dropout=0.1)
    return make_here(run, shapes, num=3, precision="fp32")


def evaluated(run: Path, dice: float, config: TrackingConfig = QUIET, **trust: Any) -> str | None:
    """What `segdiff evaluate` does once it has measured; returns the MLflow run's id."""
    with Tracker(run, config, "evaluate") as tracker:
        summary: dict[str, Any] = {
            "num_samples": 3,
            "metrics": {"dice_mask_gen": {"value": dice}, "psnr_db": {"value": 20.0}},
        }
        summary["trust"] = trust
        register_evaluated(run, summary, tracker)
    return tracker.run_id


def versions(run: Path, name: str = "segdiff") -> list[Any]:
    """The name's versions, oldest first."""
    from mlflow.tracking import MlflowClient

    found = MlflowClient(tracking_uri=tracking_uri(run)).search_model_versions(f"name = '{name}'")
    return sorted(found, key=lambda version: int(version.version))


def loaded(version: int, run: Path, monkeypatch: pytest.MonkeyPatch) -> SegGuidedPipeline:
    """As docs/watching.md says."""
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri(run))
    folder = mlflow.artifacts.download_artifacts(f"models:/segdiff/{version}")
    return SegGuidedPipeline.from_pretrained(folder, device="cpu")


def makes_the_images(pipeline: SegGuidedPipeline, store: SampleStore) -> bool:
    """Whether the pipeline makes the store's images, to the bit: its model, and its sampler."""
    return all(
        np.array_equal(
            np.asarray(pipeline(store.mask[at], item["target_modality"], axis=item["axis"], first_item=at)),
            store.image[at],
        )
        for at, item in enumerate(store.items.to_pylist())
    )


def test_each_model_is_registered_once_and_generates_what_was_evaluated(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    store = sampled(run, shapes)
    run_id = evaluated(run, 0.5)
    [version] = versions(run)
    assert version.run_id == run_id is not None
    assert version.tags == {
        "weights_digest": store.job["weights_digest"],
        "shards_digest": store.job["shards_digest"],
        "num_samples": "3",
        "dice_mask_gen": "0.5",
        "psnr_db": "20",
    }
    assert makes_the_images(loaded(1, run, monkeypatch), store)
    # The weights that were sampled from, and the artifact: no third copy.
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2
    assert list((run / SPOOL).iterdir()) == []

    assert evaluated(run, 0.6) == run_id
    [again] = versions(run)
    assert again.tags == version.tags | {"dice_mask_gen": "0.6"}
    assert list((run / SPOOL).iterdir()) == []

    for passed, outcome in ((False, "failed"), (None, "not known"), (True, "passed")):
        evaluated(run, 0.6, memorisation={"passed": passed})
        assert versions(run)[0].tags == again.tags | {"memorisation": outcome}

    other = tmp_path / "other"  # another model of the same name, in the same store
    assert not makes_the_images(loaded(1, run, monkeypatch), sampled(other, shapes, seed=1))
    evaluated(other, 0.7)
    assert [v.tags["dice_mask_gen"] for v in versions(run)] == ["0.6", "0.7"]
    evaluated(other, 0.7, TrackingConfig(system_metrics=False, register="mine"))
    assert [len(versions(run, name)) for name in ("segdiff", "mine")] == [2, 1]
    evaluated(other, 0.8, TrackingConfig(system_metrics=False, register=None))
    assert [len(versions(run, name)) for name in ("segdiff", "mine")] == [2, 1]


def test_a_server_that_is_away_costs_nothing_and_a_lost_answer_makes_no_second_version(
    server: Server, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    run = tmp_path / "run"
    store = sampled(run, shapes)
    for dice in (0.5, 0.6):
        with pytest.warns(UserWarning, match="records for MLflow"):
            evaluated(run, dice, IMPATIENT)
    assert len(list((run / SPOOL).glob("model-*"))) == 1
    write_weights(run, seed=1, mask_dropout=0.1)  # training goes on, and evaluation's model is kept all the same
    server.start()
    until(server.answers)

    create = MlflowClient.create_model_version

    def unheard(*args: Any, **kwargs: Any) -> None:
        create(*args, **kwargs)
        raise ConnectionError("the answer was lost")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "create_model_version", unheard)
        with pytest.raises(InputProblems, match="the answer was lost"):
            send_spool(run)
    assert [version.tags["dice_mask_gen"] for version in versions(run)] == ["0.5"]
    send_spool(run)
    [version] = versions(run)
    assert version.tags["dice_mask_gen"] == "0.6"
    assert num_waiting(run / SPOOL) == 0
    assert list((run / SPOOL).iterdir()) == []
    assert makes_the_images(loaded(1, run, monkeypatch), store)


def test_what_cannot_be_registered_is_said_and_passed_over(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    store = sampled(run, shapes)
    store.job["sample"]["sampler"]["timestep_spacing"] = "leading"
    (store.path / "job.json").write_text(json.dumps(store.job))
    with pytest.warns(UserWarning, match=r"not entered into MLflow's registry.*zero_terminal_snr"):
        evaluated(run, 0.5)
    write_weights(run, seed=1)
    with pytest.warns(UserWarning, match="not those that made the samples"):
        evaluated(run, 0.5)
    assert list((run / SPOOL).iterdir()) == []
    assert versions(run) == []

    # Refused by MLflow: put aside, and what is queued behind it goes on.
    spool = Spool.create(run / SPOOL)
    kept = run / SPOOL / "model-x"
    kept.mkdir()
    spool.append({"kind": "model", "ms": 0, "name": "a/b", "digest": "0" * 64, "tags": {}, "path": f"{SPOOL}/model-x"})
    spool.append({"kind": "model", "ms": 0, "name": "c", "digest": "0" * 64, "tags": {}, "path": f"{SPOOL}/model-gone"})
    spool.append({"kind": "tags", "ms": 0, "values": {"behind": "yes"}})
    spool.close()
    with pytest.warns(UserWarning, match="does not take a record"):
        assert send_spool(run) == 3
    assert not kept.exists()
    reasons = [json.loads(line)["reason"] for line in (run / "mlflow_refused.jsonl").read_text().splitlines()]
    assert ["model: name" in reasons[0], "is gone" in reasons[1], len(reasons)] == [True, True, 2]


@pytest.mark.parametrize("name", ["", "a/b", "a:b", "it's", "..", "x" * 101])
def test_names_that_cannot_be_used_are_refused(name: str) -> None:
    [found] = TrackingConfig(register=name).problems()
    assert found.field == "tracking.register"
    assert TrackingConfig(register="segdiff CT-MR 2.0").problems() == []
