"""The HTTP interface: FastAPI's application over a Backend. docs/serve.md is its reference."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Annotated, Any, Literal

from fastapi import APIRouter, FastAPI, Form, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat
from starlette.exceptions import HTTPException
from starlette.types import Scope

from data_shards import __version__
from data_shards.labels import LABEL_TABLES
from segdiff_dist.serving.accept import EVENTS, kind_of
from segdiff_dist.serving.api_page import api_page
from segdiff_dist.serving.config import ServeConfig
from segdiff_dist.serving.guard import HEADERS, Guard, headers_of
from segdiff_dist.serving.messages import MEDIA_TYPES, Backend, Event, MaskUpload, PaintRequest, ServiceError
from segdiff_dist.serving.metrics import Metrics

_LONGEST = 2**16
_MULTIPART = "multipart/form-data"
_Axis = Literal["axial", "coronal", "sagittal"]
_STATUSES: dict[int | str, dict[str, Any]] = {
    400: {"description": "The body is cut off, or the mask cannot be read."},
    401: {"description": "A token is required."},
    404: {"description": "No such model."},
    408: {"description": "The body did not arrive in time."},
    413: {"description": "The body is too long."},
    415: {"description": "The body is no multipart form."},
    422: {"description": "A field, or the content of the mask, is refused."},
    429: {"description": "The queue is full; Retry-After says when to come again."},
    503: {"description": "Models load, or the process that made the image died several times."},
}
_IMAGES: dict[int | str, dict[str, Any]] = {
    200: {"description": "The image.", "content": {kind: {} for kind in (*MEDIA_TYPES.values(), EVENTS)}},
    406: {"description": "None of the forms of Accept can be made."},
}


@dataclass
class Service:
    """What the routes share."""

    backend: Backend
    config: ServeConfig
    metrics: Metrics = field(default_factory=Metrics)
    active: dict[str, int] = field(default_factory=dict)

    def model(self, name: str | None) -> str:
        """The name of a model; None: the default. Raises ServiceError."""
        known = [one["name"] for one in self.backend.models]
        if not known:
            raise ServiceError(503, "models: still loading: come again", retry_after_s=2)
        if name and name not in known:
            raise ServiceError(404, f"model: {name[:64]}: give one of {', '.join(known)}")
        return name or known[0]

    def count(self, scope: Scope, status: int) -> None:
        """Count an answer, by the route's pattern: no text of a client becomes a name in the metrics."""
        path = getattr(scope.get("route"), "path", "other")
        self.metrics.requests.labels(path, str(status)).inc()


class MaskForm(BaseModel):
    """The fields of POST /masks."""

    model_config = ConfigDict(extra="forbid")

    mask: Annotated[UploadFile, Field(description="PNG, NIfTI, MetaImage, NRRD or DICOM SEG: a label id at each voxel")]
    model: Annotated[str | None, Field(description="a name of GET /models; else the first", max_length=64)] = None
    labels: Annotated[
        str | None,
        Field(
            description="JSON with id: name, or amos, wholebody or merged; else the model's ids", max_length=_LONGEST
        ),
    ] = None
    other_labels: Literal["refuse", "body", "background"] = "refuse"
    outline: Literal["auto", "none"] = "auto"
    spacing: Annotated[FiniteFloat | None, Field(description="mm of a pixel of a PNG", gt=0)] = None


class PaintForm(MaskForm):
    """The fields of POST /paint."""

    modality: Annotated[str | None, Field(description="else the model's first", max_length=64)] = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    steps: Annotated[int | None, Field(description="else the model's own", ge=1)] = None
    guidance: Annotated[FiniteFloat | None, Field(description="else the model's own; 1 is none", ge=0, le=100)] = None
    axis: _Axis = "axial"


# What to give, by the beginning of pydantic's name of the error.
_REMEDIES = {
    "int_": "give a whole number",
    "float_": "give a number",
    "finite_number": "give a finite number",
    "greater_than_equal": "give {ge} or more",
    "greater_than": "give more than {gt}",
    "less_than_equal": "give {le} or less",
    "less_than": "give less than {lt}",
    "literal_error": "give {expected}",
    "string_too_long": "give at most {max_length} characters",
    "string_": "send a text, not a file",
}

router = APIRouter()


def service_of(request: Request) -> Service:
    """What the routes share."""
    service: Service = request.app.state.service
    return service


@router.get("/healthz", responses={503: _STATUSES[503]})
async def healthz(request: Request) -> dict[str, str]:
    """Whether all models are loaded."""
    service_of(request).model(None)
    return {"status": "ok"}


