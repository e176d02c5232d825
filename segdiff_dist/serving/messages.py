"""What passes between the HTTP side and a model: requests one way, events the other. Imports nothing heavy."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from data_shards.problems import InputProblems, Problem

Form = Literal["png", "nifti", "dicom", "json"]
MEDIA_TYPES: dict[Form, str] = {
    "png": "image/png",
    "nifti": "application/x-nifti",
    "dicom": "application/dicom+zip",
    "json": "application/json",
}
# A flag of the command line in a remedy: here it is a field of the form.
_FLAG = re.compile(r"--([a-z][a-z-]*)")
# Fields of problems that say: the file cannot be read. Others say that its content, or a setting, does not fit.
_UNREADABLE = ("PNG", "DICOM", "voxels", "NIfTI", "header", "file", "data type", "dimensions", "affine", "mask format")
_TOO_LARGE = ("size", "shape")


@dataclass(frozen=True)
class MaskUpload:
    """A mask as it came: the bytes of one file. `labels`: a table of ids and names, or a known table's name."""

    content: bytes
    labels: Mapping[str, Any] | str | None = None
    other_labels: Literal["refuse", "body", "background"] = "refuse"
    outline: Literal["auto", "none"] = "auto"
    spacing: float | None = None


@dataclass(frozen=True)
class PaintRequest:
    """An image to make. None: the model's own value. `form`: of the answer."""

    mask: MaskUpload
    modality: str | None = None
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    axis: str = "axial"
    form: Form = "nifti"
    shows_progress: bool = False


@dataclass(frozen=True)
class Event:
    """A step of a request. `kind`: queued, progress, image or error; `value`: as docs/serve.md says, or bytes of an
    image file."""

    kind: Literal["queued", "progress", "image", "error"]
    value: Any


class ServiceError(Exception):
    """An answer with a status other than 200."""

    def __init__(self, status: int, detail: str, retry_after_s: int | None = None) -> None:
        super().__init__(status, detail, retry_after_s)
        self.status, self.detail, self.retry_after_s = status, detail, retry_after_s


class Backend(Protocol):
    """The models, as the HTTP side sees them. Names of models are checked before."""

    @property
    def models(self) -> list[dict[str, Any]]:
        """The descriptions of GET /models; empty while models load."""

    def paint(self, model: str, request: PaintRequest) -> AsyncIterator[Event]:
        """The events of a request, the last of which is an image or an error. Raises ServiceError."""

    async def read_mask(self, model: str, mask: MaskUpload) -> dict[str, Any]:
        """The answer of POST /masks. Raises ServiceError."""

    async def examples(self, model: str) -> dict[str, bytes]:
        """Masks to begin with, as NIfTI in the model's ids, by name."""


def as_service_error(error: InputProblems, *, is_opening: bool = False) -> ServiceError:
    """`field: value: remedy` of each problem, without the place of the file on the server. 400: the file cannot be
    read; 422: its content or a setting is refused."""
    fields = {one.field for one in error.problems}
    unreadable = not fields.intersection(_TOO_LARGE) and (is_opening or bool(fields.intersection(_UNREADABLE)))
    return ServiceError(400 if unreadable else 422, "\n".join(map(detail_of, error.problems)))


def detail_of(found: Problem) -> str:
    """A problem in the words of the interface."""
    text = f"{found.field}: {found.value}: {found.remedy}"
    if found.where and found.where not in ("mask", "command line"):
        text = text.replace(found.where, "mask")
    return _FLAG.sub(lambda match: match[1].replace("-", "_"), text)
