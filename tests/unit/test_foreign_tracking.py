"""The tracking of a run folder that somebody else made: nothing outside of it is read, written or removed."""

from __future__ import annotations

import json
import os
import random
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from sampling_support import make_here, write_weights

from data_shards.problems import InputProblems
from segdiff_dist import cli
from segdiff_dist.evaluation.report.tracked import tracked_run
from segdiff_dist.tracking.config import TrackingConfig
from segdiff_dist.tracking.link import is_foreign
from segdiff_dist.tracking.mlflow_run import tracking_uri
from segdiff_dist.tracking.path_checks import why_not_inside
from segdiff_dist.tracking.spool import Spool, num_waiting
from segdiff_dist.tracking.tracker import SPOOL, Tracker, send_spool

QUIET = TrackingConfig(system_metrics=False, shared_store=False)
ADOPTING = TrackingConfig(system_metrics=False, shared_store=False, adopt=True)
LINK = {"tracking_uri": None, "experiment": "segdiff", "run_id": None, "token": "0" * 32, "began_s": 0}


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """What a stranger's folder must not reach."""
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "thesis.txt").write_text("precious")
    return tmp_path / "victim"


def stranger(run: Path, *records: dict[str, Any], **link: Any) -> Path:
    """A run folder with a spool that this user did not write."""
    (run / SPOOL).mkdir(parents=True)
    (run / "mlflow.json").write_text(json.dumps({**LINK, **link}))
    lines = "".join(json.dumps({"ms": 0, **record}) + "\n" for record in records)
    (run / SPOOL / "00000000000000000001-1.jsonl").write_text(lines)
    return run


def outside(victim: Path) -> list[dict[str, Any]]:
    """Records whose paths lead to the victim."""
    paths = [str(victim), f"../{victim.name}", f"{SPOOL}/../../{victim.name}", "to_victim", f"{SPOOL}/model-x"]
    models = [{"kind": "model", "name": "segdiff", "digest": "abc", "tags": {}, "path": path} for path in paths]
    files = [str(victim / "thesis.txt"), f"../{victim.name}/thesis.txt", "to_victim/thesis.txt", "to_thesis", "below"]
    return [*models, *({"kind": "artifact", "folder": None, "path": path} for path in files)]


def with_links(run: Path, victim: Path) -> Path:
    (run / "to_victim").symlink_to(victim)
    (run / "to_thesis").symlink_to(victim / "thesis.txt")
    (run / "below").mkdir()
    (run / "below" / "deep").symlink_to(victim)
    return run


def kept(run: Path) -> list[str]:
    """Every file of the artifacts' folder."""
    return sorted(path.name for path in (run / "mlartifacts").rglob("*") if path.is_file())


