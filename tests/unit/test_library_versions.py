"""Libraries whose internals are used: the versions that are accepted, and what is said of others."""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from data_shards.problems import InputProblems
from segdiff_dist.library_versions import SUPPORTED, require_supported

ROOT = Path(__file__).parents[2]


def test_the_installer_and_the_adapters_accept_the_same_versions() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = {one.name: one for one in map(Requirement, project["dependencies"])}
    for library, versions in SUPPORTED.items():
        assert requirements[library].specifier == SpecifierSet(versions)


@pytest.mark.parametrize("library", SUPPORTED)
def test_another_version_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    require_supported(library)
    monkeypatch.setattr(metadata, "version", lambda _: "99.1")
    with pytest.raises(InputProblems, match=rf"{library}: .*99.1.*pip install '{library}>=") as refused:
        require_supported(library)
    assert "\n" not in str(refused.value)