@router.get("/models")
async def models(request: Request) -> dict[str, Any]:
    """The models, the default first, with their labels, modalities and sampler."""
    service = service_of(request)
    default = service.model(None)
    return {"models": [one | {"default": one["name"] == default} for one in service.backend.models]}


@router.get("/labels", responses={404: _STATUSES[404]})
async def labels(request: Request, model: str | None = None) -> list[dict[str, Any]]:
    """The label table of a model."""
    service = service_of(request)
    name = service.model(model)
    found: list[dict[str, Any]] = next(one["labels"] for one in service.backend.models if one["name"] == name)
    return found


@router.get("/examples")
async def examples(request: Request, model: str | None = None) -> list[dict[str, str]]:
    """Masks to begin with: slices of the phantom, and a volume."""
    service = service_of(request)
    name = service.model(model)
    found = await service.backend.examples(name)
    return [{"name": one, "url": f"/examples/{one}.nii.gz?model={name}"} for one in found]


@router.get("/examples/{name}.nii.gz", responses={200: {"content": {MEDIA_TYPES["nifti"]: {}}}, 404: _STATUSES[404]})
async def example(request: Request, name: str, model: str | None = None) -> Response:
    """One of them, uint8 in the model's ids."""
    service = service_of(request)
    found = await service.backend.examples(service.model(model))
    if name not in found:
        raise ServiceError(404, f"example: {name[:64]}: give one of {', '.join(found)}")
    return Response(found[name], media_type=MEDIA_TYPES["nifti"], headers=HEADERS)


@router.post("/masks", responses=_STATUSES)
async def masks(request: Request, form: Annotated[MaskForm, Form(media_type=_MULTIPART)]) -> dict[str, Any]:
    """Read a mask of any kind: the same in the model's ids as NIfTI, in base64."""
    await _refuse_doubled(request)
    service = service_of(request)
    return await service.backend.read_mask(service.model(form.model), await _upload(form))


@router.post("/paint", responses=_STATUSES | _IMAGES, response_class=Response)
async def paint(request: Request, form: Annotated[PaintForm, Form(media_type=_MULTIPART)]) -> Response:
    """Generate the CT or MR image of a mask, in the form that Accept asks for."""
    await _refuse_doubled(request)
    service = service_of(request)
    model = service.model(form.model)
    kind = kind_of(request.headers.get("accept", ""))
    wanted = PaintRequest(
        mask=await _upload(form),
        modality=form.modality,
        seed=form.seed,
        steps=form.steps,
        guidance=form.guidance,
        axis=form.axis,
        form="json" if kind == "events" else kind,
        shows_progress=kind == "events",
    )
    events = _admitted(service, model, wanted)
    if kind == "events":
        streaming = HEADERS | {"X-Accel-Buffering": "no"}
        return StreamingResponse(_as_text(events), media_type=EVENTS, headers=streaming)
    answer = await _last(events)
    if kind == "json":
        return JSONResponse(answer, headers=HEADERS)
    return Response(answer, media_type=MEDIA_TYPES[kind], headers=HEADERS)


