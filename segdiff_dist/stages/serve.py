"""Models behind HTTP: masks in, images out, in batches across requests."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Annotated, ClassVar

import tyro
from annotated_types import Interval

from data_shards.problems import Problem, refuse
from segdiff_dist.experiment import collect
from segdiff_dist.serving.config import TOKEN, ServeConfig, require_packages, token_problems
from segdiff_dist.stages.base import Cost, Plan, Result, Stage

if TYPE_CHECKING:
    from segdiff_dist.tracking.tracker import Tracker


@dataclass(frozen=True, kw_only=True)
class Serve(Stage):
    """Serve models over HTTP: POST /paint takes a mask and gives the image. Without --models: the small model that
    comes with the package. The service describes its interface at /docs. Ctrl-C ends it."""

    essential: ClassVar = ("--models", "--host", "--port", "--studio", "--queue", "--min-replicas", "--max-replicas")
    only_reads: ClassVar = True

    host: str = "127.0.0.1"
    """The address to listen at. One that other machines reach needs a token in the environment: SEGDIFF_TOKEN."""
    port: Annotated[int, Interval(ge=1, le=65_535)] = 8700
    """The port to listen at."""
    ray_address: str | None = None
    """A running Ray cluster (host:port, or auto). null: Ray is started on this machine, for this service alone."""
    serve: Annotated[ServeConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=ServeConfig)

    def check(self) -> ServePlan:
        """Fetches models from elsewhere; looks whether the port is free."""
        self.serve.check()
        token = os.environ.get(TOKEN) or None
        refuse(token_problems(token, self.host))
        require_packages("serve", ("fastapi", "python_multipart", "grpc", "prometheus_client"))
        collect(*(partial(_look, where) for where in self.serve.named_models.values()))
        refuse(_port_problems(self.host, self.port))
        return ServePlan(self, token)


@dataclass(frozen=True)
class ServePlan(Plan):
    """Models that can be opened, and a port that is free."""

    stage: Serve
    token: str | None

    def cost(self) -> Cost:
        """Where it will listen, and with how many processes."""
        config = self.stage.serve
        names = ", ".join(config.named_models)
        processes = f"{config.min_replicas} to {config.max_replicas} of each model"
        return Cost(notes=(f"address: {self.url}", f"models: {names}", f"processes: {processes}"))

    @property
    def url(self) -> str:
        """Of the service."""
        host = f"[{self.stage.host}]" if ":" in self.stage.host else self.stage.host
        return f"http://{host}:{self.stage.port}"

    def run(self, tracker: Tracker) -> Result:
        """Start, say where, and wait for Ctrl-C or SIGTERM."""
        from data_shards.ray_session import ray_session
        from segdiff_dist.serving.engine import running

        # Inherited by the processes: Ray Serve's log goes to files alone.
        os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
        stage = self.stage
        service = running(stage.serve, stage.host, stage.port, self.token)
        # Ray takes these signals for itself as it starts.
        with ray_session(stage.ray_address), service, _until_signal() as wait:
            for line in self._lines():
                print(line, flush=True)
            wait()
        return Result(("stopped",))

    def _lines(self) -> list[str]:
        config = self.stage.serve
        lines = [f"segdiff serves {', '.join(config.named_models)} at {self.url} (Ctrl-C ends it)"]
        if config.studio:
            lines.append(f"the page: {self.url}/")
        header = "" if self.token is None else f' -H "Authorization: Bearer ${TOKEN}"'
        lines.append(f"the interface: {self.url}/docs")
        return [*lines, f"next: curl{header} -F mask=@example.png -H 'Accept: image/png' {self.url}/paint -o ct.png"]


def _look(where: str | None) -> None:
    """Refuse what is no model. Its weights are read by its process."""
    from segdiff_dist.painting.model_source import kind_of_folder, model_folder

    kind_of_folder(model_folder(where))


def _port_problems(host: str, port: int) -> list[Problem]:
    kind = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(kind) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind((host, port))
    except OSError as error:
        remedy = "choose another one: --port N, --host ADDRESS"
        return [Problem("serve", "--port", f"{host}:{port} cannot be used ({error.strerror or error})", remedy)]
    return []


@contextmanager
def _until_signal() -> Iterator[Callable[[], bool]]:
    """A function that waits for Ctrl-C or SIGTERM."""
    ended = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield ended.wait
        return
    before = {one: signal.signal(one, lambda *_: ended.set()) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield ended.wait
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
