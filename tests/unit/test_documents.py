"""JSON and YAML that anybody may have written end in values or in one problem with file and remedy."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mutations_support import changed_bytes, changed_json
from typing_extensions import TypedDict

from data_shards.documents import (
    checked,
    parse_json,
    parse_json_value,
    parse_yaml,
    read_bytes,
    read_json,
    reading,
    shown,
)
from data_shards.problems import InputProblems, Problem
from segdiff_dist.config import read_yaml

BILLION_LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
BAD_JSON = {
    "cut short": b'{"a": [1, 2',
    "not text": b"\xff\xfe\x00\x01",
    "nested 10,000 deep": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    "nested 100 deep": b'{"a":' * 100 + b"1" + b"}" * 100,
    "a list": b"[1, 2]",
    "a number": b"7",
    "nothing": b"",
    "an endless number": b'{"a": ' + b"9" * 10_000 + b"}",
    "a long number": b'{"a": ' + b"9" * 100 + b"}",
    "a number beyond all": b'{"a": 1e999}',
    "no number": b'{"a": [NaN]}',
    "a key twice": b'{"a": 1, "b": {"c": 1, "c": 2}}',
    "half a character": b'{"a": "\\ud800"}',
    "a path's end": b'{"a\\u0000": 1}',
}
BAD_YAML = {
    "anchors": BILLION_LAUGHS,
    "merged anchors": "a: &a {x: 1}\nb: {<<: *a}\n",
    "nested": "[" * 5000 + "]" * 5000,
    "cut short": "train: {lr: [1, 2",
    "an unknown tag": "train: !!python/object/apply:os.system [true]",
    "binary that is none": "train: !!binary é",
    "too long": "x: " + "y" * 1_100_000,
    "an endless number": "x: " + "9" * 10_000,
    "infinity": "x: .inf",
    "a key twice": "x: {a: 1, a: 2}",
    "truth for a key": "yes: a",
    "a list for a key": "? [a]\n: b",
    "an empty number": "x: !!int ''",
    "truth that is none": "x: !!bool maybe",
    "two documents": "a: 1\n---\nb: 2",
    "a bell": "a: \x07",
    "a path's end": 'a: "\\0"',
}


@pytest.mark.parametrize("content", BAD_JSON.values(), ids=BAD_JSON.keys())
def test_bad_json_is_one_short_problem(content: bytes, tmp_path: Path):
    file = tmp_path / "index.json"
    file.write_bytes(content)
    with pytest.raises(InputProblems) as caught:
        read_json(file, "restore it")
    [problem] = caught.value.problems
    assert problem.where == str(file)
    assert problem.remedy == "restore it"
    assert len(str(problem)) < 1000


@pytest.mark.parametrize("text", BAD_YAML.values(), ids=BAD_YAML.keys())
def test_bad_yaml_is_one_short_problem(text: str, tmp_path: Path):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(InputProblems) as caught:
        read_yaml(file)
    assert len(str(caught.value)) < 1000


def test_good_documents_are_read(tmp_path: Path):
    assert parse_json(b'\xef\xbb\xbf{"a": [1, {"b": null}]}', "x", "r") == {"a": [1, {"b": None}]}
    assert parse_json_value(b"[1]", "x", "r") == [1]
    assert parse_yaml("\ufeffa: {b: [1, 2.5, x]}".encode(), "x", "r") == {"a": {"b": [1, 2.5, "x"]}}
    assert parse_yaml(b"a: 2024-99-99\n200: 6", "x", "r") == {"a": "2024-99-99", 200: 6}
    deep: object = 1
    for _ in range(60):
        deep = {"a": deep}
    assert parse_json(json.dumps(deep).encode(), "x", "r") == deep


def test_only_files_of_a_bounded_length_are_read(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")  # a plain read would wait for ever
    (tmp_path / "large").write_bytes(bytes(11))
    for name in ("pipe", "large", "missing", "."):
        with pytest.raises(InputProblems):
            read_bytes(tmp_path / name, "remove it", most_bytes=10)


@pytest.mark.parametrize(
    "error",
    [KeyError("size"), TypeError("x"), IndexError("x"), OverflowError("x"), ValueError(), NotImplementedError()],
)
def test_what_a_reader_trips_over_becomes_a_problem(error: Exception):
    with (
        pytest.raises(InputProblems, match=r"layout\.json: content: not a layout .*; sample again"),
        reading("layout.json", "a layout", "sample again"),
    ):
        raise error


def test_text_of_others_is_one_bounded_line():
    assert shown("a\x1b[31m\nb") == "a [31m b"
    assert len(shown("x" * 10**6)) == 160
    assert len(str(Problem("w" * 10**7, "f" * 10**7, "v" * 10**7, "r" * 10**7))) < 4_000


class _Shape(TypedDict):
    a: list[int]


@pytest.mark.parametrize("values", [{}, {"a": None}, {"a": [1, True]}, {"a": [1.0]}, {"a": ["x"] * 10_000}, []])
def test_values_of_another_type_are_a_few_problems(values: object):
    checked({"a": [1, 2], "b": None}, _Shape, "file", "a thing", "restore it")
    with pytest.raises(InputProblems, match=r"file: content: not a thing \(") as caught:
        checked(values, _Shape, "file", "a thing", "restore it")
    assert len(str(caught.value)) < 3_000


def test_mutated_documents_are_read_or_refused():
    rng = random.Random(0)
    good = {"a": [1, 2.5, {"b": "text", "c": None}], "d": {"e": True, "f": [[], {}]}}
    refused: dict[Callable[..., Any], list[Problem]] = {parse_json_value: [], parse_yaml: []}
    for number in range(300):
        content = changed_json(good, rng)
        content = content if number % 2 else changed_bytes(content, rng)
        for parse, problems in refused.items():
            try:
                parse(content, "x", "restore it")
            except InputProblems as error:
                problems += error.problems
    for problems in refused.values():
        assert 20 < len(problems) < 300
        assert [one for one in problems if not str(one).isprintable()] == []
