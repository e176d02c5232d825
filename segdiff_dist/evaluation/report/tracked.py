"""Where MLflow shows the numbers of a run folder, from RUN/mlflow.json. MLflow itself is not asked."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from segdiff_dist.tracking.link import read_link
from segdiff_dist.tracking.store import DATABASE, is_plain_for_sqlite, store_of


@dataclass(frozen=True)
class TrackedRun:
    """A run of MLflow. `url`: its page, where the store is a server; `command`: else the command that serves the store.

    `run_id` is None until the run is in the store.
    """

    store: str
    experiment: str
    name: str
    run_id: str | None
    url: str | None
    command: str | None


def tracked_run(run: Path) -> TrackedRun | None:
    """The MLflow run of a run folder; None if nothing was tracked, or mlflow.json is damaged."""
    try:
        link = read_link(run)
        return locate(link, run.resolve()) if link else None
    except ValueError:  # InputProblems, or an address that is none
        return None


def locate(link: Mapping[str, Any], folder: Path) -> TrackedRun:
    """The same, from the content of mlflow.json and the absolute path of its folder.

    Passwords in the store's address are left out: a report may be passed on.
    """
    holder = store_of(folder, link.get("beside") is True)
    store = _without_password(link.get("tracking_uri") or f"sqlite:///{holder / DATABASE}")
    run_id = link.get("run_id")
    url = command = None
    if store.startswith(("http://", "https://")):
        # MLflow's address of a run by its id; it redirects to the run's page in its experiment.
        url = f"{store.rstrip('/')}/#/runs/{run_id}" if run_id else store
    elif link.get("tracking_uri") or is_plain_for_sqlite(holder):
        command = f"mlflow ui --backend-store-uri {shlex.quote(store)}"
    else:  # '?' and '%' mean something in a URL of sqlite
        command = f"cd {shlex.quote(str(holder))} && mlflow ui --backend-store-uri sqlite:///{DATABASE}"
    return TrackedRun(store, link.get("experiment") or "segdiff", folder.name, run_id, url, command)


def _without_password(uri: str) -> str:
    parts = urlsplit(uri)
    user, at, host = parts.netloc.rpartition("@")
    if not at:
        return uri
    # A browser asks for name and password itself.
    name = "" if parts.scheme in ("http", "https") else user.split(":")[0] + (":***@" if ":" in user else "@")
    return urlunsplit(parts._replace(netloc=name + host))
