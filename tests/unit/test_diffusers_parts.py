"""diffusers' private parts have one owner; test_library_versions.py tests the versions that it accepts."""

from __future__ import annotations

import ast
from pathlib import Path

import segdiff_dist


def test_no_other_file_imports_them() -> None:
    importers = set()
    for file in Path(segdiff_dist.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("diffusers."):
                importers.add(file.name)
    assert importers == {"diffusers_parts.py"}
