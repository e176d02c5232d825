"""`segdiff report`: one run drawn again, several side by side, and the messages where they cannot be compared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation_support import Page, evaluate_here, is_self_contained
from tests_support import SIZE, write_shapes

from data_shards.labels import AMOS
from data_shards.problems import InputProblems
from data_shards.store.shards import ShardSet
from segdiff_dist.cli import main
from segdiff_dist.evaluation.measure.result_files import read_rows, read_summary
from segdiff_dist.evaluation.metrics.definitions import DEFINITIONS
from segdiff_dist.evaluation.report.comparison import best_of, disagreements, names_of, open_runs, shared_masks
from segdiff_dist.evaluation.report.comparison_page import write_comparison
from segdiff_dist.evaluation.report.figures import draw_figures
from segdiff_dist.evaluation.report.pictures import Pictures
from segdiff_dist.sampling.store import SampleStore


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> list[Path]:
    """Two runs on the same masks with the same judge: one near to the real images, one far from them."""
    folder = tmp_path_factory.mktemp("runs")
    found = [evaluate_here(folder / name, shapes, noise=noise) for name, noise in (("near", 4.0), ("far", 25.0))]
    for run, lr in zip(found, ("0.001", "0.002"), strict=True):
        (run / "config.yaml").write_text(f"run: {run}\ntrain: {{lr: {lr}, seed: 0}}\nloader: {{axes: [axial]}}\n")
    (found[0] / "mlflow.json").write_text(json.dumps({"tracking_uri": None, "experiment": "segdiff", "run_id": "ab12"}))
    return found


def copied(run: Path, to: Path) -> Path:
    shutil.copytree(run, to)
    return to


def changed(run: Path, **provenance: Any) -> Path:
    file = run / "evaluation" / "summary.json"
    summary = json.loads(file.read_text())
    summary["provenance"] |= provenance
    file.write_text(json.dumps(summary))
    return run


def with_other_samples(run: Path) -> Path:
    """Black images of another model in place of those that were measured."""
    old = SampleStore.open(run / "samples")
    shutil.rmtree(run / "samples")
    store = SampleStore.create(run / "samples", old.job | {"weights_digest": "another"}, old.items, SIZE)
    store.write_region(0, *np.zeros((2, len(store), SIZE, SIZE), np.uint8))
    return run


def page_of(runs: list[Path], tmp_path: Path) -> Page:
    return Page(write_comparison(open_runs(runs), tmp_path / "page.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Page:
    """Both runs, side by side."""
    return page_of(runs, tmp_path_factory.mktemp("page"))


def test_cases_of_one_patient_count_once(tmp_path: Path, shapes: Path) -> None:
    file = shutil.copytree(shapes, tmp_path / "set") / "index.json"
    index = json.loads(file.read_text())
    cases = ShardSet.open(shapes).samples["case_id"].unique().to_pylist()
    index["source"] = {case: index.get("source", {}).get(case, {}) | {"patient": "p1"} for case in cases}
    file.write_text(json.dumps(index))
    run = evaluate_here(tmp_path / "run", file.parent)
    summary = read_summary(run)
    assert (summary["num_patients"], summary["metrics"]["ssim"]["ci95"]) == (1, None)
    assert summary["trust"]["leakage"]["patients"] == ["p1"]
    assert set(read_rows(run, ["patient"])["patient"].to_pylist()) == {"p1"}


class TestPage:
    def test_holds_all_it_shows(self, page: Page):
        assert is_self_contained(page)
        # Metrics, and the same masks in CT and in MR.
        assert page.tags.count("img") == 3
        assert "Not all of these numbers can be compared" not in page.text

    def test_marks_the_better_value(self, page: Page):
        for label, better in (("PSNR (dB) ↑", "near"), ("SSIM ↑", "near")):
            row = next(i for i, cells in enumerate(page.rows) if cells[0] == label)
            [column] = [c for r, c in page.best if r == row]
            assert page.row("Metric")[column] == better
            assert " to " in page.rows[row][column]

    def test_sets_organs_and_settings_beside_each_other(self, page: Page):
        assert len(page.row("liver")) == 3
        assert page.row("train.lr") == ["train.lr", "0.001", "0.002"]
        assert not [row for row in page.rows if row[0] in ("train.seed", "run", "loader.axes")]

    def test_leads_to_mlflow(self, page: Page, runs: list[Path]):
        assert f"mlflow ui --backend-store-uri sqlite:///{runs[0]}/mlflow.db" in page.text
        assert "ab12" in page.text
        assert "Not tracked in MLflow" in page.text


class TestRunsThatCannotBeCompared:
    def test_another_segmenter_concerns_its_own_metrics_only(self, runs: list[Path], tmp_path: Path):
        other = changed(copied(runs[1], tmp_path / "other"), segmenter_sha256="f" * 64)
        page = page_of([runs[0], other], tmp_path)
        assert "evaluated with different segmenters" in page.text
        marked = {page.rows[row][0] for row, _ in page.best}
        assert "PSNR (dB) ↑" in marked
        assert not [label for label in marked if "Dice" in label or "Segmenter" in label]
        assert "†" in page.row("Dice (mask, pred. gen.)")[0]

    def test_other_slices(self, runs: list[Path], shapes: Path, tmp_path: Path):
        rows = ShardSet.open(shapes).select(split="test").tolist()
        fewer = evaluate_here(tmp_path / "fewer", shapes, rows=rows[2:])
        page = page_of([runs[0], fewer], tmp_path)
        assert (
            f"different slices: {len(rows) - 2} in common, {len(rows)} of near, {len(rows) - 2} of fewer" in page.text
        )
        assert not page.best
        # Those that both have are still shown.
        assert page.tags.count("img") == 3

    def test_other_shard_sets_share_no_masks(self, runs: list[Path], tmp_path: Path):
        elsewhere = evaluate_here(tmp_path / "elsewhere", write_shapes(tmp_path / "set", slices=4))
        page = page_of([runs[0], elsewhere], tmp_path)
        assert "sampled from different shard sets" in page.text
        assert "share no masks" in page.text
        assert not page.best
        assert page.tags.count("img") == 1

    def test_a_shard_set_that_is_gone_costs_the_images_alone(self, shapes: Path, tmp_path: Path):
        moved = tmp_path / "set"
        shutil.copytree(shapes, moved)
        found = [evaluate_here(tmp_path / name, moved, noise=noise) for name, noise in (("a", 4.0), ("b", 9.0))]
        shutil.rmtree(moved)
        page = page_of(found, tmp_path)
        assert f"No images side by side: {moved}" in page.text
        assert page.best

    def test_a_run_without_real_images_has_no_shard_set(self, runs: list[Path], tmp_path: Path):
        alone = copied(runs[0], tmp_path / "alone")
        file = alone / "evaluation" / "summary.json"
        summary = json.loads(file.read_text())
        del summary["provenance"]["shards_digest"]
        file.write_text(json.dumps(summary))
        assert '<td data-label="Shard set">none</td>' in page_of([alone, runs[1]], tmp_path).html

    def test_what_only_some_runs_have_is_no_disagreement(self, runs: list[Path], tmp_path: Path):
        with_fid = changed(copied(runs[0], tmp_path / "a"), fid_weights={"file": "w.pth", "sha256": "0"})
        assert disagreements(open_runs([with_fid, runs[1]])) == []
        other_fid = changed(copied(runs[1], tmp_path / "b"), fid_weights={"file": "w.pth", "sha256": "1"})
        [found] = disagreements(open_runs([with_fid, other_fid]))
        assert "fid" in found.metrics

    def test_samples_made_anew_are_not_shown_beside_the_numbers_of_others(self, runs: list[Path], tmp_path: Path):
        other = with_other_samples(copied(runs[1], tmp_path / "other"))
        page = page_of([runs[0], other], tmp_path)
        assert "not the samples that were measured: weights_digest was '', is 'another'" in page.text
        assert page.tags.count("img") == 1


class TestChoices:
    def test_names_tell_runs_apart(self):
        assert names_of([Path("/r/a"), Path("/r/b")]) == ["a", "b"]
        assert names_of([Path("/r/a/run"), Path("/r/b/run")]) == ["a/run", "b/run"]

    @pytest.mark.parametrize(
        ("metric", "values", "best"),
        [
            ("ssim", [0.5, None, 0.7], {2}),
            ("lpips", [0.5, 0.7], {0}),
            ("ssim", [0.70001, 0.70002, 0.5], {0, 1}),
            ("ssim", [0.7, 0.7], set()),
            ("ssim", [0.7, None], set()),
            ("pixel_std", [1.0, 2.0], set()),
        ],
    )
    def test_best(self, metric: str, values: list[float | None], best: set[int]):
        assert best_of(values, DEFINITIONS[metric]) == best

    def test_estimates_below_zero_are_no_better_than_zero(self):
        assert best_of([-0.2, -0.1, 0.3], DEFINITIONS["kid"], least=0.0) == {0, 1}

    def test_shared_masks_are_the_same_rows(self, runs: list[Path]):
        pictures = [Pictures.open(run) for run in runs]
        masks = shared_masks(pictures, "CT")
        assert len(masks) == 3
        for items in masks:
            rows = {int(run.rows["row"][i]) for run, i in zip(pictures, items, strict=True)}
            assert len(rows) == 1
            assert np.array_equal(pictures[0].mask(items[0]), pictures[1].mask(items[1]))

    def test_extremes_are_the_lowest_and_highest_of_different_patients(self):
        dice = [0.1, 0.2, 0.3, 0.9, 0.8, np.nan, 0.05, 0.95]
        rows = {
            "dice_mask_gen": np.array(dice),
            "headline": np.array([True] * 6 + [False] * 2),
            "source_modality": np.array(["CT"] * 8),
            "case_id": np.array(["a", "a", "b", "c", "d", "e", "a", "d"]),
        }
        pictures = Pictures(rows, None, AMOS, True, None, None, None)  # type: ignore[arg-type]
        assert pictures.extremes("CT", 2) == ([0, 2], [4, 3])
        # There are five, so at most two at either end: none is shown twice.
        assert pictures.extremes("CT", 9) == ([0, 2], [4, 3])
        assert pictures.extremes("MR", 2) == ([], [])


class TestFigures:
    def test_of_a_run(self, runs: list[Path]):
        found = {figure.file: figure for figure in draw_figures(runs[0])}
        assert {"extremes_ct.png", "extremes_mr.png", "hu_by_organ.png", "diversity.png"} <= found.keys()
        assert found["hu_by_organ.png"].section == "hu"
        index = json.loads((runs[0] / "evaluation" / "figures" / "index.json").read_text())
        assert [entry["file"] for entry in index] == list(found)


class TestCommand:
    def test_draws_one_run_again_without_measuring(self, runs: list[Path], tmp_path: Path, capsys):
        run = copied(runs[0], tmp_path / "again")
        before = {file: (run / "evaluation" / file).read_bytes() for file in ("summary.json", "samples.parquet")}
        assert main(["report", str(run)]) == 0
        page = run / "evaluation" / "report.html"
        assert str(page) in capsys.readouterr().out
        assert Page(page.read_text(encoding="utf-8")).tags.count("img") >= 10
        assert before == {file: (run / "evaluation" / file).read_bytes() for file in before}

    def test_numbers_of_other_samples_are_not_drawn_with_these(self, runs: list[Path], tmp_path: Path, capsys):
        run = with_other_samples(copied(runs[0], tmp_path / "run"))
        assert main(["report", str(run)]) == 2
        said = capsys.readouterr().err
        assert "not the samples that were measured: weights_digest was '', is 'another'" in said
        assert f"segdiff evaluate --run {run}" in said
        assert not (run / "evaluation" / "report.html").exists()

    def test_a_moved_shard_set_is_the_same_and_another_at_its_place_is_not(
        self, runs: list[Path], shapes: Path, tmp_path: Path, capsys
    ):
        run = copied(runs[0], tmp_path / "run")
        file = run / "samples" / "job.json"
        job = json.loads(file.read_text())
        file.write_text(json.dumps(job | {"shards": str(shutil.copytree(shapes, tmp_path / "moved"))}))
        assert main(["report", str(run)]) == 0
        file.write_text(json.dumps(job | {"shards": str(write_shapes(tmp_path / "other", slices=7))}))
        assert main(["report", str(run)]) == 2
        assert "not the shard set that was measured on" in capsys.readouterr().err

    def test_sets_several_side_by_side(self, runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.chdir(tmp_path)
        assert main(["report", *map(str, runs)]) == 0
        assert "2 runs side by side" in (tmp_path / "comparison.html").read_text(encoding="utf-8")
        assert main(["report", *map(str, runs), "--out", "deep/page.html"]) == 0
        assert (tmp_path / "deep" / "page.html").is_file()

    def test_refuses_all_that_is_wrong_at_once(self, runs: list[Path], tmp_path: Path, capsys):
        (tmp_path / "empty").mkdir()
        old = copied(runs[0], tmp_path / "old")
        (old / "evaluation" / "summary.json").write_text('{"format_version": 1}')
        names = [str(tmp_path / name) for name in ("none", "empty", "old")]
        assert main(["report", *names, str(runs[0]), str(runs[0]), "--out", str(tmp_path)]) == 2
        text = capsys.readouterr().err
        for words in ("no such folder", f"segdiff evaluate --run {names[1]}", "format_version: 1", "named twice"):
            assert words in text
        assert "--out: a folder" in text
        assert "5 problems" in text

    def test_refuses_to_report_of_nothing(self, runs: list[Path], tmp_path: Path, capsys):
        assert main(["report"]) == 2
        assert "RUN: not given" in capsys.readouterr().err
        assert main(["report", str(runs[0]), "--out", str(tmp_path / "page.html")]) == 2
        assert "name several runs" in capsys.readouterr().err

    def test_a_broken_summary_is_refused(self, runs: list[Path], tmp_path: Path):
        broken = copied(runs[0], tmp_path / "broken")
        (broken / "evaluation" / "summary.json").write_text("{")
        with pytest.raises(InputProblems, match="not a summary"):
            open_runs([broken])
