"""Tracking with MLflow: one MLflow run for each run folder, added to by every stage.

Nothing here waits for a server. A stage's records are appended to a spool in the folder (spool.py), and a thread sends
them in order (mlflow_run.py). While the server does not answer, the thread tries again. Records that are left when the
stage ends are sent by the next stage, or by send_spool. In a folder whose tracking somebody else began (link.py)
nothing is recorded or sent before it is adopted.
"""

from __future__ import annotations

import itertools
import json
import os
import shlex
import shutil
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from data_shards.files import first_line
from data_shards.problems import OutOfSpace, explain_full_disk, problem
from data_shards.progress import QUIET
from segdiff_dist.config import flatten
from segdiff_dist.tracking.config import TrackingConfig
from segdiff_dist.tracking.descriptions import source_tags
from segdiff_dist.tracking.link import SPOOL, adopt, is_foreign
from segdiff_dist.tracking.mlflow_run import MlflowRun, chunks, is_tracked
from segdiff_dist.tracking.records import metric_key
from segdiff_dist.tracking.spool import Record, Spool, num_waiting, spool_files
from segdiff_dist.tracking.system_metrics import SystemMetrics

# MLflow refuses longer parameter values.
_MAX_PARAM = 6000
# MLflow's column for names of runs is not wider. A data set's name is followed by so many digits of its digest.
_MOST_NAME, _DIGITS = 250, 12
# Records that are read from the spool and sent together.
_BATCH = 1000
# Records of this many seconds are gathered into one request: a request holds the interpreter's lock, and many of them
# would slow down the loop.
_GATHER_S = 1.0
# Seconds between two tries while the server does not answer: the first pause, doubled up to the longest.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 10.0
# The end of a stage says that it waits after so long, and then waits so long for a server that has never answered.
_SILENT_S, _NEVER_THERE_S = 1.0, 3.0
# How to take over a folder whose tracking this user did not begin on this machine.
_FOREIGN = "its tracking was begun by another user or on another machine, or was changed since"
_ADOPT = "if you trust the folder, `segdiff track {} --adopt` takes it over"