@router.get("/metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    """Counts and times, in Prometheus' text format."""
    content, kind = service_of(request).metrics.text()
    return Response(content, media_type=kind, headers=HEADERS)


@router.get("/docs", include_in_schema=False)
async def docs(request: Request) -> Response:
    """This interface, for a person."""
    return Response(api_page(request.app.openapi()), media_type="text/html; charset=utf-8", headers=HEADERS)


def build_app(backend: Backend, config: ServeConfig, token_digest: str | None) -> FastAPI:
    """The application. `token_digest`: None for a service of this machine alone."""
    # The reader of forms would write a line for each broken body.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    # FastAPI's own page loads its scripts from another host.
    app = FastAPI(title="segdiff", version=__version__, docs_url=None, redoc_url=None, description=_ABOUT)
    app.state.service = Service(backend, config)
    app.include_router(router)
    app.add_exception_handler(ServiceError, _on_service_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_fault)
    count = app.state.service.count
    most = int(config.body_mb * 1e6)
    app.add_middleware(Guard, token_digest=token_digest, most_bytes=most, body_s=config.body_s, on_answer=count)
    if config.studio:
        app.mount("/", import_module("segdiff_dist.studio.static").Page())
    return app


_ABOUT = "Synthetic CT and MR images from masks of organs. They show no patient, and are not for diagnosis."


def _admitted(service: Service, model: str, wanted: PaintRequest) -> AsyncIterator[Event]:
    """The events of a request that has a place in the queue. Raises ServiceError if there is none."""
    active = service.active.get(model, 0)
    if active >= service.config.queue:
        value = f"{active} requests wait or are worked on"
        raise ServiceError(429, f"queue: {value}: come again later", service.metrics.retry_after_s())
    service.active[model] = active + 1
    return _events(service, model, wanted, active)


async def _events(service: Service, model: str, wanted: PaintRequest, position: int) -> AsyncIterator[Event]:
    began, is_over = time.monotonic(), False
    gauge = service.metrics.active.labels(model)
    gauge.inc()
    try:
        yield Event("queued", {"position": position})
        async for event in service.backend.paint(model, wanted):
            if event.kind == "image":
                service.metrics.finished(model, began, event.value["slices"], event.value["batch"])
                event = Event("image", event.value["answer"])
            is_over = event.kind in ("image", "error")
            if event.kind != "queued":
                yield event
    finally:
        service.active[model] -= 1
        gauge.dec()
        if not is_over:
            service.metrics.cancelled.labels(model).inc()


async def _last(events: AsyncIterator[Event]) -> Any:
    """The image. Raises ServiceError."""
    async for event in events:
        if event.kind == "error":
            raise ServiceError(event.value["status"], event.value["detail"])
        if event.kind == "image":
            return event.value
    raise ServiceError(503, "model: it ended without an answer: send the request again", retry_after_s=2)


async def _as_text(events: AsyncIterator[Event]) -> AsyncIterator[str]:
    """Server-sent events (WHATWG HTML, 9.2)."""
    try:
        async for event in events:
            yield f"event: {event.kind}\ndata: {json.dumps(event.value)}\n\n"
    except ServiceError as error:
        yield f"event: error\ndata: {json.dumps({'status': error.status, 'detail': error.detail})}\n\n"


async def _refuse_doubled(request: Request) -> None:
    """Raise ServiceError for a field that is there twice: one of its values would be used without a word."""
    names = [name for name, _ in (await request.form()).multi_items()]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ServiceError(422, "\n".join(f"{name[:64]}: given more than once: send it once" for name in twice))


async def _upload(form: MaskForm) -> MaskUpload:
    return MaskUpload(
        content=await form.mask.read(),
        labels=_labels(form.labels),
        other_labels=form.other_labels,
        outline=form.outline,
        spacing=form.spacing,
    )


def _labels(text: str | None) -> Mapping[str, Any] | str | None:
    if text is None or not text.strip():
        return None
    if text.strip() in LABEL_TABLES:
        return text.strip()
    try:
        table = json.loads(text, object_pairs_hook=_each_once)
    except (ValueError, RecursionError):
        table = None
    if not isinstance(table, dict):
        known = ", ".join(LABEL_TABLES)
        raise ServiceError(422, f"labels: {text[:60]}: give a JSON object with id: name, or one of {known}")
    return table


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Raises ValueError for a key that is there twice."""
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a key is there twice")
    return found


async def _on_service_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    return JSONResponse({"detail": error.detail}, error.status, headers_of(error))


async def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    sent = request.headers.get("content-type", "(none)")
    if request.method == "POST" and not sent.lower().startswith(_MULTIPART):
        detail = f"Content-Type: {sent[:80]}: send a form as {_MULTIPART}, with the mask as a file"
        return JSONResponse({"detail": detail}, 415, HEADERS)
    return JSONResponse({"detail": "\n".join(map(_invalid, error.errors()))}, 422, HEADERS)


def _invalid(one: Mapping[str, Any]) -> str:
    """A field that pydantic refuses."""
    name = ".".join(map(str, one["loc"][1:])) or "body"
    value = one.get("input")
    if one["type"] == "missing":
        return f"{name}: (not given): send it"
    if name == "mask" and one["type"] == "value_error":
        return f"{name}: {str(value)[:60]}: send a file, not a text"
    if one["type"] == "extra_forbidden":
        return f"{name[:64]}: no such field: leave it out"
    shown = str(value)[:60] if isinstance(value, str | int | float) else "(not given)" if value is None else "(a value)"
    remedy = next((text for kind, text in _REMEDIES.items() if one["type"].startswith(kind)), one["msg"])
    return f"{name}: {shown}: {remedy.format(**one.get('ctx', {}))}"


async def _on_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"detail": str(error.detail)}, error.status_code, {**(error.headers or {}), **HEADERS})


async def _on_fault(_: Request, error: Exception) -> Response:
    """An error of ours: its kind alone."""
    return JSONResponse({"detail": f"service: {type(error).__name__}: report it, with the request"}, 500, HEADERS)
