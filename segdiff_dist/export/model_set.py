"""What a model's user must know of the set that it was trained on: how slices were cut, and how much they show."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_shards.documents import parse_yaml
from data_shards.problems import InputProblems, problem
from data_shards.records import AXES

if TYPE_CHECKING:
    from data_shards.store.shards import ShardSet

# Settings of `prepare` that change the meaning of a pixel: its grey value, and the place that it shows.
_OF_A_PIXEL = ("intensity", "hu_window", "mr_percentiles", "size", "spacing_mm", "fit")


@dataclass(frozen=True)
class ModelSet:
    """`field_mm`: the median side of the squares that the slices show."""

    preprocessing: Mapping[str, Any]
    field_mm: float
    shards: ShardSet

    @classmethod
    def of(cls, data: str | None) -> ModelSet | None:
        """The description of the set in a folder or at a URL; None if it cannot be opened."""
        shards = None if data is None else _opened([data])
        if shards is None:
            return None
        spacing_N2 = np.array(shards.samples["spacing_mm"].to_pylist(), np.float64)
        field_mm = float(np.median(spacing_N2.max(axis=-1))) * shards.size if spacing_N2.size else 0.0
        return cls(shards.index["preprocessing"], field_mm, shards)


def unseen_axis(axis: str, axes: Sequence[str]) -> str | None:
    """A note if a model that was trained on slices along `axes` is to make others."""
    if not axes or axis in axes:
        return None
    return f"the model was trained on {', '.join(axes)} slices and has seen no {axis} one: its images are a guess"


def warn_of_unseen_axis(axis: str, shards: ShardSet, used: Sequence[str]) -> None:
    """The same for a set of which slices along the axes `used` were trained on."""
    there = [one for code, one in enumerate(AXES) if one in used and (shards.axis_N == code).any()]
    if (note := unseen_axis(axis, there)) is not None:
        warnings.warn(f"axis {axis}: {note}", stacklevel=2)


def refuse_other_set(run: Path, shards: ShardSet, remedy: str) -> None:
    """Refuse a set whose pixels mean something else than those of the set that the run was trained on; warn where that
    set is not known any more."""
    differ = unlike_trained_set(run, shards)
    if differ is None:
        text = "if it was prepared with other settings, HU and the size of organs are wrong"
        warnings.warn(f"{shards.root}: not the set that {run} was trained on; {text}; {remedy}", stacklevel=2)
    elif differ:
        raise problem(shards.root, "shard set", "; ".join(differ), remedy)


def unlike_trained_set(run: Path, shards: ShardSet) -> list[str] | None:
    """How the slices of `shards` differ in meaning from those that the run's newest checkpoint was trained on: none for
    the same set, and without a checkpoint. None: another set, and that of the training is not there any more."""
    from segdiff_dist.training.checkpoint import is_checkpoint_folder, read_state, why_unusable

    folders = sorted(filter(is_checkpoint_folder, (run / "checkpoints").glob("[0-9]*")), reverse=True)
    newest = next((one for one in folders if why_unusable(one) is None), None)
    digest = None if newest is None else read_state(newest).get("shards_digest")
    if newest is None or digest is None or digest in (shards.digest, shards.index.get("converted_from")):
        return []
    roots: list[str] = []
    with suppress(InputProblems, OSError, TypeError, AttributeError):
        said = parse_yaml((newest / "config.yaml").read_bytes(), newest, "train again")
        roots = [str(said["data"]), *map(str, said.get("more_data", ()))]
    trained = _opened(roots)
    if trained is None or trained.digest != digest:
        return None
    before, now = trained.index["preprocessing"], shards.index["preprocessing"]
    return [
        f"{name} is {now.get(name)}, and the model was trained with {before.get(name)}"
        for name in _OF_A_PIXEL
        if now.get(name) != before.get(name)
    ]


def _opened(roots: Sequence[str]) -> ShardSet | None:
    from data_shards.store.shards import ShardSet

    try:
        return ShardSet.open(list(roots), check_files=False) if roots else None
    except (InputProblems, OSError):
        return None