class Tracker:
    """One stage's view of the folder's MLflow run. Use as a context manager; an exception marks the run as failed.

    The log_ methods write a line to the spool and return, server or no server. Raises OutOfSpace when the disk is full.
    """

    def __init__(self, folder: Path, config: TrackingConfig, stage: str) -> None:
        self.folder, self.config, self.stage = folder, config, stage
        self._sender: _Sender | None = None
        self._spool: Spool | None = None
        if config.enabled and _may_track(folder, config.adopt):
            self._run = MlflowRun(folder, config.experiment, config.shared_store)
            self._spool = Spool.create(folder / SPOOL)
            self._append("tags", values={f"stage.{stage}": "running", **source_tags(stage)})
            self._append("status", status="RUNNING")
            self._sender = _Sender(self._run, self._spool)
            self._sender.start()
            self._watch = SystemMetrics(self.log_metrics, self._run.began_s) if config.system_metrics else None

    @property
    def records(self) -> bool:
        """Whether anything is recorded: tracking is on, and the folder is this user's."""
        return self._sender is not None

    @property
    def run_id(self) -> str | None:
        """The MLflow run's id; None if tracking is off, and until the store has answered for the first time."""
        return None if self._sender is None else self._run.run_id

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self._sender is None:
            return
        if self._watch is not None:
            self._watch.stop()
        state = "finished" if kind is None else "interrupted" if issubclass(kind, KeyboardInterrupt) else "failed"
        try:
            self._append("tags", values={f"stage.{self.stage}": state})
            self._append("status", status={"finished": "FINISHED", "interrupted": "KILLED"}.get(state, "FAILED"))
        except OutOfSpace:
            if kind is None:
                raise
        if not self._sender.finish(self.config.flush_timeout_s):
            warnings.warn(
                f"{num_waiting(self.folder / SPOOL)} records for MLflow at {self._run.uri} wait in "
                f"{self.folder / SPOOL}; the next stage in this folder sends them, or `segdiff track "
                f"{shlex.quote(str(self.folder))}`",
                stacklevel=2,
            )

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Record settings, nested sections as dotted names. A value already recorded stays as it was."""
        self._append("params", values={key: str(value)[:_MAX_PARAM] for key, value in flatten(values).items()})

    def log_metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Record numbers under stable names at `step` (images seen, for training). NaN values are left out."""
        numbers = {metric_key(key): float(value) for key, value in values.items()}
        self._append("metrics", values={k: v for k, v in numbers.items() if v == v}, step=step)

    def log_about(self, text: str, recipe: str | None = None) -> None:
        """Say in the run's description what this stage does or has found, in place of what it said before. `recipe`:
        the name of the configuration; the run is named after it and the folder, unless a person has named it."""
        name = None if recipe is None else f"{self.folder.resolve().name} ({recipe})"[:_MOST_NAME]
        self._append("about", stage=self.stage, text=text, run_name=name)

    def log_dataset(self, name: str, digest: str, source: str, context: str, profile: Mapping[str, Any]) -> None:
        """Record data that the stage reads; `context`: what for ("training"); `profile`: how much of it."""
        whole = json.dumps({**profile, "digest": digest})
        self._append("dataset", name=name, digest=digest[:_DIGITS], source=source, context=context, profile=whole)

    def log_table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]], artifact: str) -> None:
        """Keep a table with the run, as MLflow's log_table does: its page shows it. `artifact`: FOLDER/NAME.json."""
        if self._sender is None:
            return
        path = PurePosixPath(artifact)
        copied = self._copy_to(path.name)
        with explain_full_disk(copied.parent):
            copied.write_text(json.dumps({"columns": list(columns), "data": [list(row) for row in rows]}))
        self._append("artifact", path=str(copied.relative_to(self.folder.resolve())), folder=str(path.parent))
        self._append("tags", values={"mlflow.loggedArtifacts": json.dumps([{"path": artifact, "type": "table"}])})

    def _copy_to(self, name: str) -> Path:
        """A place in the spool for a file that is removed when it is sent."""
        copied = self.folder.resolve() / SPOOL / f"copy-{uuid.uuid4().hex}" / name
        copied.parent.mkdir()
        return copied

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Keep a copy of a file, or of a folder's files, with the run.

        For a file in the run folder only the path is spooled: the copy has the file's contents at the time of sending,
        and a file that is missing then is left out with a warning. A file elsewhere is copied into the spool, since
        paths out of the folder are not followed.
        """
        if self._sender is None or not path.exists():
            return
        where, root = path.resolve(), self.folder.resolve()
        if not where.is_relative_to(root):
            copied = self._copy_to(path.name)
            with explain_full_disk(copied.parent):
                shutil.copytree(where, copied) if where.is_dir() else shutil.copyfile(where, copied)
            where = copied
        # Relative, so that a spool moves with its run folder.
        self._append("artifact", path=str(where.relative_to(root)), folder=folder)

    @property
    def registers_models(self) -> bool:
        """Whether `register_model` does anything."""
        return self._sender is not None and self.config.register is not None

    def register_model(self, digest: str, tags: Mapping[str, str], write: Callable[[Path], None]) -> None:
        """Register a model in MLflow as `tracking.register`: one version for each digest, with its tags renewed.

        `write` makes the model's folder at a given path, unless the folder already waits there; its errors are passed
        on. The spool removes the folder once it is sent.
        """
        if not self.registers_models:
            return
        name = self.config.register
        path = Path(SPOOL) / f"model-{name}-{digest[:12]}"
        if not (self.folder / path).exists():
            write(self.folder / path)
        self._append("model", name=name, digest=digest, tags=dict(tags), path=str(path))

    def _append(self, kind: str, **values: Any) -> None:
        if self._spool is not None:
            self._spool.append({"kind": kind, "ms": int(time.time() * 1000), **values})
            if self._sender is not None:
                self._sender.wake()


def send_spool(folder: Path, adopts: bool = False) -> int:
    """Send the records that wait in the folder's spool, from this thread; returns their number.

    Raises InputProblems if the folder has never been tracked or the store does not answer; unsent records stay. Records
    of a foreign folder (link.py) also stay unless it is adopted.
    """
    if not is_tracked(folder):
        raise problem(folder, "run", "was never tracked", "give the folder of a run with tracking")
    if is_foreign(folder):
        if not adopts:
            raise problem(folder, "tracking", _FOREIGN, f"nothing was sent; {_ADOPT.format(shlex.quote(str(folder)))}")
        _adopt(folder)
    run = MlflowRun(folder)
    before = num_waiting(folder / SPOOL)
    try:
        _send_waiting(run, None, lambda: False)
    except Exception as error:  # MLflow's clients pass on all errors of their transports
        left = num_waiting(folder / SPOOL)
        remedy = f"{left} records still wait in {folder / SPOOL}; try again when it is back"
        raise problem(run.uri, "MLflow", first_line(error), remedy) from error
    return before - num_waiting(folder / SPOOL)


def _may_track(folder: Path, adopts: bool) -> bool:
    """Whether a stage may record in the folder, which is made; if not, prints the reason."""
    folder.mkdir(parents=True, exist_ok=True)
    if not is_foreign(folder):
        return True
    if adopts:
        _adopt(folder)
        return True
    warnings.warn(
        f"{folder}: {_FOREIGN}: MLflow records nothing here; {_ADOPT.format(shlex.quote(str(folder)))}", stacklevel=4
    )
    return False


def _adopt(folder: Path) -> None:
    if (other := adopt(folder)) is not None:
        warnings.warn(
            f"{folder} names the MLflow store {other!r}, which is not used; MLFLOW_TRACKING_URI={other} goes on there",
            stacklevel=4,
        )


class _Sender(threading.Thread):
    """Sends the records of the spool, oldest first, and tries again while the store does not answer."""

    def __init__(self, run: MlflowRun, own: Spool) -> None:
        super().__init__(name="mlflow", daemon=True)
        self._mlflow, self._own = run, own
        self._appended, self._closing, self._given_up = threading.Event(), threading.Event(), threading.Event()
        self._done, self._is_dead = False, False

    def wake(self) -> None:
        """Report that there is something to send."""
        self._appended.set()

    def finish(self, timeout_s: float) -> bool:
        """Send the rest within `timeout_s`, after the last append; within a few seconds if the server has failed, and
        never answered. Returns whether everything was sent."""
        self._closing.set()
        self._appended.set()
        end = time.monotonic() + timeout_s
        self.join(min(_SILENT_S, timeout_s))
        most_s = min(end - time.monotonic(), _NEVER_THERE_S if self._is_dead else timeout_s)
        if self.is_alive() and most_s > 0:
            if not os.environ.get(QUIET):
                sys.stderr.write(f"waiting up to {most_s:.0f} s for MLflow at {self._mlflow.uri}\n")
            self.join(most_s)
        self._given_up.set()
        return self._done

    def run(self) -> None:
        """Send until everything is sent after `finish`, or its time is over."""
        pause_s, said, has_answered = _FIRST_PAUSE_S, False, False
        while not self._given_up.is_set():
            last_round = self._closing.is_set()
            self._appended.clear()
            try:
                _send_waiting(self._mlflow, self._own, self._given_up.is_set)
            except Exception as error:  # no error of MLflow's clients is a reason to stop a training run
                if not said:
                    where = f"MLflow at {self._mlflow.uri} accepts nothing now ({first_line(error)})"
                    warnings.warn(f"{where}; records wait in {self._own.path.parent} until it does", stacklevel=1)
                said, self._is_dead = True, not has_answered
                # At the end of the stage it tries at once, and then again after short pauses.
                self._given_up.wait(_FIRST_PAUSE_S) if last_round else self._closing.wait(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
                continue
            pause_s, said, has_answered, self._is_dead = _FIRST_PAUSE_S, False, True, False
            if last_round and not self._given_up.is_set():
                self._own.remove()
                self._done = True
                break
            self._appended.wait()
            self._closing.wait(_GATHER_S)
        self._own.close()


def _send_waiting(run: MlflowRun, own: Spool | None, stopped: Callable[[], bool]) -> None:
    """Send everything that waits in the folder: this process' file, and those of writers that have ended."""
    for path in spool_files(run.folder / SPOOL):
        if own is not None and path == own.path:
            _send_file(run, own, stopped)
        elif (left := Spool.adopt(path)) is not None:
            try:
                if _send_file(run, left, stopped):
                    left.remove()
            finally:
                left.close()


def _kind(entry: tuple[Record, int]) -> str:
    return str(entry[0].get("kind"))


def _send_file(run: MlflowRun, spool: Spool, stopped: Callable[[], bool]) -> bool:
    """Send consecutive records of one kind together. Returns False if stopped before the end."""
    waiting = spool.waiting()
    for kind, group in itertools.groupby(waiting, key=_kind):
        for entries in chunks(group, _BATCH):
            if stopped():
                return False
            run.send(kind, [record for record, _ in entries])
            spool.mark_sent(entries[-1][1])
    return True
