"""The tour in the README: every line can be pasted, and names the settings it is sized by."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from segdiff_dist import cli

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
    assert config.startswith("launch/configs/")
    dry = [*line, "--dry-run"]
    if line[0] == "sample":  # which would also look for the weights
        dry.append("--help")
        with pytest.raises(SystemExit, match="0"):
            cli.main(dry)
        return
    assert cli.main(dry) == 0
    assert "size: 64" in capsys.readouterr().out
