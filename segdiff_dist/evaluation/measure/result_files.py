"""The files of an evaluation in a run folder, read and checked. A file of another shape is refused.

RUN/evaluation/summary.json, samples.parquet, predictions.zarr, figures/index.json; RUN/downstream/summary.json
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from data_shards.documents import MISREAD, checked, parse_json_value, read_bytes, read_json, reading, shown
from data_shards.problems import InputProblems, OutOfSpace, problem
from data_shards.records import is_path_inside
from data_shards.store.zarr_bounds import bound_zstd, is_plain_array
from segdiff_dist.config import next_command
from segdiff_dist.evaluation.measure.publishing import PREDICTIONS, SAMPLES, SUMMARY, place_of
from segdiff_dist.evaluation.measure.segmenter_check import mark_unreliable

if TYPE_CHECKING:
    import pyarrow as pa

FIGURES = "figures/index.json"
_FOLDER = "evaluation"
_Count = Annotated[int, Field(ge=0, lt=2**53)]
_Interval = Annotated[list[float], Field(min_length=2, max_length=2)]


class _Entry(TypedDict):
    value: float
    ci95: NotRequired[_Interval | None]
    n: NotRequired[_Count]


_Entries = dict[str, _Entry]


class _Diversity(TypedDict):
    num_masks: NotRequired[_Count]
    num_images: NotRequired[_Count]
    metrics: NotRequired[_Entries]
    by_modality: NotRequired[dict[str, _Entries]]


class _Provenance(TypedDict):
    sample_job: NotRequired[dict[str, Any]]
    shards_digest: NotRequired[str]
    segmenter_sha256: NotRequired[str]


class _Leakage(TypedDict):
    num_leaked: _Count
    patients: list[str]
    files: list[str]


class _Memorisation(TypedDict):
    passed: bool | None
    nearest: list[dict[str, Any]]
    reason: NotRequired[str]


class _Trust(TypedDict):
    leakage: NotRequired[_Leakage]
    memorisation: NotRequired[_Memorisation | None]


class _Summary(TypedDict):
    format_version: int
    num_samples: _Count
    num_patients: _Count
    metrics: _Entries
    by_modality: dict[str, _Entries]
    by_axis: dict[str, _Entries]
    by_modality_axis: dict[str, _Entries]
    by_organ: dict[str, _Entries]
    by_modality_organ: dict[str, dict[str, _Entries]]
    by_axis_organ: dict[str, dict[str, _Entries]]
    body: _Entries
    cross_modality: dict[str, _Entries]
    diversity: _Diversity
    grey_values: dict[str, dict[str, list[_Count]]]
    rows_sha256: NotRequired[str]
    trust: NotRequired[_Trust]
    not_available: NotRequired[dict[str, str]]
    provenance: _Provenance


class _Gain(TypedDict):
    dice: _Entry


class _Arm(TypedDict):
    name: str
    label: str
    dice: _Entry
    by_modality: _Entries
    gain: NotRequired[_Gain]


class _DownstreamSettings(TypedDict):
    weights_digest: str


class _Downstream(TypedDict):
    arms: list[_Arm]
    settings: _DownstreamSettings


def read_summary(run: Path) -> dict[str, Any]:
    """RUN/evaluation/summary.json. Numbers that mean nothing are marked, also in a summary of an earlier version."""
    file = place_of(run / _FOLDER, SUMMARY)
    summary = read_json(file, _evaluate_again(run), "the summary of an evaluation")
    checked(summary, _Summary, file, "the summary of an evaluation", _evaluate_again(run))
    return mark_unreliable(summary)


def read_downstream(run: Path) -> dict[str, Any] | None:
    """RUN/downstream/summary.json, which `segdiff evaluate --downstream` writes; None if it is not there."""
    file, remedy = run / "downstream" / SUMMARY, "remove it, or run `segdiff evaluate` with downstream again"
    if not file.exists():
        return None
    summary = read_json(file, remedy, "the summary of a downstream task")
    checked(summary, _Downstream, file, "the summary of a downstream task", remedy)
    return summary


def read_figures(run: Path) -> list[dict[str, str]]:
    """RUN/evaluation/figures/index.json: file, title, caption and section of each figure; empty if there is none."""
    file, remedy = run / _FOLDER / FIGURES, f"draw them again: `segdiff report {shlex.quote(str(run))}`"
    if not file.exists():
        return []
    figures: list[dict[str, str]] = parse_json_value(read_bytes(file, remedy), file, remedy, "a list of figures")
    checked(figures, list[dict[str, str]], file, "a list of figures", remedy)
    with reading(file, "a list of figures", remedy):
        if not all(is_path_inside(figure["file"]) for figure in figures):
            raise ValueError("a path leads out of the folder")
    return figures


def row_columns(run: Path) -> list[str]:
    """The names of the columns of RUN/evaluation/samples.parquet."""
    import pyarrow.parquet as pq

    file = place_of(run / _FOLDER, SAMPLES)
    with reading(file, "the table of an evaluation", _evaluate_again(run)):
        return list(pq.read_schema(file).names)


def read_rows(run: Path, columns: Sequence[str], summary: dict[str, Any] | None = None) -> pa.Table:
    """Columns of RUN/evaluation/samples.parquet, a row an item. `summary`: what read_summary gave; the rows must be of
    the same evaluation."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = place_of(run / _FOLDER, SAMPLES)
    with reading(file, "the table of an evaluation", _evaluate_again(run)):
        content = file.read_bytes()
        expected = (summary or {}).get("rows_sha256")
        if expected is not None and sha256(content).hexdigest() != expected:
            raise ValueError("it is not of the same evaluation as summary.json, or another one has just replaced it")
        schema = pq.read_schema(pa.BufferReader(content))
        for name in columns:
            kind = schema.field(name).type
            is_text = name in ("case_id", "patient", "source_modality", "target_modality", "axis")
            if not (pa.types.is_string(kind) if is_text else pa.types.is_primitive(kind)):
                raise TypeError(f"{name} is a column of {kind}")
        table = pq.read_table(pa.BufferReader(content), columns=list(columns))
        table.validate(full=True)
        for name in columns:
            if table[name].null_count:
                raise ValueError(f"{name}: values are missing")
    return table