def test_nothing_waits_in_a_strangers_folder_before_it_is_adopted(
    tmp_path: Path, victim: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attacker = tmp_path / "attacker.db"
    run = stranger(
        tmp_path / "run",
        *outside(victim),
        {"kind": "tags", "values": {"sent": "yes"}},
        tracking_uri=f"sqlite:///{attacker}",
    )
    with_links(run, victim)
    before = sorted(run.rglob("*"))
    with pytest.raises(InputProblems, match=r"begun by another user.*--adopt"):
        send_spool(run)
    with pytest.warns(UserWarning, match="MLflow records nothing here"):
        stage = Tracker(run, QUIET, "evaluate")
    with stage as tracker:
        tracker.log_metrics({"x": 1.0})
        tracker.log_artifact(victim / "thesis.txt")
        assert not tracker.registers_models
    assert sorted(run.rglob("*")) == before
    assert not attacker.exists()

    with pytest.warns(UserWarning, match="which is not used"):
        assert send_spool(run, adopts=True) == len(outside(victim)) + 1
    assert (victim / "thesis.txt").read_text() == "precious"
    assert not attacker.exists()
    assert (run / "mlflow.db").is_file()
    assert kept(run) == []
    refused = [json.loads(line)["path"] for line in (run / "mlflow_refused.jsonl").read_text().splitlines()]
    # A model that is gone may have been registered before: MLflow is asked, and has none.
    assert refused == [record["path"] for record in outside(victim)]
    assert not is_foreign(run)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another_user"))
    assert is_foreign(run)


def test_a_folder_of_ones_own_may_be_moved_and_what_is_changed_in_it_is_not_trusted(
    tmp_path: Path, victim: Path
) -> None:
    with Tracker(tmp_path / "run", QUIET, "train") as first:
        pass
    run = (tmp_path / "run").rename(tmp_path / "moved")
    (run / "own.txt").write_text("own")
    with Tracker(run, QUIET, "evaluate") as second:
        second.log_artifact(run / "own.txt")
        second.log_artifact(victim / "thesis.txt", "theses")  # what our own stage records may be elsewhere
    assert first.run_id == second.run_id is not None
    assert kept(run) == ["own.txt", "thesis.txt"]
    assert not (tmp_path / "run").exists()
    assert list((run / SPOOL).iterdir()) == []

    # Also in a folder of one's own no record leads out of it.
    spool = Spool.create(run / SPOOL)
    for record in outside(victim):
        spool.append({"ms": 0, **record})
    spool.close()
    with_links(run, victim)
    with pytest.warns(UserWarning, match="does not take a record"):
        send_spool(run)
    assert (victim / "thesis.txt").read_text() == "precious"
    assert kept(run) == ["own.txt", "thesis.txt"]

    link = json.loads((run / "mlflow.json").read_text())
    (run / "mlflow.json").write_text(json.dumps({**link, "tracking_uri": "http://127.0.0.1:9"}))
    assert is_foreign(run)
    (run / "mlflow.json").unlink()
    assert is_foreign(run)  # by what is there


def test_a_strangers_database_does_not_say_where_artifacts_go(tmp_path: Path, victim: Path) -> None:
    run = tmp_path / "run"
    with Tracker(run, QUIET, "train") as tracker:
        pass
    with sqlite3.connect(run / "mlflow.db") as database:
        database.execute("UPDATE runs SET artifact_uri = ?", (victim.as_uri(),))
        database.execute("UPDATE experiments SET artifact_location = ?", (victim.as_uri(),))
    (run / "mine.txt").write_text("mine")
    with Tracker(run, QUIET, "sample") as again:
        again.log_artifact(run / "mine.txt")
    assert (again.run_id, kept(run)) == (tracker.run_id, ["mine.txt"])
    assert os.listdir(victim) == ["thesis.txt"]

    artifacts = run / "mlartifacts" / str(again.run_id) / "artifacts"
    (artifacts / "mine.txt").unlink()
    (artifacts / "mine.txt").symlink_to(victim / "thesis.txt")
    with pytest.warns(UserWarning, match="is a link"), Tracker(run, QUIET, "sample") as again:
        again.log_artifact(run / "mine.txt")
    assert (victim / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize("name", ["mlflow.db", "mlflow.db-journal", SPOOL, "mlartifacts", "mlflow_refused.jsonl"])
def test_what_tracking_writes_is_no_link_where_a_folder_is_adopted(tmp_path: Path, victim: Path, name: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "mlflow.json").write_text(json.dumps(LINK))
    (run / name).symlink_to(victim if name in (SPOOL, "mlartifacts") else victim / "thesis.txt")
    with pytest.raises(InputProblems, match="a link, a device or a pipe"), Tracker(run, ADOPTING, "evaluate"):
        pass
    assert [path.read_text() for path in victim.iterdir()] == ["precious"]


def test_no_pipe_is_waited_for(tmp_path: Path) -> None:
    run = stranger(tmp_path / "run", {"kind": "tags", "values": {"a": "b"}})
    for name in ("0.jsonl", "00000000000000000001-1.sent"):
        os.mkfifo(run / SPOOL / name)
    assert num_waiting(run / SPOOL) == 1
    with pytest.raises(InputProblems, match="a pipe"):
        send_spool(run, adopts=True)
    os.mkfifo(run / "pipe")
    assert "pipe" in str(why_not_inside(run, "pipe"))
    (run / "mlflow.json").unlink()
    os.mkfifo(run / "mlflow.json")
    assert is_foreign(run)


def test_mutated_files_end_in_a_message(tmp_path: Path) -> None:
    """Bytes of the link and of the spool's lines changed at random, and lines that JSON can write and MLflow cannot
    take: all that remains is sent, the rest is put aside."""
    odd: list[Any] = [None, [], {}, -1, 1e999, 10**400, "", "x" * 300, "\ud800", "a\0b", {"a": {}}, True, "../x"]
    lines = [
        {"kind": "metrics", "ms": 0, "step": 1, "values": {"a": 1.0}},
        {"kind": "params", "ms": 0, "values": {"p": "1"}},
        {"kind": "tags", "ms": 0, "values": {"t": "1"}},
        {"kind": "artifact", "ms": 0, "path": "file", "folder": None},
        {"kind": "model", "ms": 0, "name": "m", "digest": "abc", "tags": {}, "path": f"{SPOOL}/model-m"},
        {"kind": "status", "ms": 0, "status": "FINISHED"},
    ]
    records = [{**line, key: value} for line in lines for key in line for value in odd]
    run = stranger(tmp_path / "run", *records)
    rng = random.Random(0)
    with (run / SPOOL / "00000000000000000001-1.jsonl").open("ab") as file:
        for line in lines * 20:
            damaged = bytearray(json.dumps(line).encode())
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            file.write(bytes(damaged).replace(b"\n", b" ") + b"\n")
        file.write(b"[" * 20_000 + b"\n" + json.dumps({"kind": "tags", "values": {"last": "yes"}}).encode() + b"\n")
    (run / SPOOL / "00000000000000000001-1.sent").write_text("-7")
    with pytest.warns(UserWarning, match="does not take a record"):
        send_spool(run, adopts=True)
    assert num_waiting(run / SPOOL) == 0

    from mlflow.tracking import MlflowClient

    run_id = json.loads((run / "mlflow.json").read_text())["run_id"]
    assert MlflowClient(tracking_uri=tracking_uri(run)).get_run(run_id).data.tags["last"] == "yes"

    text = (run / "mlflow.json").read_bytes()
    for _ in range(200):
        damaged = bytearray(text)
        damaged[rng.randrange(len(text))] = rng.randrange(256)
        (run / "mlflow.json").write_bytes(damaged)
        assert is_foreign(run) or json.loads(damaged) == json.loads(text)
        tracked_run(run)


@pytest.mark.parametrize("name", ["is dice 0.8? yes", "a%20b", "50% #2 ümlaut+&'"])
def test_the_store_is_in_the_folder_whatever_it_is_called(tmp_path: Path, name: str) -> None:
    run = tmp_path / "runs" / name
    with Tracker(run, QUIET, "train") as tracker:
        tracker.log_metrics({"a": 1.0}, 1)
        run.joinpath("own.txt").write_text("own")
        tracker.log_artifact(run / "own.txt")
    assert (run / "mlflow.db").is_file()
    assert kept(run) == ["own.txt"]
    assert os.listdir(run.parent) == [name]
    with Tracker(run, QUIET, "sample") as again:
        pass
    assert again.run_id == tracker.run_id is not None
    found = tracked_run(run)
    assert found is not None
    assert str(found.command).startswith("cd ")


@pytest.mark.parametrize("command", ["evaluate", "report", "export"])
def test_an_address_in_a_strangers_samples_is_not_connected_to(
    shapes: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse_to_connect(*_: Any, **__: Any) -> None:
        raise AssertionError("connected")

    run = make_here(write_weights(tmp_path / "run"), shapes, num=1).path.parent
    job = json.loads((run / "samples" / "job.json").read_text()) | {"shards": "http://192.0.2.1/shards"}
    (run / "samples" / "job.json").write_text(json.dumps(job))
    monkeypatch.setattr("data_shards.store.shards.ShardSet.open", refuse_to_connect)
    arguments = {"evaluate": ["--run", run], "report": [run], "export": [tmp_path / "out", "--run", run]}[command]
    assert cli.main([command, *map(str, arguments)]) == 2
    assert "an address is not taken from a run folder" in capsys.readouterr().err
