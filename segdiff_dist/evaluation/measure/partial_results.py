"""What a killed evaluation has measured, kept on disk until all is written: the same command goes on from it.

RUN/evaluation/.kept-KEY/predictions.zarr     label maps, written by the workers
RUN/evaluation/.kept-KEY/NAME.npz             the result of one task, numbers only

KEY is a digest of all that the results depend on: samples, real images, segmenter, settings, versions, this code.
Results of another key are removed. KEY also depends on the user's own key (segdiff_dist.tracking.signing), so that
results from a folder that somebody else made are not taken.
"""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import segdiff_dist
from data_shards.files import write_atomic
from segdiff_dist.evaluation.measure.trust import Spread
from segdiff_dist.evaluation.measure.worker import Chunk, ChunkResult
from segdiff_dist.tracking.signing import signed

if TYPE_CHECKING:
    from segdiff_dist.sampling.store import SampleStore

_PREFIX = ".kept-"
_CLASSES: dict[str, type[Any]] = {one.__name__: one for one in (ChunkResult, Spread)}


class PartialResults:
    """Results by task. A task's name is made of its fields; paths are no part of it."""

    def __init__(self, folder: Path, depends_on: Mapping[str, Any]) -> None:
        """`folder`: RUN/evaluation, whose lock the caller holds."""
        key = signed({"depends_on": json.dumps(depends_on, sort_keys=True, default=str)})["signature"][:24]
        self.path = folder / f"{_PREFIX}{key}"
        for other in folder.glob(f"{_PREFIX}*"):
            if other != self.path:
                shutil.rmtree(other)
        self.path.mkdir(exist_ok=True)
        for file in self.path.glob("*.npz"):
            # A chunk is its label maps too: they are gone where the evaluation was killed as it was written.
            is_chunk = file.name.startswith(f"{Chunk.__name__}-")
            if (is_chunk and not self.predictions.is_dir()) or not _is_whole(file):
                file.unlink()

    @property
    def predictions(self) -> Path:
        """The label maps."""
        return self.path / "predictions.zarr"

    def __contains__(self, task: Any) -> bool:
        return self._file(task).is_file()

    def read(self, task: Any) -> Any:
        """The result of a task that is kept."""
        with np.load(self._file(task), allow_pickle=False) as arrays:
            return _decoded(json.loads(bytes(arrays["shape"])), arrays)

    def write(self, task: Any, result: Any) -> None:
        """Keep the result of a task."""
        arrays: list[np.ndarray] = []
        shape = json.dumps(_encoded(result, arrays)).encode()
        content = io.BytesIO()
        named: Any = {f"a{i}": array for i, array in enumerate(arrays)}
        np.savez(content, shape=np.frombuffer(shape, np.uint8), **named)
        write_atomic(self._file(task), content.getvalue())

    def remove(self) -> None:
        """The evaluation is written."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _file(self, task: Any) -> Path:
        return self.path / f"{type(task).__name__}-{sha256(_identity(task).encode()).hexdigest()[:24]}.npz"


def _is_whole(file: Path) -> bool:
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


def samples_digest(store: SampleStore) -> str:
    """The digest of the job, its items, and the checksums of all images."""
    marks = [store.mark(index) for index in range(store.num_regions)]
    checksums = [{name: value for name, value in mark.items() if name != "seconds"} for mark in marks]
    items = store.items.to_pydict()
    return sha256(json.dumps([store.job, items, checksums], sort_keys=True, default=str).encode()).hexdigest()


def code_digest() -> str:
    """The digest of this package's source: results of other code are not taken."""
    root = Path(segdiff_dist.__file__).parent
    digest = sha256()
    for folder in ("evaluation", "segmentation", "sampling"):
        for file in sorted((root / folder).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _identity(task: Any) -> str:
    values = [getattr(task, one.name) for one in fields(task)]
    return repr([_of_array(value) if isinstance(value, np.ndarray) else value for value in _without_paths(values)])


def _without_paths(values: list[Any]) -> list[Any]:
    return [value for value in values if not isinstance(value, Path)]


def _of_array(array: np.ndarray) -> str:
    return f"{array.dtype}{array.shape}{sha256(np.ascontiguousarray(array).tobytes()).hexdigest()}"


def _encoded(value: Any, arrays: list[np.ndarray]) -> Any:
    """A result as JSON; its arrays are appended to `arrays`, and floats are arrays, so that no bit changes."""
    if is_dataclass(value):
        named = {one.name: getattr(value, one.name) for one in fields(value)}
        return ["class", type(value).__name__, _encoded(named, arrays)]
    if isinstance(value, dict):
        return ["dict", [[list(k) if isinstance(k, tuple) else k, _encoded(v, arrays)] for k, v in value.items()]]
    if isinstance(value, tuple):
        return ["tuple", [_encoded(one, arrays) for one in value]]
    arrays.append(np.asarray(value))
    return ["array" if isinstance(value, np.ndarray) else "number", len(arrays) - 1]


def _decoded(encoded: Any, arrays: Any) -> Any:
    kind, *rest = encoded
    if kind == "class":
        return _CLASSES[rest[0]](**_decoded(rest[1], arrays))
    if kind == "dict":
        return {tuple(k) if isinstance(k, list) else k: _decoded(v, arrays) for k, v in rest[0]}
    if kind == "tuple":
        return tuple(_decoded(one, arrays) for one in rest[0])
    array = arrays[f"a{rest[0]}"]
    return array if kind == "array" else array.item()
