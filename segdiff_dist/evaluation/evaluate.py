"""`segdiff evaluate` and `segdiff report`: measure the samples of a run, then draw figures and report from that."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_shards.problems import explain_full_disk
from segdiff_dist.evaluation.measure.checks import Checked
from segdiff_dist.evaluation.measure.config import EvaluateConfig
from segdiff_dist.evaluation.measure.job import FOLDER, evaluation_lock, measure
from segdiff_dist.evaluation.measure.publishing import finish


def evaluate(
    run: Path,
    config: EvaluateConfig,
    *,
    amos_root: Path | None = None,
    progress: bool = True,
    checked: Checked | None = None,
) -> dict[str, Any]:
    """Measure all samples of `run`, draw the figures, write the report; returns what summary.json holds.

    `amos_root`: the archive the shards were made from, for the figure of intensities before clipping; if it is not
    given or missing, that figure is drawn from the stored slices and says so. `checked` and errors: as of `measure`.
    """
    summary = measure(run, config, progress=progress, checked=checked)
    draw(run, amos_root=amos_root, progress=progress)
    return summary


def draw(
    run: Path, *, amos_root: Path | None = None, progress: bool = True, formats: Sequence[str] = ("html",)
) -> list[Path]:
    """Figures and report of a measured `run`, from the files in its folder; returns the page and the paper's folder,
    as far as `formats` (of report.paper.FORMATS) asks for them."""
    from segdiff_dist.evaluation.report.figures import draw_figures
    from segdiff_dist.evaluation.report.page import write_report
    from segdiff_dist.evaluation.report.paper import HTML
    from segdiff_dist.evaluation.report.run_paper import write_paper

    made = []
    with evaluation_lock(Path(run)), explain_full_disk(Path(run) / FOLDER):
        finish(Path(run) / FOLDER)
        if set(formats) - {HTML}:
            made.append(write_paper(Path(run), formats, amos_root=amos_root, progress=progress))
        elif HTML in formats:
            draw_figures(Path(run), amos_root=amos_root, progress=progress)
        if HTML in formats:
            made.insert(0, write_report(Path(run)))
    return made
