"""Tests know the packages by their public names alone, so that what is private may change without them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parents[1]
OURS = ("data_shards", "segdiff_dist", "segdiff_kernels")


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def reached(tree: ast.Module) -> Iterator[str]:
    """Private names of ours that a file imports, reads as an attribute or sets."""
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    of_ours = [node for node in imports if str(node.module).split(".")[0] in OURS]
    for node in of_ours:
        names = [*str(node.module).split("."), *(alias.name for alias in node.names)]
        yield from filter(is_private, names)
    known = {alias.asname or alias.name for node in of_ours for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in known:
            yield from filter(is_private, [node.attr])
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("setattr") and len(node.args) > 1:
            first, second = node.args[:2]
            if isinstance(first, ast.Name) and first.id in known and isinstance(second, ast.Constant):
                yield from filter(is_private, [str(second.value)])
            if isinstance(first, ast.Constant) and str(first.value).split(".")[0] in OURS:
                yield from filter(is_private, str(first.value).split("."))


def test_no_test_reaches_into_a_module() -> None:
    found = {file.name: list(reached(ast.parse(file.read_text()))) for file in TESTS.rglob("*.py")}
    assert {file: names for file, names in found.items() if names} == {}


def test_what_reaches_is_seen() -> None:
    lines = "from data_shards import locks, _a\nfrom segdiff_kernels._b import c\nlocks._d\n"
    lines += "patch.setattr(locks, '_e', 1)\npatch.setattr('data_shards.locks._f', 1)\nlocks.__doc__\nother._g\n"
    assert sorted(reached(ast.parse(lines))) == ["_a", "_b", "_d", "_e", "_f"]
