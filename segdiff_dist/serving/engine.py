"""The models and the HTTP side as deployments of Ray Serve. This file alone imports it.

Ray Serve's proxy receives the requests. `Front`, one process, is the application; each model is a deployment of its own
with one or more processes (`Model`). A request goes to a process with room. If that process dies, the request goes to
another one: images depend on their request alone.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle

from data_shards import lean_imports
from data_shards.fan_out import num_cores
from data_shards.problems import InputProblems, WorkFailed, refuse
from segdiff_dist.config import validate
from segdiff_dist.serving.config import TOKEN, ServeConfig, token_problems
from segdiff_dist.serving.guard import digest_of
from segdiff_dist.serving.messages import Event, MaskUpload, PaintRequest, ServiceError

T = TypeVar("T")

APPLICATION = "segdiff"
# A request that ends so many processes is given up.
_MOST_ATTEMPTS = 3
# A process that is killed is seen to be gone after so long at most.
_HEALTH_PERIOD_S, _HEALTH_TIMEOUT_S = 2.0, 30.0
_ANSWER_TIMEOUT_S = 120.0
_QUIET = {"log_level": "ERROR", "enable_access_log": False}


class Model:
    """A process of one model."""

    def __init__(self, name: str, where: str | None, config: ServeConfig, threads: int | None) -> None:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read by OpenMP as torch is loaded
        lean_imports.begin()
        from segdiff_dist.serving.batching import let_network_go_first
        from segdiff_dist.serving.served_model import ServedModel

        let_network_go_first()
        # An error here would be tried again three times, and shown with its trace each time.
        self._refusal: str | None = None
        try:
            self._model = ServedModel(name, where, config, threads)
        except InputProblems as error:
            self._refusal = str(error)

    def refusal(self) -> str | None:
        """Why the model cannot be used."""
        return self._refusal

    def describe(self) -> dict[str, Any]:
        """ServedModel.describe."""
        return self._model.describe()

    def examples(self) -> dict[str, bytes]:
        """ServedModel.examples."""
        return self._model.examples()

    async def read_mask(self, mask: MaskUpload) -> Event:
        """ServedModel.read_mask, with its errors as an event: Ray would send them with a trace."""
        try:
            return Event("image", await self._model.read_mask(mask))
        except ServiceError as error:
            return Event("error", {"status": error.status, "detail": error.detail})

    async def paint(self, request: PaintRequest) -> AsyncIterator[Event]:
        """ServedModel.paint."""
        async for event in self._model.paint(request):
            yield event


class Models:
    """The models behind their handles: the Backend of the application."""

    def __init__(self, handles: Mapping[str, DeploymentHandle], on_retry: Callable[[str], None]) -> None:
        self._handles, self._on_retry = handles, on_retry
        self._models: list[dict[str, Any]] = []
        self._examples: dict[str, dict[str, bytes]] = {}

    @property
    def models(self) -> list[dict[str, Any]]:
        """Empty while models load."""
        return self._models

    async def load(self) -> None:
        """Wait until all models are there. With one that cannot be used, the service stays without models."""
        while not self._models:
            with suppress(ServiceError):
                for name in self._handles:
                    if refusal := await self._call(name, lambda handle: handle.refusal.remote()):
                        logging.getLogger("ray.serve").error("model %s: %s", name, refusal)
                        return
                described = [await self._call(name, lambda handle: handle.describe.remote()) for name in self._handles]
                self._models = described

    async def paint(self, model: str, request: PaintRequest) -> AsyncIterator[Event]:
        """Backend.paint. A request whose process dies goes to another one."""
        for attempt in range(_MOST_ATTEMPTS):
            if attempt > 0:
                self._on_retry(model)
            stream = self._handles[model].options(stream=True).paint.remote(request)
            is_over = False
            try:
                async for event in stream:
                    is_over = event.kind in ("image", "error")
                    yield event
                return
            except RayActorError:
                if is_over:
                    return
            finally:
                if not is_over:
                    stream.cancel()
        raise _given_up()

    async def read_mask(self, model: str, mask: MaskUpload) -> dict[str, Any]:
        """Backend.read_mask."""
        event: Event = await self._call(model, lambda handle: handle.read_mask.remote(mask))
        if event.kind == "error":
            raise ServiceError(event.value["status"], event.value["detail"])
        answer: dict[str, Any] = event.value
        return answer

    async def examples(self, model: str) -> dict[str, bytes]:
        """Backend.examples."""
        if model not in self._examples:
            self._examples[model] = await self._call(model, lambda handle: handle.examples.remote())
        return self._examples[model]

    async def _call(self, model: str, call: Callable[[DeploymentHandle], Awaitable[T]]) -> T:
        for _ in range(_MOST_ATTEMPTS):
            with suppress(RayActorError):
                return await call(self._handles[model])
        raise _given_up()


class Front:
    """The process of the application."""

    def __init__(self, config: ServeConfig, token_digest: str | None, handles: dict[str, DeploymentHandle]) -> None:
        from segdiff_dist.serving.app import build_app

        self._models = Models(handles, self._on_retry)
        self._app = build_app(self._models, config, token_digest)
        self._loading = asyncio.ensure_future(self._models.load())

    def __serve_build_asgi_app__(self) -> Any:
        """For Ray Serve."""
        return self._app

    def _on_retry(self, model: str) -> None:
        self._app.state.service.metrics.retried.labels(model).inc()


def deployments(config: ServeConfig, token_digest: str | None) -> serve.Application:
    """The application of Ray Serve."""
    handles = {name: _model(name, where, config) for name, where in config.named_models.items()}
    front = serve.deployment(
        serve.ingress()(Front),
        name="front",
        max_ongoing_requests=10_000,
        ray_actor_options={"num_cpus": 0},
        logging_config=_QUIET,
    )
    return front.bind(config, token_digest, handles)


def application(args: dict[str, Any]) -> serve.Application:
    """For `serve run` and KubeRay: the keys of ServeConfig. The token comes from the environment, and is required."""
    config = validate(ServeConfig, {key: _plain(value) for key, value in args.items()}, "serve")
    config.check()
    token = os.environ.get(TOKEN)
    refuse(token_problems(token, "a cluster"))
    assert token is not None
    return deployments(config, digest_of(token))


@contextmanager
def running(config: ServeConfig, host: str, port: int, token: str | None) -> Iterator[None]:
    """Serve at host:port, within a Ray session. Raises WorkFailed if a model does not start."""
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(
        proxy_location="HeadOnly",
        http_options={"host": host, "port": port},
        logging_config=_QUIET,
    )
    try:
        serve.run(deployments(config, digest_of(token) if token else None), name=APPLICATION, logging_config=_QUIET)
        _refuse_broken(config)
        yield
    except WorkFailed:
        raise
    except RuntimeError as error:
        raise WorkFailed(f"serve: did not start: {' '.join(str(error).split())[-400:]}") from error
    finally:
        # Not serve.shutdown, which would end the applications of others on a joined cluster.
        serve.delete(APPLICATION)


def _model(name: str, where: str | None, config: ServeConfig) -> serve.Application:
    threads = config.threads or max(1, num_cores() // (len(config.named_models) * config.max_replicas))
    has_gpus = config.device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0
    gpus = float(has_gpus) if config.gpu_share is None else config.gpu_share
    batch = config.batch or (16 if gpus else 4)
    model = serve.deployment(
        Model,
        name=f"model-{name}",
        # Some more than a batch, so that the next ones are read while a batch is computed.
        max_ongoing_requests=2 * batch,
        max_queued_requests=-1,  # `queue` is the limit, and a request that was taken is never refused later
        autoscaling_config={
            "min_replicas": config.min_replicas,
            "max_replicas": config.max_replicas,
            "target_ongoing_requests": batch,
        },
        ray_actor_options={"num_cpus": 0 if gpus else min(threads, 1), "num_gpus": gpus},
        health_check_period_s=_HEALTH_PERIOD_S,
        health_check_timeout_s=_HEALTH_TIMEOUT_S,
        max_constructor_retry_count=3,
        logging_config=_QUIET,
    )
    return model.bind(name, where, config, None if gpus else threads)


def _refuse_broken(config: ServeConfig) -> None:
    """Raise WorkFailed for models that cannot be used."""
    asks = {name: serve.get_deployment_handle(f"model-{name}", APPLICATION).refusal for name in config.named_models}
    try:
        responses = {name: ask.remote() for name, ask in asks.items()}
        refusals = {name: response.result(timeout_s=_ANSWER_TIMEOUT_S) for name, response in responses.items()}
    finally:
        # A handle goes on reporting its requests to the cluster, also to one that has ended.
        for ask in asks.values():
            ask.shutdown()
    if lines := [f"model {name}: {refusal}" for name, refusal in refusals.items() if refusal is not None]:
        raise WorkFailed("\n".join(lines))


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _given_up() -> ServiceError:
    detail = f"model: its process died {_MOST_ATTEMPTS} times at this request: send another one"
    return ServiceError(503, detail, retry_after_s=10)
