"""The wheel: it holds what an installed `segdiff` needs, and runs without the checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
import yaml

from data_shards import __version__

ROOT = Path(__file__).parents[2]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "data_shards", "segdiff_dist", "kernels", "launch")
PACKAGES = ("data_shards", "segdiff_dist", "segdiff_kernels")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built from a copy so that no build folder is left in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "source"
    copy.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
            )
        else:
            shutil.copy(ROOT / name, copy / name)
    _pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, copy)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    folder = wheel.parent / "site"
    _pip("install", "--no-deps", "--target", folder, wheel)
    return folder


def test_the_version_is_the_same_everywhere(wheel: Path) -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = re.findall(r"^## (\d\S*) - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0]
    assert {_metadata(wheel)["Version"], citation["version"], newest} == {__version__}


def test_types_configurations_and_templates_are_in_the_wheel(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    configs = {path.name for path in (ROOT / "segdiff_dist" / "configs").glob("*.yaml")}
    assert configs == {Path(name).name for name in names if name.endswith(".yaml")}
    templates = {path.name for path in (ROOT / "segdiff_dist").rglob("templates/*")}
    assert templates == {Path(name).name for name in names if "/templates/" in name}
    page = {path.name for path in (ROOT / "segdiff_dist" / "studio" / "page").rglob("*") if path.is_file()}
    assert page == {Path(name).name for name in names if "/studio/page/" in name}


def test_triton_is_installed_only_by_an_extra(wheel: Path) -> None:
    needs = [line for line in _metadata(wheel).get_all("Requires-Dist", []) if line.startswith("triton")]
    assert {re.search(r'extra == "(\w+)"', line)[1] for line in needs} == {"cuda", "dev"}


def test_an_installed_segdiff_needs_no_checkout(installed: Path, tmp_path: Path) -> None:
    where = _python(["-c", "import segdiff_dist, data_shards; print(segdiff_dist.__file__)"], installed, tmp_path)
    assert Path(where.strip()).is_relative_to(installed)
    assert "prepare" in _segdiff(["--help"], installed, tmp_path)
    assert "size: 64" in _segdiff(["demo", "--dry-run"], installed, tmp_path)
    assert "size: 32" in _segdiff(["phantom", "OUT", "--config", "smoke", "--dry-run"], installed, tmp_path)
    assert list(tmp_path.iterdir()) == []


def _metadata(wheel: Path) -> Message:
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(archive.read(name).decode())


def _segdiff(arguments: Sequence[str], site: Path, cwd: Path) -> str:
    return _python(["-m", "segdiff_dist", *arguments], site, cwd)


def _python(arguments: Sequence[str], site: Path, cwd: Path) -> str:
    """What Python prints, in `cwd`, with the packages of `site` and no others of ours in front."""
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
