"""One MLflow database for the run folders of a project: where it is, whose it is, and what its pages show."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from segdiff_dist.evaluation.report.tracked import tracked_run
from segdiff_dist.tracking.config import TrackingConfig
from segdiff_dist.tracking.link import is_foreign
from segdiff_dist.tracking.mlflow_run import MlflowRun, tracking_uri
from segdiff_dist.tracking.tracker import Tracker, send_spool

QUIET = TrackingConfig(system_metrics=False)


def client(run: Path) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=tracking_uri(run))


def recorded(run: Path, stage: str = "train", dice: float = 0.5) -> str:
    """A stage in a run folder with everything that a stage records; the MLflow run's id."""
    with Tracker(run, QUIET, stage) as tracker:
        tracker.log_metrics({"dice": dice})
        tracker.log_about(f"{stage} says {dice}.", "smoke" if stage == "train" else None)
        tracker.log_dataset("amos", "ab" * 32, "/data/amos", "training", {"num_slices": 7})
        tracker.log_table(("metric", "value"), [["dice", dice], ["none", None]], "evaluation/metrics.json")
    assert tracker.run_id is not None
    return tracker.run_id


def test_the_runs_of_a_project_are_in_one_database_that_moves_with_it(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    ids = {name: recorded(runs / name) for name in ("a", "b")}
    assert [path.name for path in sorted(runs.rglob("*.db"))] == ["mlflow.db"]
    found = client(runs / "a")
    [experiment] = [one for one in found.search_experiments() if one.name == "segdiff"]
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    assert {run.info.run_id for run in found.search_runs([experiment.experiment_id])} == set(ids.values())
    tracked = tracked_run(runs / "a")
    assert tracked is not None
    assert tracked.command == f"mlflow ui --backend-store-uri sqlite:///{runs / 'mlflow.db'}"

    moved = runs.rename(tmp_path / "moved")
    with Tracker(moved / "c", QUIET, "train") as tracker:
        pass  # MLflow remembers the places of a run's artifacts within a process: a run without any goes on
    again = moved.rename(tmp_path / "again")
    assert recorded(again / "c", "evaluate", dice=0.75) == tracker.run_id
    [table] = client(again / "c").list_artifacts(tracker.run_id, "evaluation")
    path = again / "mlartifacts" / str(tracker.run_id) / "artifacts" / table.path
    assert json.loads(path.read_text()) == {"columns": ["metric", "value"], "data": [["dice", 0.75], ["none", None]]}
    assert not runs.exists()
    assert not moved.exists()


def test_a_copied_run_folder_has_a_run_of_its_own(tmp_path: Path) -> None:
    """Its records would stand in the original's run as if they were of that. A folder that was moved goes on."""
    original, copied = tmp_path / "runs" / "a", tmp_path / "runs" / "b"
    first = recorded(original)
    shutil.copytree(original, copied)
    with pytest.warns(UserWarning, match="b is a copy of .*a: its records go to an MLflow run of its own"):
        second = recorded(copied, "evaluate", dice=0.9)
    assert second != first
    assert client(copied).get_run(second).data.tags["run_folder"] == str(copied)
    moved = original.rename(tmp_path / "runs" / "c")
    with Tracker(moved, QUIET, "evaluate") as tracker:
        tracker.log_metrics({"psnr_db": 20.0})
    assert tracker.run_id == first
    assert client(moved).get_run(first).data.metrics == {"dice": 0.5, "psnr_db": 20.0}
    with Tracker(copied, QUIET, "report") as tracker:
        pass
    assert tracker.run_id == second


def test_a_run_says_what_it_is(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a"
    run_id = recorded(run)
    found = client(run).get_run(run_id)
    assert found.info.run_name == "a (smoke)"
    assert found.data.tags["mlflow.source.name"] == "segdiff train"
    assert len(found.data.tags["mlflow.source.git.commit"]) == 40
    assert json.loads(found.data.tags["mlflow.loggedArtifacts"])[0]["path"] == "evaluation/metrics.json"
    [read] = found.inputs.dataset_inputs
    assert (read.dataset.name, read.dataset.digest) == ("amos", "ab" * 6)
    assert json.loads(read.dataset.profile) == {"num_slices": 7, "digest": "ab" * 32}
    assert [(tag.key, tag.value) for tag in read.tags] == [("mlflow.data.context", "training")]

    # What a person has written stays; each stage's paragraph is there once.
    client(run).update_run(run_id, name="the good one")
    client(run).set_tag(run_id, "mlflow.note.content", found.data.tags["mlflow.note.content"] + "\n\nMine.")
    recorded(run, "evaluate")
    recorded(run, dice=0.25)
    found = client(run).get_run(run_id)
    assert found.info.run_name == "the good one"
    note = found.data.tags["mlflow.note.content"].split("\n\n")
    assert note == ["Mine.", "**evaluate**: evaluate says 0.5.", "**train**: train says 0.25."]


@pytest.mark.parametrize("why", ["anybody may write", "somebody else's database", "not wanted"])
def test_where_nothing_can_be_beside_it_the_database_is_in_the_folder(tmp_path: Path, why: str) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    if why == "anybody may write":
        runs.chmod(0o777)
    if why == "somebody else's database":
        (runs / "mlflow.db").write_text("not ours")
    run = runs / "a"
    run.mkdir()
    assert MlflowRun(run, shared=why != "not wanted").store == run
    runs.chmod(0o700)
    (runs / "mlflow.db").unlink(missing_ok=True)
    assert MlflowRun(run, shared=True).store == run  # it stays where it began


def test_a_project_from_somebody_else_is_foreign_with_its_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, other = tmp_path / "runs" / "a", tmp_path / "runs" / "b"
    first, _ = recorded(run), recorded(other)
    with sqlite3.connect(tmp_path / "runs" / "mlflow.db") as database:
        database.execute("UPDATE runs SET artifact_uri = ?", ((tmp_path / "victim").as_uri(),))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another_user"))
    assert is_foreign(run)
    with pytest.warns(UserWarning, match="MLflow records nothing here"), Tracker(run, QUIET, "sample") as tracker:
        assert not tracker.records
    new = tmp_path / "runs" / "new"  # a folder of one's own, beside a database that is not
    new.mkdir()
    assert MlflowRun(new, shared=True).store == new

    # Adopted, it goes on in its run, and in no other of that database, whatever its file says.
    assert send_spool(run, adopts=True) == 0
    assert recorded(run, "sample") == first
    link = json.loads((other / "mlflow.json").read_text())
    (other / "mlflow.json").write_text(json.dumps(link | {"run_id": first}))
    with Tracker(other, TrackingConfig(system_metrics=False, adopt=True), "sample") as adopted:
        pass
    assert adopted.run_id not in (None, first)
    assert not (tmp_path / "victim").exists()
