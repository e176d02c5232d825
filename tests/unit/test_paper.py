"""What goes into a paper: tables as CSV and LaTeX, figures as PDF, one PDF; and differences of runs with intervals."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from evaluation_support import Page, evaluate_here

from data_shards.labels import LabelTable
from data_shards.problems import InputProblems
from segdiff_dist.evaluation.measure.result_files import read_summary
from segdiff_dist.evaluation.measure.segmenter_check import weakness
from segdiff_dist.evaluation.metrics.definitions import DEFINITIONS
from segdiff_dist.evaluation.report.comparison import Disagreement, disagreements, open_runs
from segdiff_dist.evaluation.report.differences import Images, difference, difference_tables, sentences
from segdiff_dist.evaluation.report.figure_style import Figure, legend, save, show_labels, tiles
from segdiff_dist.evaluation.report.page import render
from segdiff_dist.evaluation.report.paper import Paper, bound, csv_text, latex_escaped, latex_text
from segdiff_dist.evaluation.report.tables import Cell, Row, Table, run_tables
from segdiff_dist.spectra import BAND_NAMES
from segdiff_dist.stages.report import Report


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> list[Path]:
    """Two runs on the same masks: one near to the real images, one far from them."""
    folder = tmp_path_factory.mktemp("runs")
    return [evaluate_here(folder / name, shapes, noise=noise) for name, noise in (("near", 4.0), ("far_50%", 25.0))]


def entry(value: float, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    return {"value": value, "ci95": None if low is None else [low, high], "n": 7, "num_patients": 3}


ODD = Table(
    "organs_ct",
    "CT: organs",
    "50 % of A & B_1 {x}.",
    "Organ",
    ("Dice, gen.", "Images"),
    (
        Row("left_kidney #1", "kidney", (Cell("dice_mask_gen", entry(-0.25, -0.5, 0.1), grey="fails"), Cell(text="7"))),
        Row("aorta", "aorta", (Cell("dice_mask_gen", entry(0.5), best=True), Cell(text="7"))),
    ),
)


class TestTables:
    def test_csv_has_a_line_a_number_with_all_digits(self):
        first, second = csv.DictReader(io.StringIO(csv_text(ODD)))
        assert (first["row"], first["metric"], first["value"], first["ci95_low"], first["n"]) == (
            *("kidney", "dice_mask_gen", "-0.25", "-0.5", "7"),
        )
        assert first["grey"] == "fails"
        assert (second["ci95_low"], second["grey"]) == ("", "")

    def test_latex_escapes_names_and_closes_what_it_opens(self):
        text = latex_text(ODD)
        assert r"left\_kidney \#1 & ($-$0.250) & 7 \\" in text
        assert r"[$-$0.500, 0.100]" in text
        assert r"\textbf{0.500}" in text
        assert r"50 \% of A \& B\_1 \{x\}." in text
        assert [text.count(f"\\{rule}") for rule in ("toprule", "midrule", "bottomrule")] == [1, 1, 1]
        opened, closed = (re.findall(rf"\\{word}\{{(\w+)\}}", text) for word in ("begin", "end"))
        assert sorted(opened) == sorted(closed)
        # As many cells in each line as the header has.
        lines = [line for line in text.splitlines() if line.endswith(r"\\")]
        assert {len(re.findall(r"(?<!\\)&", line)) for line in lines} == {2}

    def test_what_latex_reads_as_a_command_is_text(self):
        assert latex_escaped(r"a\b^~") == r"a\textbackslash{}b\textasciicircum{}\textasciitilde{}"

    def test_a_long_table_is_several(self):
        many = Table("t", "T", "c", "Metric", ("A",), ODD.rows[1:] * 50)
        assert latex_text(many).count(r"\begin{tabular}") == latex_text(many).count(r"\end{table}") == 3

    @pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex with booktabs")
    def test_it_compiles_by_input(self, tmp_path: Path):
        (tmp_path / "t.tex").write_text(latex_text(ODD))
        (tmp_path / "m.tex").write_text(
            "\\documentclass{article}\\usepackage{booktabs}\\begin{document}\\input{t}\\end{document}"
        )
        command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "m.tex"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False, timeout=60)
        assert done.returncode == 0, done.stdout.decode(errors="replace")[-800:]


class TestSegmenterThatFailsOnAnOrgan:
    @pytest.mark.parametrize(
        ("real", "reason"),
        [
            (entry(0.4, 0.3, 0.45), "0.40, below 0.5"),
            (entry(0.4), "0.40, below 0.5"),
            (entry(0.6, 0.45, 0.7), "0.45 to 0.70 includes 0.5"),
            (entry(0.6, 0.5, 0.7), ""),
            (entry(0.6), ""),
        ],
    )
    def test_reason(self, real: dict[str, Any], reason: str):
        assert reason in weakness({"dice_mask_real": real})
        assert bool(weakness({"dice_mask_real": real})) == bool(reason)

    def test_its_numbers_on_generated_images_are_grey_and_no_others(self, runs: list[Path]):
        summary = read_summary(runs[0])
        [table] = [table for table in run_tables(summary) if table.name == "organs_ct"]
        assert {c.metric.endswith("_real") for row in table.rows for c in row.cells if c.entry} == {True, False}
        held = [row for row in table.rows if row.cells[0].entry]
        assert held
        for row in held:
            assert all(bool(cell.grey) == cell.metric.endswith("mask_gen") for cell in row.cells if cell.entry)
        for table in run_tables(summary):
            if table.name.startswith(("texture_", "intensity_")):
                assert not table.notes
        page = render("run", summary, [], None)
        assert 'class="weak"' in page
        assert "below 0.5" in Page(page).text


def images(values: list[float], patients: list[str]) -> Images:
    keys = [(i, "CT") for i in range(len(values))]
    powers = {f"power_{side}_{band}": np.array(values) for side in ("real", "gen") for band in BAND_NAMES}
    return Images(keys, np.array(patients), {"ssim": np.array(values)} | powers)


class TestDifferences:
    PATIENTS: ClassVar = ["a", "a", "b", "b", "c", "c", "d", "d"]

    def test_paired_differences_do_not_depend_on_how_patients_differ(self):
        base = [0.1, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
        a, b = images(base, self.PATIENTS), images([v + 0.05 for v in base], self.PATIENTS)
        paired, alone = (difference(a, b, "ssim", is_paired=p) for p in (True, False))
        assert paired is not None
        assert alone is not None
        assert paired.value == pytest.approx(0.05)
        assert paired.interval == pytest.approx((0.05, 0.05))
        assert paired.is_larger
        assert (paired.num_images, paired.num_patients) == (8, 4)
        # The patients differ by far more.
        assert not alone.is_larger

    def test_cases_of_an_earlier_evaluation_are_patients_of_a_later_one(self):
        rng = np.random.default_rng(0)
        one, two = rng.random((2, 8)).tolist()
        cases = [f"case{i}" for i in range(8)]
        mixed = difference(images(one, cases), images(two, self.PATIENTS), "ssim", is_paired=True)
        assert mixed == difference(images(one, self.PATIENTS), images(two, self.PATIENTS), "ssim", is_paired=True)

    def test_images_without_a_value_on_either_side_do_not_count(self):
        a = images([0.1, np.nan, 0.4, 0.5], ["a", "b", "c", "d"])
        b = images([0.2, 0.9, np.nan, 0.5], ["a", "b", "c", "d"])
        found = difference(a, b, "ssim", is_paired=True)
        assert found is not None
        assert (found.value, found.num_images) == (pytest.approx(0.05), 2)

    def test_one_patient_has_no_interval_and_none_no_difference(self):
        one = difference(images([0.1, 0.2], ["a", "a"]), images([0.3, 0.4], ["a", "a"]), "ssim", is_paired=True)
        assert one is not None
        assert one.interval is None
        assert not one.is_larger
        nothing = images([np.nan], ["a"])
        assert difference(nothing, nothing, "ssim", is_paired=True) is None

    def test_they_are_those_of_the_summaries(self, runs: list[Path]):
        opened = open_runs(runs)
        tables = difference_tables(opened, disagreements(opened))
        rows = {row.name: row.cells for row in tables[0].rows}
        for metric in ("psnr_db", "ssim", "sharpness", "sharpness_75_100", "texture", "noise_std_gen"):
            near, far = (run.summary["metrics"][metric]["value"] for run in opened)
            assert rows[metric][0].entry["value"] == pytest.approx(far - near), metric
        assert rows["ssim"][0].best
        assert "paired by patient" in tables[0].caption
        # Metrics of real images alone are the same in both.
        assert "dice_mask_real" not in rows

    def test_images_of_other_folders_of_masks_are_not_paired_by_their_number(self, runs: list[Path], tmp_path: Path):
        folders = []
        for run, digest in zip(runs, ("one", "other"), strict=True):
            folder = Path(shutil.copytree(run, tmp_path / run.name, symlinks=True))
            file = folder / "evaluation" / "summary.json"
            summary = json.loads(file.read_text())
            job = summary["provenance"]["sample_job"]
            del job["shards"]
            summary["provenance"]["sample_job"] = job | {"masks": "masks", "masks_digest": digest}
            file.write_text(json.dumps(summary))
            folders.append(folder)
        opened = open_runs(folders)
        tables = difference_tables(opened, disagreements(opened))
        assert "not paired" in tables[0].caption

    def test_a_sentence_says_which_are_larger(self, runs: list[Path]):
        opened = open_runs(runs)
        [text] = sentences(difference_tables(opened, disagreements(opened)))
        larger, _, others = text.partition("; not larger are those of ")
        assert larger.startswith("far_50% \u2212 near: larger than their intervals are the differences of")
        assert "SSIM \u2212" in larger
        assert "SSIM" not in others

    def test_other_segmenters_leave_the_metrics_that_do_not_need_one(self, runs: list[Path]):
        opened = open_runs(runs)
        blocked = [Disagreement("other segmenters", ("dice_", "segmenter_"))]
        rows = {row.name for row in difference_tables(opened, blocked)[0].rows}
        assert "ssim" in rows
        assert not [name for name in rows if name.startswith("dice_")]
        assert difference_tables(opened, [Disagreement("other sets", ("",))]) == []
        assert difference_tables(opened, [Disagreement("other slices", ("",), of_slices=True)])


class TestCommand:
    def test_unknown_formats_are_refused(self, runs: list[Path]):
        with pytest.raises(InputProblems, match="'html,docx', the formats are html, csv, latex, pdf"):
            Report(runs=(runs[0],), format="html,docx").check()

    def test_tables_alone_need_no_figures(self, runs: list[Path]):
        paper = Report(runs=(runs[0],), format="csv").check().start().value
        assert paper == runs[0] / "evaluation" / "paper"
        assert {"headline.csv", "results.csv", "organs_ct.csv"} <= {file.name for file in paper.iterdir()}
        assert not [file for file in paper.iterdir() if file.suffix != ".csv"]
        rows = list(csv.DictReader((paper / "headline.csv").open()))
        expected = read_summary(runs[0])["metrics"]["dice_either_mask_gen"]["value"]
        assert float(rows[0]["value"]) == expected

    def test_several_runs_are_beside_their_page(self, runs: list[Path], tmp_path: Path):
        Report(runs=tuple(runs), format="csv,latex", compared=tmp_path / "c.html").check()
        paper = Report(runs=tuple(runs), format="csv", compared=tmp_path / "c.html").check().start().value
        assert paper == tmp_path / "c_paper"
        assert not (tmp_path / "c.html").exists()
        rows = list(csv.DictReader((paper / "differences_all.csv").open()))
        assert {"far_50% \u2212 near"} == {row["column"] for row in rows}


def test_figures_and_the_book_are_vectors_with_truetype_fonts(tmp_path: Path):
    table = LabelTable("odd", ("background", "liver"))
    figure = Figure("mask 1.png", "A mask", "50 % of it, in $x$.", "images")
    paper = Paper(tmp_path, ("latex", "pdf"))
    with bound(paper, "A run", ["A run", "Of 3 images."], [ODD, ODD]):
        canvas, axes = tiles(1, 2, ("mask", "mask"))
        for ax in axes[0]:
            show_labels(ax, np.eye(8, dtype=np.uint8), table)
        legend(canvas, table, [np.eye(8, dtype=np.uint8)])
        paper.figure(canvas, figure)
        # It can still be drawn for the page.
        save(canvas, io.BytesIO())
    paper.captions()
    for name in ("mask 1.pdf", "report.pdf"):
        assert b"/CreationDate" not in (tmp_path / name).read_bytes(), "the same numbers make the same file"
        content = (tmp_path / name).read_bytes()
        assert b"/Type3" not in content, name
        assert b"/CIDFontType2" in content, name
    # Two tables, the figure and the definitions.
    assert len(re.findall(rb"/Type /Page\b(?!s)", (tmp_path / "report.pdf").read_bytes())) == 4
    assert (tmp_path / "captions.txt").read_text() == "mask 1.pdf\nA mask. 50 % of it, in $x$.\n"
    latex = (tmp_path / "captions.tex").read_text()
    assert r"\caption{A mask. 50 \% of it, in \$x\$.}" in latex
    assert r"\label{fig:mask-1}" in latex


def test_each_definition_says_by_itself_what_it_is():
    for name, definition in DEFINITIONS.items():
        assert len(definition.text) > 40, name
        assert not re.search(r"\b(as above|as before|likewise)\b", definition.text), name
