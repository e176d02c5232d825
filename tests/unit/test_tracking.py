"""Tracking with a server that is down, hangs, dies and comes back: steps go on, and nothing is lost."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tracking_support import Server, free_port, until

from data_shards.end_signals import Ended
from data_shards.problems import InputProblems
from segdiff_dist.tracking.config import TrackingConfig
from segdiff_dist.tracking.mlflow_run import tracking_uri
from segdiff_dist.tracking.spool import Spool, num_waiting
from segdiff_dist.tracking.tracker import SPOOL, Tracker, send_spool

QUIET = TrackingConfig(system_metrics=False)
IMPATIENT = TrackingConfig(system_metrics=False, flush_timeout_s=0.2)


def client(folder: Path) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=tracking_uri(folder))


def steps_of(folder: Path, run_id: str, key: str) -> list[int]:
    history = client(folder).get_metric_history(run_id, key)
    assert all(metric.value == metric.step / 2 for metric in history)
    return [metric.step for metric in sorted(history, key=lambda metric: (metric.timestamp, metric.step))]


def test_a_server_that_comes_late_and_is_killed_loses_nothing(server: Server, tmp_path: Path) -> None:
    run = tmp_path / "run"
    picture = tmp_path / "picture.txt"
    picture.write_text("kept")
    with Tracker(run, QUIET, "train") as tracker:
        tracker.log_params({"train": {"lr": 0.1}})
        for step in range(0, 300):
            tracker.log_metrics({"train/loss": step / 2}, step)
        assert tracker.run_id is None
        server.start()
        until(lambda: num_waiting(run / SPOOL) == 0)
        assert tracker.run_id is not None
        # Killed while records are on their way to it.
        for step in range(300, 1000):
            tracker.log_metrics({"train/loss": step / 2}, step)
            if step == 600:
                server.kill()
        tracker.log_artifact(picture)
        assert num_waiting(run / SPOOL) > 0
        server.start()
    assert num_waiting(run / SPOOL) == 0
    assert list((run / SPOOL).iterdir()) == []
    assert steps_of(run, tracker.run_id, "train/loss") == list(range(1000))
    found = client(run).get_run(tracker.run_id)
    assert found.info.status == "FINISHED"
    assert found.data.tags["stage.train"] == "finished"
    assert found.data.params["train.lr"] == "0.1"
    assert [a.path for a in client(run).list_artifacts(tracker.run_id)] == ["picture.txt"]
    assert len(client(run).search_runs(["0", found.info.experiment_id])) == 1


def test_a_step_never_waits_for_a_server_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts and never answers
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
        took_s = []
        with Tracker(tmp_path / "run", IMPATIENT, "train") as tracker:
            start = time.perf_counter()  # MLflow, which takes seconds to import, is there
            for step in range(500):
                begin = time.perf_counter()
                tracker.log_metrics({"train/loss": 0.5, "train/lr": 0.1}, step)
                took_s.append(time.perf_counter() - begin)
                time.sleep(0.001)
        assert time.perf_counter() - start < 5
    # One in a hundred may wait for the core, as long as other tests hold it; none for the server, which takes a second.
    assert sorted(took_s)[int(0.99 * len(took_s))] < 0.02
    assert max(took_s) < 0.8
    assert tracker.run_id is None
    assert num_waiting(tmp_path / "run" / SPOOL) == 504
    assert any(f"504 records for MLflow at {tracking_uri(tmp_path / 'run')} wait" in str(w.message) for w in recwarn)


def test_the_end_of_a_stage_says_that_it_waits_and_not_long_for_a_dead_server(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    with Tracker(tmp_path / "run", QUIET, "train"):
        until(lambda: any("accepts nothing now" in str(one.message) for one in recwarn.list))
        begun = time.monotonic()
    assert time.monotonic() - begun < 20  # of 30
    assert "waiting up to 3 s for MLflow at http://127.0.0.1" in capsys.readouterr().err


def test_what_a_killed_process_recorded_is_sent_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    program = f"""
import os, signal
from pathlib import Path
from segdiff_dist.tracking.tracker import Tracker, TrackingConfig
tracker = Tracker(Path({str(run)!r}), TrackingConfig(system_metrics=False), "train")
for step in range(50):
    tracker.log_metrics({{"train/loss": step / 2}}, step)