def open_predictions(run: Path, num_items: int) -> Any:
    """RUN/evaluation/predictions.zarr: labels predicted on the real and on the generated images, uint8 [N, H, W]."""
    import zarr

    bound_zstd()
    file = place_of(run / _FOLDER, PREDICTIONS)
    with reading(file, "the predictions of an evaluation", _evaluate_again(run)):
        group: Any = zarr.open_group(file, mode="r")
        for side in ("real", "gen"):
            array = group[side]
            height, width = array.shape[1:]
            if max(height, width) > 4096 or not 1 <= array.chunks[0] <= 1024:
                raise ValueError(f"{side}: {shown(array.shape)} in chunks {shown(array.chunks)}")
            if not is_plain_array(array, (num_items, height, width), (array.chunks[0], height, width)):
                raise ValueError(f"{side} is not an array of {num_items} label maps")
    return group


@contextmanager
def drawing(run: Path) -> Iterator[None]:
    """Around drawing figures and pages of a run that somebody else may have written: an error becomes a problem."""
    from jinja2 import TemplateError

    try:
        yield
    except (InputProblems, OutOfSpace, OSError):
        raise
    except (TemplateError, *MISREAD) as error:
        value = f"cannot be drawn ({type(error).__name__}: {shown(error)})"
        raise problem(run / _FOLDER, "content", value, _evaluate_again(run)) from error


def _evaluate_again(run: Path) -> str:
    return f"run {next_command('evaluate', run=run)}"
