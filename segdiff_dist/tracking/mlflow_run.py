"""The MLflow run of a run folder: found or begun again, and sent to. This file owns MLflow.

The store is sqlite beside the folder or in it (store.py) unless MLFLOW_TRACKING_URI says otherwise. RUN/mlflow.json
(link.py) remembers store and run, so that every stage adds to the same one. The spool's paths are followed only inside
the folder (path_checks.py). Artifacts are put beside the database, whatever place the database names.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import shutil
import sqlite3
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from data_shards import lean_imports
from data_shards.files import first_line
from data_shards.locks import short_turn
from data_shards.problems import InputProblems, problem
from segdiff_dist.tracking import descriptions
from segdiff_dist.tracking.link import LINK, REFUSED, SPOOL, new_token, read_link, write_link
from segdiff_dist.tracking.model_registry import NO_REGISTRY, register
from segdiff_dist.tracking.path_checks import odd_entry, open_plain, why_not_inside, why_not_plain
from segdiff_dist.tracking.records import why_not_sent
from segdiff_dist.tracking.spool import Record
from segdiff_dist.tracking.store import ARTIFACTS, DATABASE, MARK, local_uri, make_own, store_of, why_not_beside

T = TypeVar("T")

# The tag that identifies a run in its store, known before the run is created.
_TOKEN_TAG = "segdiff.token"
# The largest batch that MLflow accepts in one request (its REST API, runs/log-batch).
_MAX_METRICS, _MAX_PARAMS_OR_TAGS = 1000, 100
# Errors for a record that will never be accepted: MLflow's codes, and HTTP's for a request that is malformed or too
# large.
_REFUSALS, _HTTP_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST"), (400, 413)
# How long to wait while another process writes to the folder's database.
_DATABASE_PATIENCE_S = 30.0


class MlflowRun:
    """The MLflow run of a folder that is not foreign (link.py). The server is not contacted before the first `send`.
    Raises InputProblems if mlflow.json is damaged, or if the spool or sqlite's file is a link, a device or a pipe.
    """

    def __init__(self, folder: Path, experiment: str = "segdiff", shared: bool = False) -> None:
        """`shared`: a folder that is tracked for the first time is recorded in the database beside it, if it can be."""
        # Imported in the thread that makes the run, so that no two threads import at once.
        _import_mlflow()
        self.folder = folder
        with short_turn(folder):  # stages that begin at the same time belong to one run
            link = read_link(folder) or {"beside": shared and why_not_beside(folder) is None}
            self._is_beside = link.get("beside") is True
            self.store = store_of(folder, self._is_beside)
            self.uri = os.environ.get("MLFLOW_TRACKING_URI") or link.get("tracking_uri") or local_uri(self.store)
            self._is_local = self.uri == local_uri(self.store)
            self._refuse_odd_files()
            if (link.get("tracking_uri") or local_uri(self.store)) != self.uri:
                link = {}
            elif self._is_copy(link):
                text = f"{folder} is a copy of {link['folder']}: its records go to an MLflow run of its own"
                warnings.warn(text, stacklevel=2)
                link = {"experiment": link.get("experiment")}
            self._experiment = link.get("experiment") or experiment
            self.run_id: str | None = link.get("run_id")
            self._token = link.get("token") or new_token()
            self.began_s = link.get("began_s") or time.time()
            self._write_link()
        self._client: Any = None
        self._checked = False

    def _is_copy(self, link: Mapping[str, Any]) -> bool:
        """Whether the folder where this link was written is still there, and adds to the same run of the same store. A
        folder that was moved is not."""
        before = Path(link.get("folder") or self.folder)
        if before.resolve() == self.folder.resolve():
            return False
        with contextlib.suppress(InputProblems):
            is_same_store = not self._is_local or store_of(before, self._is_beside).resolve() == self.store.resolve()
            return is_same_store and read_link(before).get("token") == link.get("token")
        return False

    def _refuse_odd_files(self) -> None:
        for path in (self.folder / SPOOL, *((self.store / DATABASE,) if self._is_local else ())):
            if path.is_symlink() or (path.exists() and not (path.is_dir() or path.is_file())):
                raise problem(path, "tracking", "a link, a device or a pipe", "remove it")

    def send(self, kind: str, records: Sequence[Record]) -> None:
        """Record them in order. Raises MLflow's errors if the store does not answer; sending again does no harm.

        A metric with the same key, step and time is the same metric, tags and parameters replace themselves, an
        artifact overwrites itself, and a model is registered once for each digest.
        """
        sound = []
        for record in records:
            reason = why_not_sent(record)
            sound.append(record) if reason is None else self._refuse(record, reason)
        if sound:
            self._send(kind, sound)

    def _send(self, kind: str, records: Sequence[Record]) -> None:
        try:
            run = self._opened()
            if kind == "metrics":
                self._send_metrics(run, records)
            elif kind == "params":
                self._send_params(run, records)
            elif kind == "tags":
                self._send_tags(run, records)
            else:
                for record in records:
                    getattr(self, f"_send_{kind}")(run, record)
        except BaseException:
            self._checked = False  # the run may be gone with the store it was in
            raise

    def _send_metrics(self, run: str, records: Sequence[Record]) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(k, v, r["ms"], r["step"]) for r in records for k, v in r["values"].items()]
        for chunk in chunks(metrics, _MAX_METRICS):
            self._log(chunk, lambda some: self._client.log_batch(run, metrics=some))

    def _send_params(self, run: str, records: Sequence[Record]) -> None:
        from mlflow.entities import Param

        known = self._client.get_run(run).data.params
        first: dict[str, str] = {}
        for record in records:
            first = record["values"] | first
        params = [Param(key, value) for key, value in first.items() if key not in known]
        for chunk in chunks(params, _MAX_PARAMS_OR_TAGS):
            self._log(chunk, lambda some: self._client.log_batch(run, params=some))

    def _send_tags(self, run: str, records: Sequence[Record]) -> None:
        from mlflow.entities import RunTag

        tags = [RunTag(key, value) for record in records for key, value in record["values"].items()]
        for chunk in chunks(tags, _MAX_PARAMS_OR_TAGS):
            self._log(chunk, lambda some: self._client.log_batch(run, tags=some))

    def _send_dataset(self, run: str, record: Record) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        texts = {name: record[name] for name in ("name", "digest", "source", "profile")}
        dataset = Dataset(source_type="local", schema=None, **texts)
        tags = [InputTag("mlflow.data.context", record["context"])]
        self._log([dataset], lambda some: self._client.log_inputs(run, [DatasetInput(one, tags) for one in some]))

    def _send_about(self, run: str, record: Record) -> None:
        descriptions.describe(self._client, run, self.folder.resolve().name, record)

    def _send_artifact(self, run: str, record: Record) -> None:
        reason = why_not_inside(self.folder, record["path"]) or self._why_not_to(run, record["folder"])
        if reason is not None:
            self._refuse(record, reason)
            return
        path = self.folder / record["path"]
        try:
            if path.is_dir():
                self._client.log_artifacts(run, str(path), record["folder"] or path.name)
            else:
                self._client.log_artifact(run, str(path), record["folder"])
        except Exception as error:  # the error depends on where the server keeps artifacts
            if not _is_for_good(error):
                raise
            self._refuse(record, first_line(error))
        self._remove_copy(record)

    def _send_model(self, run: str, record: Record) -> None:
        copy = spooled_copy(record["path"])
        if copy is None:
            self._refuse(record, f"{record['path']!r:.80} is not a model of the spool")
            return
        reason = why_not_inside(self.folder, record["path"])
        # If the model is already registered, the folder is not needed.
        reason = None if reason is not None and reason.endswith(" is gone") else reason
        if (reason := reason or self._why_not_to(run, "model")) is not None:
            self._refuse(record, reason)
            return
        folder = self.folder / SPOOL / copy
        try:
            register(self._client, run, folder, record["name"], record["digest"], record["tags"])
        except Exception as error:
            if not _is_for_good(error) and getattr(error, "error_code", None) not in NO_REGISTRY:
                raise
            self._refuse(record, first_line(error))
        # If it is registered, its artifact is the copy to keep; if it is refused, `segdiff export` can make it again.
        self._remove_copy(record)

    def _why_not_to(self, run: str, folder: str | None) -> str | None:
        """Why an artifact cannot be put there, in a store on this disk: a link on the way would lead out of it."""
        if not self._is_local:
            return None
        to = PurePosixPath(ARTIFACTS, run, "artifacts", folder or "")
        for part in [*to.parents][-2::-1]:
            if (self.store / part).is_symlink():
                return f"{self.store / part} is a link"
        found = odd_entry(self.store / to)
        return None if found is None else f"{found} is a link, a device or a pipe"

    def _send_status(self, run: str, record: Record) -> None:
        if record["status"] == "RUNNING":
            self._client.update_run(run, status="RUNNING")
        else:
            self._client.set_terminated(run, record["status"], end_time=record["ms"])

    def _log(self, entities: list[Any], send: Callable[[list[Any]], None]) -> None:
        """Send a batch. If MLflow refuses it for good, send each part by itself, so that only bad parts are left
        out."""
        from mlflow.exceptions import MlflowException

        try:
            send(entities)
        except MlflowException as error:
            if not _is_for_good(error):
                raise
            if len(entities) == 1:
                self._refuse(dict(entities[0]), first_line(error))
                return
            for entity in entities:
                self._log([entity], send)

    def _refuse(self, record: Record, reason: str) -> None:
        """Put a record aside, so that the records after it can be sent."""
        aside = self.folder / REFUSED
        with os.fdopen(open_plain(aside, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "a") as file:
            file.write(json.dumps({**record, "reason": reason}) + "\n")
        warnings.warn(f"MLflow does not take a record ({reason}); it is kept in {aside}", stacklevel=2)
        self._remove_copy(record)

    def _remove_copy(self, record: Record) -> None:
        """Remove the files that the spool kept for a record that is finished."""
        if (copy := spooled_copy(record.get("path"))) is not None and not (self.folder / SPOOL).is_symlink():
            shutil.rmtree(self.folder / SPOOL / copy, ignore_errors=True)  # which does not follow links

    def _opened(self) -> str:
        """The folder's run: the one recorded in mlflow.json while it exists, or a new one."""
        if self._checked and self.run_id is not None:
            return self.run_id
        with contextlib.ExitStack() as turns:  # two processes that create one database at the same time break it
            for folder in dict.fromkeys((self.folder.resolve(), self.store)):
                turns.enter_context(short_turn(folder))
            return self._open_run()

    def _open_run(self) -> str:
        from mlflow.tracking import MlflowClient

        if self._is_beside and self._is_local and not (self.store / MARK).exists():
            make_own(self.store)
        self._client = self._client or MlflowClient(tracking_uri=self.uri)
        if self.run_id is None or not self._is_there(self.run_id):
            if self.run_id is not None:  # the store has been emptied: begin a new run in it
                self._token = new_token()
                self.run_id = None
                self._write_link()
            self.run_id = self._find_or_create()
            self._write_link()
        if self._is_local:
            self._keep_artifacts_inside(self.run_id)
        self._checked = True
        return self.run_id

    def _keep_artifacts_inside(self, run: str) -> None:
        """Set the database's own folder as the place of the run's artifacts in the database.

        The database names another place if the folder was moved, or if somebody else wrote the database, and MLflow
        would write there. Raises RuntimeError if the database cannot be changed.
        """
        where = (self.store / ARTIFACTS / run / "artifacts").as_uri()
        if self._client.get_run(run).info.artifact_uri == where:
            return
        with contextlib.closing(sqlite3.connect(self.store / DATABASE, timeout=_DATABASE_PATIENCE_S)) as database:
            database.execute("PRAGMA trusted_schema = OFF")
            database.execute("UPDATE runs SET artifact_uri = ? WHERE run_uuid = ?", (where, run))
            database.commit()
        if (found := self._client.get_run(run).info.artifact_uri) != where:
            raise RuntimeError(f"{self.store / DATABASE} puts artifacts at {found}")

    def _is_there(self, run: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            found = self._client.get_run(run)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False
        # A folder from somebody else might name another run of the database that is shared.
        is_own = not self._is_beside or found.data.tags.get(_TOKEN_TAG) == self._token
        return is_own and found.info.lifecycle_stage == "active"

    def _find_or_create(self) -> str:
        """A run with this folder's token, which exists if the answer to its creation was lost."""
        client, root = self._client, self.folder.resolve()
        experiment = client.get_experiment_by_name(self._experiment)
        if experiment is not None:
            experiment_id = experiment.experiment_id
            found = client.search_runs([experiment_id], f"tags.`{_TOKEN_TAG}` = '{self._token}'", max_results=1)
            if found:
                return found[0].info.run_id
        else:
            local = self.uri.startswith("sqlite:")
            location = (self.store / ARTIFACTS).as_uri() if local else None
            experiment_id = client.create_experiment(self._experiment, artifact_location=location)
        descriptions.describe_experiment(client, experiment_id)
        tags = {"run_folder": str(root), _TOKEN_TAG: self._token, **descriptions.user_tag()}
        run = client.create_run(experiment_id, int(self.began_s * 1000), run_name=root.name, tags=tags)
        return run.info.run_id

    def _write_link(self) -> None:
        link = {
            # Sqlite beside the folder or in it goes without a path, so that the folder can be moved.
            "tracking_uri": None if self._is_local else self.uri,
            "beside": self._is_beside and self._is_local,
            "experiment": self._experiment,
            "run_id": self.run_id,
            "token": self._token,
            "began_s": self.began_s,
            "folder": str(self.folder.resolve()),
        }
        write_link(self.folder, link)


def tracking_uri(folder: Path) -> str:
    """MLFLOW_TRACKING_URI; without it the store that the folder's run was begun in, at first sqlite in the folder."""
    link = read_link(folder)
    local = local_uri(store_of(folder, link.get("beside") is True))
    return os.environ.get("MLFLOW_TRACKING_URI") or link.get("tracking_uri") or local


def is_tracked(folder: Path) -> bool:
    """Whether a stage was ever tracked in this folder."""
    return (folder / LINK).is_file()


def spooled_copy(path: object) -> str | None:
    """The name of a copy that the spool keeps until it is sent; the record's path is this copy or inside it. None for
    any other path: nothing else is ever removed."""
    parts = PurePosixPath(path).parts if isinstance(path, str) and why_not_plain(path) is None else ()
    is_copy = len(parts) >= 2 and parts[0] == SPOOL and parts[1].startswith(("model-", "copy-"))
    return parts[1] if is_copy else None


def _is_for_good(error: Exception) -> bool:
    status = getattr(getattr(error, "response", None), "status_code", None)
    refused = getattr(error, "error_code", None) in _REFUSALS or status in _HTTP_REFUSALS
    return refused or isinstance(error, FileNotFoundError | PermissionError)


def _import_mlflow() -> None:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    # By default MLflow asks a silent server for up to 2 minutes, eight times. Here the spool waits instead.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with lean_imports.uncollected():
        import mlflow.tracking  # noqa: F401

    logging.getLogger("alembic").setLevel(logging.WARNING)
    # Each try at a full or read-only database would print a traceback; the sender reports it once, in a line.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


def chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items each, the last one shorter."""
    source = iter(items)
    while chunk := list(itertools.islice(source, size)):
        yield chunk