os.kill(os.getpid(), signal.SIGKILL)
"""
    nowhere = f"http://127.0.0.1:{free_port()}"
    killed = subprocess.run([sys.executable, "-c", program], env={**os.environ, "MLFLOW_TRACKING_URI": nowhere})
    assert killed.returncode == -signal.SIGKILL
    assert num_waiting(run / SPOOL) == 52
    with pytest.raises(InputProblems, match="52 records still wait"):
        send_spool(run)  # remembers where the run was begun
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'other.db'}")
    with Tracker(run, QUIET, "train") as tracker:
        for step in range(50, 60):
            tracker.log_metrics({"train/loss": step / 2}, step)
    assert tracker.run_id is not None
    assert steps_of(run, tracker.run_id, "train/loss") == list(range(60))
    assert send_spool(run) == 0


def test_records_sent_twice_count_once(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with Tracker(run, QUIET, "train") as tracker:
        tracker.log_metrics({"train/loss": 0.0}, 0)
    # Killed between sending and noting it: the same lines, and no note.
    spool = Spool.create(run / SPOOL)
    for step in (0, 1, 2):
        spool.append({"kind": "metrics", "ms": 1000 + step, "values": {"train/loss": step / 2}, "step": step})
    copy = spool.path.read_bytes()
    spool.close()
    assert send_spool(run) == 3
    (run / SPOOL / "00000000000000000001-1.jsonl").write_bytes(copy)
    assert send_spool(run) == 3
    assert tracker.run_id is not None
    assert sorted(steps_of(run, tracker.run_id, "train/loss")) == [0, 0, 1, 2]  # the first was another, at its own time


def test_what_mlflow_refuses_holds_nothing_up(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    run = tmp_path / "run"
    with Tracker(run, QUIET, "train") as tracker:
        tracker.log_metrics({"good": 0.5}, 1)
        tracker.log_metrics({"good": 1.0, "left_out": float("nan")}, 2)
    spool = Spool.create(run / SPOOL)
    spool.append({"kind": "metrics", "ms": 1, "values": {"bad;name": 1.0}, "step": 1})  # which log_metrics would rename
    spool.append({"kind": "artifact", "ms": 0, "path": "gone.txt", "folder": None})
    spool.append({"kind": "metrics", "ms": 3, "values": {"good": 1.5}, "step": 3})
    spool.close()
    assert send_spool(run) == 3
    assert tracker.run_id is not None
    assert sorted(steps_of(run, tracker.run_id, "good")) == [1, 2, 3]
    kept = (run / "mlflow_refused.jsonl").read_text().splitlines()
    assert ["bad;name" in kept[0], "gone.txt" in kept[1], len(kept)] == [True, True, 2]
    assert sum("does not take a record" in str(w.message) for w in recwarn) == 2


def test_stages_share_a_run_and_a_failure_is_marked(tmp_path: Path) -> None:
    def fail() -> None:
        with Tracker(tmp_path / "run", QUIET, "sample"):
            raise RuntimeError("out of luck")

    with Tracker(tmp_path / "run", QUIET, "train") as first:
        first.log_params({"seed": 1})
    with pytest.raises(RuntimeError):
        fail()
    (tmp_path / "run").rename(tmp_path / "moved")
    with pytest.raises(Ended), Tracker(tmp_path / "moved", QUIET, "train-segmenter") as ended:
        raise Ended("SIGTERM")
    assert ended.run_id is not None
    assert client(tmp_path / "moved").get_run(ended.run_id).info.status == "KILLED"
    with Tracker(tmp_path / "moved", QUIET, "evaluate") as last:
        last.log_params({"seed": 2, "more": "x"})
    assert first.run_id == last.run_id is not None
    found = client(tmp_path / "moved").get_run(last.run_id)
    assert found.data.params == {"seed": "1", "more": "x"}
    stages = {key: value for key, value in found.data.tags.items() if key.startswith("stage.")}
    finished = {"stage.train": "finished", "stage.evaluate": "finished"}
    assert stages == finished | {"stage.sample": "failed", "stage.train-segmenter": "interrupted"}


def test_system_metrics_go_under_mlflows_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    with Tracker(tmp_path / "run", TrackingConfig(), "train") as tracker:
        time.sleep(0.5)
    metrics = client(tmp_path / "run").get_run(tracker.run_id).data.metrics
    assert 0 <= metrics["system/cpu_utilization_percentage"] <= 100
    assert metrics["system/system_memory_usage_megabytes"] > 100


def test_a_damaged_line_is_passed_over(tmp_path: Path) -> None:
    spool = Spool.create(tmp_path)
    spool.append({"kind": "tags", "values": {"a": "1"}})
    with spool.path.open("ab") as file:
        file.write(b'{"kind": "ta\n')
    spool.append({"kind": "tags", "values": {"b": "2"}})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        records = [record["values"] for record, _ in spool.waiting()]
    assert records == [{"a": "1"}, {"b": "2"}]
    assert "damaged" in str(said[0].message)
    assert Spool.adopt(spool.path) is None  # its writer is alive
    spool.close()


def test_a_folder_never_tracked_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputProblems, match="never tracked"):
        send_spool(tmp_path)
    assert TrackingConfig(flush_timeout_s=-1).problems()


def test_a_database_on_a_full_disk_is_said_once(
    disk_of: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = TrackingConfig(system_metrics=False, shared_store=False, flush_timeout_s=3.0)
    disk = disk_of(16)
    with Tracker(disk, config, "train"):
        pass
    room = shutil.disk_usage(disk).free - 16 * 1024
    (disk / "ballast").write_bytes(bytes(room))
    capfd.readouterr()
    with pytest.warns(UserWarning, match="MLflow") as said, Tracker(disk, config, "sample") as tracker:
        tracker.log_params({f"name_{i}": "x" * 20 for i in range(100)})
    assert sum("accepts nothing now" in str(one.message) for one in said) == 1
    assert "Traceback" not in capfd.readouterr().err
    (disk / "ballast").unlink()
    with Tracker(disk, QUIET, "sample"):
        pass
    assert num_waiting(disk / SPOOL) == 0
