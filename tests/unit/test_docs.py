"""README, architecture page and site: what they say of the repository is so."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
PACKAGES = ("data_shards", "segdiff_dist", "kernels/segdiff_kernels")


def test_the_readme_is_short_and_begins_with_a_picture() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    picture = re.fullmatch(r"!\[.*\]\((.*)\)", lines[2])
    assert picture is not None
    assert (ROOT / picture[1]).is_file()


def test_the_architecture_page_names_every_folder_once() -> None:
    tree = ARCHITECTURE.split("```")[1]
    named = [line.split()[0].rstrip("/") for line in tree.splitlines() if line]
    assert len(named) == len(set(named))
    assert [folder for folder in named if not (ROOT / folder).is_dir()] == []
    packages = {path.parent.relative_to(ROOT).as_posix() for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
    assert packages <= set(named)


def test_the_architecture_page_names_files_that_exist() -> None:
    names = set(re.findall(r"`([\w/]+\.py)`", ARCHITECTURE))
    everything = {path.relative_to(ROOT).as_posix() for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
    assert {name for name in names if not any(path.endswith(name) for path in everything)} == set()


def test_one_address_stands_for_the_project() -> None:
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    site = re.search(r"^site_url: (.*)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert citation["url"] == urls["Homepage"]
    assert site is not None
    assert site[1].startswith(urls["Homepage"])
