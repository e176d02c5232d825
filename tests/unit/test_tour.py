"""The tour, in docs/tour.md and in the README: every line can be pasted, and names the settings it is sized by."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from layouts_support import write_nnunet, write_totalsegmentator

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


# Of data that nothing in the tour makes.
OWN = re.compile(r"^    (segdiff prepare (?:nnUNet_raw|Totalseg|DICOM)\S* \S+) +#", re.MULTILINE)


def write_liver(root: Path) -> None:
    """An nnU-Net data set with one channel and no splits."""
    write_nnunet(root)
    (root / "splits_final.json").unlink()
    for file in sorted(root.glob("images*/*_0001.nii.gz")):
        file.rename(file.with_name(file.name.replace("_0001", "_0000")))
    content = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1, "spleen": 2}}
    (root / "dataset.json").write_text(json.dumps(content | {"file_ending": ".nii.gz"}))


def test_the_lines_for_one_s_own_data_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("highdicom")
    from dicom_support import write_dicom

    lines = OWN.findall((ROOT / "README.md").read_text())
    assert len(lines) == 3
    assert lines == OWN.findall((ROOT / "docs/tour.md").read_text())
    monkeypatch.chdir(tmp_path)
    for line, write in zip(lines, (write_liver, write_totalsegmentator, write_dicom), strict=True):
        arguments = shlex.split(line)[1:]
        write(tmp_path / arguments[1])
        assert cli.main([*arguments, "--dry-run"]) == 0, line
        assert "cases: " in capsys.readouterr().out
