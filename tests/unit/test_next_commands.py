"""Commands that messages name work when pasted: with the run's path, quoted, and no placeholder."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from data_shards.problems import InputProblems
from segdiff_dist.config import how_to_make, next_command
from segdiff_dist.evaluation.report.comparison import open_runs
from segdiff_dist.evaluation.report.page import render
from segdiff_dist.sampling.weights import weights_digest
from segdiff_dist.segmentation.segmenter import Segmenter

ROOT = Path(__file__).parents[2]


def arguments(message: str) -> list[str]:
    """The first command in backticks as a shell splits it."""
    found = re.search("`(segdiff .*?)`", message)
    assert found is not None, message
    return shlex.split(found[1])


def test_paths_are_quoted(tmp_path: Path):
    run = tmp_path / "my run's $HOME"
    assert arguments(next_command("evaluate", run=run)) == ["segdiff", "evaluate", "--run", str(run)]
    run.mkdir()
    with pytest.raises(InputProblems) as error:
        open_runs([run])
    assert arguments(str(error.value)) == ["segdiff", "evaluate", "--run", str(run)]


def test_the_run_folder_of_what_is_missing_is_named(tmp_path: Path):
    run = tmp_path / "my run"
    run.mkdir()
    weights = run / "segmenter" / "weights"
    # Without a configuration the stage cannot start from the folder alone.
    assert arguments(how_to_make("train-segmenter", weights)) == ["segdiff", "train-segmenter", "--help"]
    (run / "config.yaml").write_text("data: shards\n")
    with pytest.raises(InputProblems) as error:
        Segmenter.load(weights)
    assert arguments(str(error.value)) == ["segdiff", "train-segmenter", "--run", str(run)]
    with pytest.raises(InputProblems) as error:
        weights_digest(run / "weights")
    assert arguments(str(error.value)) == ["segdiff", "train", "--run", str(run)]


def test_the_report_names_the_runs_path(tmp_path: Path):
    summary = {
        **{"num_samples": 0, "num_patients": 0, "metrics": {}, "by_modality": {}, "by_axis": {}, "by_organ": {}},
        **{"by_modality_organ": {}, "body": {}, "cross_modality": {}, "diversity": {}, "not_available": {}},
        "provenance": {"label_table": "amos"},
        "trust": {"leakage": {"num_leaked": 0, "patients": [], "files": []}},
    }
    page = render("a run", summary, [], None, folder=tmp_path / "a run")
    assert f"segdiff evaluate --run &#39;{tmp_path}/a run&#39; --evaluate.memorisation" in page
    assert f"segdiff evaluate --run &#39;{tmp_path}/a run&#39; --downstream" in page


def test_no_message_has_a_placeholder_for_what_is_known():
    """A single capital letter or RUN behind a flag, in a message of the code."""
    found = [
        f"{file.relative_to(ROOT)}:{number}"
        for package in ("segdiff_dist", "data_shards")
        for file in (ROOT / package).rglob("*.py")
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(r'[f"][^#]*`?segdiff [a-z-]+ --(config|run|data) (F|DIR|RUN|SHARDS)\b', line)
    ]
    assert [at for at in found if "pipeline" not in at] == []
