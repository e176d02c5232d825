"""The settings of a service. Imports nothing heavy."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Interval

from data_shards.problems import Problem, problem, refuse
from data_shards.ranges import Count, range_problems
from data_shards.settings import Execution

STARTER_NAME = "starter"
# The environment variable of the token. On the command line everybody on the machine could read it.
TOKEN = "SEGDIFF_TOKEN"
# A guess of fewer characters is possible.
LEAST_TOKEN = 16
# Addresses that only this machine reaches.
LOOPBACK = ("127.0.0.1", "localhost", "::1")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True)
class ServeConfig:
    """Models, replicas and limits of a service."""

    models: Execution[tuple[str, ...]] = ()
    """NAME=MODEL or MODEL: a run folder, an exported pipeline, a URL, a Hugging Face name. Clients see the NAME alone.
    The first is the default. Without any: the small model of the package."""
    min_replicas: Execution[Count] = 1
    """Processes of each model that always run."""
    max_replicas: Execution[Count] = 1
    """Processes of each model at most: more are started as requests wait."""
    gpu_share: Execution[Annotated[float, Interval(ge=0, le=64)] | None] = None
    """GPUs of a process: 0.5 puts two on one. null: 1 where there is a GPU, else 0."""
    threads: Execution[Count | None] = None
    """Threads of a process on a CPU. null: this machine's cores, shared by all processes."""
    batch: Execution[Annotated[int, Interval(ge=1, le=256)] | None] = None
    """Slices that a model makes at once, of one request or of several. null: on a GPU as many as fit, 16 at most; on
    a CPU 4, where more are not faster."""
    batch_wait_ms: Execution[Annotated[float, Interval(ge=0, le=1000)]] = 5.0
    """How long a model that has nothing to do waits for more slices."""
    queue: Execution[Count] = 128
    """Requests of a model that wait or are worked on. More get 429."""
    body_mb: Execution[Annotated[float, Gt(0)]] = 32.0
    """Megabytes of a request. More get 413."""
    body_s: Execution[Annotated[float, Interval(gt=0, le=86_400)]] = 300.0
    """Seconds in which a request's body must arrive. Slower ones get 408."""
    voxels: Execution[Annotated[int, Ge(1)]] = 2**26
    """Voxels of a mask, unpacked. More get 422."""
    steps: Execution[Annotated[int, Ge(1)]] = 250
    """The most steps that a client may ask for. More get 422."""
    studio: Execution[bool] = False
    """Also serve the page to draw and paint in."""
    device: Execution[Literal["auto", "cpu", "cuda"]] = "auto"
    """auto: the GPU if there is one."""
    precision: Execution[Literal["auto", "bf16", "fp32"]] = "auto"
    """Precision of the networks. auto: bf16 where the device has arithmetic for it."""

    @property
    def named_models(self) -> dict[str, str | None]:
        """{name: model}; None: the model of the package. Raises InputProblems."""
        named: dict[str, str | None] = {}
        for given in self.models or (STARTER_NAME,):
            name, separator, where = given.partition("=")
            if not separator:
                name, where = _name_of(given), given
            if not _NAME.fullmatch(name):
                raise problem("serve", "--models", given, "give NAME=MODEL, with a NAME of letters, digits, - and _")
            if name in named:
                raise problem("serve", "--models", f"{name} twice", "give each model a name of its own: NAME=MODEL")
            named[name] = None if where == STARTER_NAME else where
        return named

    def check(self) -> None:
        """Raise InputProblems for values out of range, or that do not go together."""
        refuse([*range_problems(self, "serve"), *self._conflicts()])
        _ = self.named_models

    def _conflicts(self) -> Iterator[Problem]:
        if self.max_replicas < self.min_replicas:
            value = f"{self.max_replicas} is below --min-replicas {self.min_replicas}"
            yield Problem("serve", "--max-replicas", value, "give the larger number here")


def _name_of(model: str) -> str:
    """The last part of a path, a URL or a name, in the characters of a name."""
    last = model.rstrip("/").rpartition("/")[2].partition("@")[0]
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", last).strip("-.")[:64]


def token_problems(token: str | None, host: str) -> list[Problem]:
    """Why a service at `host` may not start with this token."""
    if token is None and host not in LOOPBACK:
        remedy = f"give a secret in the environment: export {TOKEN}=$(openssl rand -hex 32)"
        return [Problem("serve", "--host", f"{host} is open to other machines, and there is no token", remedy)]
    if token is not None and len(token) < LEAST_TOKEN:
        value = f"{len(token)} characters"
        return [Problem("environment", TOKEN, value, f"give at least {LEAST_TOKEN}: openssl rand -hex 32")]
    return []


def require_packages(command: str, names: tuple[str, ...]) -> None:
    """Refuse if one of these parts of the extra `serve` is missing. Raises InputProblems."""
    if missing := [name for name in names if find_spec(name) is None]:
        raise problem(command, "packages", f"{', '.join(missing)} not installed", "pip install 'segdiff-dist[serve]'")
