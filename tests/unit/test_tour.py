"""The tour, in docs/tour.md and in the README: every line can be pasted, and names the settings it is sized by."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from segdiff_dist import cli
from segdiff_dist.shipped import shipped_names

ROOT = Path(__file__).parents[2]


def tour(page: str, heading: str) -> list[list[str]]:
    """The arguments of each line of the tour that calls segdiff."""
    text = (ROOT / page).read_text().split(f"{heading}\n")[1].split("mlflow ui")[0]
    return [shlex.split(line, comments=True)[1:] for line in re.findall(r"^    (segdiff .*)$", text, re.MULTILINE)]


LINES = tour("docs/tour.md", "# A tour of the commands")


def test_the_tour_has_every_stage() -> None:
    assert {"phantom", "prepare", "train-segmenter", "train", "sample", "evaluate"} <= {line[0] for line in LINES}
    assert len(LINES) > 10


def test_the_readme_has_the_same_tour() -> None:
    assert tour("README.md", "## A tour") == LINES


@pytest.mark.parametrize("line", [line for line in LINES if line != ["doctor"]], ids=lambda line: line[0])
def test_a_line_names_its_settings_and_is_understood(
    line: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    config = line[line.index("--config") + 1]
    assert config.startswith("launch/configs/") or config in shipped_names()
    cli.main([*line, "--dry-run"])  # what earlier lines make is missing here, so that most of them are refused
    said = capsys.readouterr()
    assert "size: 64" in said.out
    assert "Traceback" not in said.err
