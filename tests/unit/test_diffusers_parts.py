"""diffusers' private parts have one owner, which refuses versions that it does not know."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import segdiff_dist
from data_shards.problems import InputProblems
from segdiff_dist.diffusers_parts import BEFORE, FIRST, check_version


@pytest.mark.parametrize("found", [FIRST, "0.42.1"])
def test_known_versions_pass(found: str) -> None:
    check_version(found)


@pytest.mark.parametrize("found", ["0.37.9", BEFORE, "1.0.0"])
def test_another_version_is_refused_in_one_line(found: str) -> None:
    with pytest.raises(InputProblems) as refused:
        check_version(found)
    assert str(refused.value) == f"diffusers: version: {found}; pip install 'diffusers>={FIRST},<{BEFORE}'"


def test_the_package_asks_for_the_same_versions() -> None:
    pyproject = Path(__file__).parents[2] / "pyproject.toml"
    assert f'"diffusers>={FIRST},<{BEFORE}"' in pyproject.read_text()


def test_no_other_file_imports_them() -> None:
    importers = set()
    for file in Path(segdiff_dist.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("diffusers."):
                importers.add(file.name)
    assert importers == {"diffusers_parts.py"}
