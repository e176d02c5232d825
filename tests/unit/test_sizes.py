"""Sizes of the code: short functions, short files, few parameters; a file name that many modules share."""

from __future__ import annotations

import ast
import statistics
from functools import cache
from pathlib import Path

from segdiff_dist.weight_files import DESCRIPTION

ROOT = Path(__file__).parents[2]
PACKAGES = ("segdiff_dist", "data_shards", "kernels/segdiff_kernels", "launch")
# Longer or wider than the rest, with the reason. docs/architecture.md, "Sizes", names them.
LONG = {"train": "the whole course of a training"}
WIDE = {"__call__": "diffusers gives its pipelines these parameters"}


@cache
def functions(package: str) -> list[tuple[Path, ast.FunctionDef | ast.AsyncFunctionDef]]:
    return [
        (file, node)
        for file in sorted((ROOT / package).rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def num_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    assert function.end_lineno is not None
    return function.end_lineno - function.lineno + 1


def num_parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    given = function.args
    names = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")]) + bool(given.vararg) + bool(given.kwarg)


def test_functions_are_short() -> None:
    lines = [num_lines(function) for package in PACKAGES for _, function in functions(package)]
    assert statistics.median(lines) <= 8
    assert statistics.quantiles(lines, n=10)[-1] <= 24
    python = [package for package in PACKAGES if not package.startswith("kernels")]
    long = [f"{file}:{one.name}" for package in python for file, one in functions(package) if num_lines(one) > 60]
    assert [name for name in long if name.split(":")[1] not in LONG] == []
    assert len(long) == len(LONG)


def test_files_are_short() -> None:
    files = [file for folder in (*PACKAGES, "tests", "benchmarks") for file in (ROOT / folder).rglob("*.py")]
    assert [str(file) for file in files if len(file.read_text().splitlines()) > 400] == []


def test_functions_have_few_parameters() -> None:
    python = [package for package in PACKAGES if not package.startswith("kernels")]
    wide = [f"{file}:{one.name}" for package in python for file, one in functions(package) if num_parameters(one) > 8]
    assert [name.split(":")[1] for name in wide] == list(WIDE), wide


def test_the_name_of_a_description_is_written_once() -> None:
    texts = [
        f"{file}:{node.lineno}"
        for package in PACKAGES
        for file in sorted((ROOT / package).rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and str(node.value).split("/")[-1] == DESCRIPTION
    ]
    assert [text.split(":")[0] for text in texts] == [str(ROOT / "segdiff_dist/weight_files.py")], texts
