"""The values that a setting can have are said in its type: pydantic and `range_problems` decide alike."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pytest
from annotated_types import Ge, Gt, Interval, Lt
from pydantic import TypeAdapter, ValidationError

from data_shards.choices import Axis, LabelSet, Modality, Store
from data_shards.labels import LABEL_TABLES
from data_shards.problems import InputProblems
from data_shards.ranges import (
    RISING,
    Count,
    Positive,
    Share,
    Some,
    WholeNumber,
    is_allowed,
    metavar,
    range_problems,
    requirement,
)
from data_shards.settings import settings_of
from segdiff_dist.config import validate
from segdiff_dist.experiment import Experiment
from segdiff_dist.training.config import TrainConfig

PAIR = Annotated[tuple[Share, Share], RISING]
EXAMPLES: list[tuple[Any, list[Any], list[Any]]] = [
    (Count, [1, 7], [0, -1]),
    (Count | None, [None, 1], [0]),
    (Share, [0, 0.5, 1.0], [-0.1, 1.1, math.nan]),
    (Positive, [1e-9, math.inf], [0.0, math.nan]),
    (Axis, ["axial"], ["oblique", "Axial"]),
    (Some[Axis], [("axial",), ("coronal", "axial")], [(), ("axial", "axial"), ("x",)]),
    (Some[Modality], [("CT",), ("T1-ce", "CT")], [(), ("CT", "CT"), ("T1 ce",), ("same",)]),
    (PAIR, [(0.1, 0.2)], [(0.2, 0.1), (0.1, 1.1), (0.1,)]),
    (Count | Literal["auto"], [1, "auto"], [0, "fast"]),
    (Literal[0] | Annotated[int, Ge(5)], [0, 5], [1, 4]),
    (Annotated[float, Ge(0), Lt(1)], [0.0, 0.9], [1.0]),
    (Path | None, [None, Path("x")], [3]),
    (bool, [True], ["perhaps"]),
]


@pytest.mark.parametrize(("hint", "good", "bad"), EXAMPLES, ids=lambda value: str(value)[:40])
def test_pydantic_and_we_allow_the_same_values(hint: Any, good: list[Any], bad: list[Any]) -> None:
    adapter = TypeAdapter(hint)
    for value in good:
        assert is_allowed(value, hint)
        adapter.validate_python(value)
    for value in bad:
        assert not is_allowed(value, hint)
        with pytest.raises(ValidationError):
            adapter.validate_python(value)


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (WholeNumber | None, "a whole number of at least 0, or null"),
        (Annotated[int, Interval(ge=0, le=3)], "a whole number from 0 to 3"),
        (Positive, "a number above 0"),
        (Some[Store], "one or more of webdataset, zarr, each once"),
        (PAIR, "2 values, each a number from 0 to 1, the lower one first"),
        (Count | Literal["auto"], "a whole number of at least 1 or auto"),
    ],
)
def test_a_type_in_words(hint: Any, words: str) -> None:
    assert requirement(hint) == words


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (Count, "INT (1 or more)"),
        (WholeNumber | None, "INT|None (0 or more)"),
        (Share, "FLOAT (0 to 1)"),
        (Count | Literal["auto"], "INT|auto (1 or more)"),
        (Annotated[float, Gt(0), Lt(1)], "FLOAT (above 0, below 1)"),
        (Some[Store], "{webdataset,zarr} [{webdataset,zarr} ...] (each once)"),
        (Some[Modality], "STR [STR ...] (each letters, digits and -, each once)"),
        (PAIR, "FLOAT FLOAT (each 0 to 1, the lower one first)"),
        (tuple[Annotated[int, Ge(0), Lt(9)], ...], "[INT [INT ...]] (each 0 or more and below 9)"),
        (Store | None, "{webdataset,zarr}|None"),
        (Path, None),
    ],
)
def test_a_type_in_the_words_of_a_flag(hint: Any, words: str | None) -> None:
    assert metavar(hint) == words


def test_what_is_out_of_range_is_said_with_value_and_range() -> None:
    found = range_problems(TrainConfig(lr=-1.0, zero_stage=7, betas=(0.9, 1.0)), "config", "train.")
    assert list(map(str, found)) == [
        "config: train.lr: -1.0; give a number of at least 0",
        "config: train.betas: [0.9, 1.0]; give 2 values, each a number of at least 0 and below 1",
        "config: train.zero_stage: 7; give a whole number from 0 to 3",
    ]


def test_a_file_is_refused_with_the_same_words_each_setting_once() -> None:
    values = {"train": {"betas": [2, 3], "micro_batch_size": 0, "zero_stage": 7}, "loader": {"axes": ["x", "y"]}}
    with pytest.raises(InputProblems) as error:
        validate(Experiment, values, "f.yaml")
    assert list(map(str, error.value.problems)) == [
        "f.yaml: loader.axes: 'x'; give one or more of axial, coronal, sagittal",
        "f.yaml: train.micro_batch_size: 0; give a whole number of at least 1 or auto",
        "f.yaml: train.betas: 2; give 2 values, each a number of at least 0 and below 1",
        "f.yaml: train.zero_stage: 7; give a whole number from 0 to 3",
    ]


def sections(section: Any) -> list[Any]:
    nested = [one.default_factory for one in fields(section) if is_dataclass(one.default_factory)]
    return [one for kind in nested for one in (kind(), *sections(kind()))]


def test_defaults_are_allowed_and_every_type_has_words() -> None:
    for section in sections(Experiment()):
        assert range_problems(section, "config") == []
        assert [
            one.name for one in settings_of(type(section)) if one.effect and "a value" in requirement(one.type)
        ] == []


def test_sections_refuse_what_their_types_do_not_allow() -> None:
    experiment = Experiment()
    assert [p.field for p in replace(experiment.loader, zoom=2.0).problems()] == ["loader.zoom"]
    assert [p.field for p in replace(experiment.segmenter, zoom=2.0, dice_over=0).problems()] == [
        "segmenter.zoom",
        "segmenter.dice_over",
    ]
    assert [p.field for p in replace(experiment.denoiser, block_out_channels=()).problems()] == [
        "denoiser.block_out_channels"
    ]


def test_every_label_table_can_be_chosen() -> None:
    assert get_args(LabelSet) == tuple(LABEL_TABLES)
