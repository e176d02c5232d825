"""The tour in the README: every line can be pasted, and names the settings it is sized by."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from segdiff_dist import cli
from segdiff_dist.shipped import shipped_names

ROOT = Path(__file__).parents[2]
TOUR = (ROOT / "README.md").read_text().split("## A tour")[1].split("mlflow ui")[0]
LINES = [shlex.split(line, comments=True)[1:] for line in re.findall(r"^    (segdiff .*)$", TOUR, re.MULTILINE)]


def test_the_tour_has_every_stage() -> None:
    assert [line[0] for line in LINES if line[0] in ("phantom", "prepare", "train", "sample", "evaluate", "evaluate")]
    assert len(LINES) > 10


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
