"""The report of a run drawn again, or of several runs side by side: as HTML, CSV, LaTeX or PDF."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import tyro

from data_shards.locks import lock_beside, locked
from data_shards.problems import Problem, explain_full_disk, refuse
from segdiff_dist.experiment import collect
from segdiff_dist.stages.base import Plan, Result
from segdiff_dist.stages.configured import ConfiguredStage, refuse_addresses

if TYPE_CHECKING:
    from segdiff_dist.tracking.tracker import Tracker


@dataclass(frozen=True, kw_only=True)
class Report(ConfiguredStage):
    """Draw the report of one run again, or one of several runs side by side. Nothing is measured."""

    aliases: ClassVar = {"--out": "--compared"}
    needs_temporary_files: ClassVar = False

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")] = ()
    """Run folders that were evaluated."""
    format: str = "html"
    """What to write, with commas between: html, csv, latex, pdf. csv: tables, a line a number with interval and n.
    latex: tables for \\input (package booktabs), figures as PDF, captions. pdf: figures as PDF, and the report as one
    PDF. All but the page are in RUN/evaluation/paper; of several runs, in a folder beside the page."""
    compared: Path | None = None
    """The page of several runs: an HTML file, ./comparison.html by default."""

    def check(self) -> ReportPlan:
        """Opens the runs' summaries."""
        from segdiff_dist.evaluation.report.comparison import open_runs
        from segdiff_dist.evaluation.report.paper import FORMATS

        folders, out = self.runs, self.compared
        found = []
        if not folders:
            found.append(Problem("command line", "RUN", "not given", "name one evaluated run folder, or several"))
        if len(folders) == 1 and out is not None:
            found.append(Problem("command line", "--out", str(out), "name several runs; of one, it is RUN/evaluation"))
        if out is not None and out.is_dir():
            found.append(Problem(str(out), "--out", "a folder", "name an HTML file"))
        unknown = [name for name in self.formats if name not in FORMATS]
        if unknown or not self.formats:
            value = f"{self.format!r}, the formats are {', '.join(FORMATS)}"
            found.append(Problem("command line", "--format", value, "name some of them, with commas between"))
        refuse_addresses(self.experiment, folders)
        _, runs = collect(lambda: refuse(found), lambda: open_runs(folders))
        return ReportPlan(self, tuple(runs))

    @property
    def formats(self) -> tuple[str, ...]:
        """What to write."""
        return tuple(dict.fromkeys(name.strip().lower() for name in self.format.split(",") if name.strip()))


@dataclass(frozen=True)
class ReportPlan(Plan):
    """Evaluated runs. Locks are taken where the pages are written."""

    stage: Report
    runs: tuple[Any, ...]

    def run(self, tracker: Tracker) -> Result:
        """Draw the page, and write the files of a paper."""
        made = self._draw_one() if len(self.runs) == 1 else self._draw_several()
        return Result(tuple(f"report: {path.resolve()}" for path in made), value=made[0])

    def _draw_one(self) -> list[Path]:
        from segdiff_dist.evaluation.evaluate import draw
        from segdiff_dist.evaluation.measure.result_files import drawing

        [run] = self.runs
        amos_root = self.stage.experiment.amos_root or run.settings.get("amos_root")
        with drawing(run.folder):
            archive = Path(amos_root) if isinstance(amos_root, str | Path) else None
            return draw(run.folder, amos_root=archive, formats=self.stage.formats)

    def _draw_several(self) -> list[Path]:
        from segdiff_dist.evaluation.measure.result_files import drawing
        from segdiff_dist.evaluation.report.comparison_page import COMPARISON, write_comparison
        from segdiff_dist.evaluation.report.comparison_paper import write_comparison_paper
        from segdiff_dist.evaluation.report.paper import HTML

        runs, formats, made = list(self.runs), self.stage.formats, []
        page = self.stage.compared or Path(COMPARISON)
        with locked(lock_beside(page), page, "is writing it"), explain_full_disk(page), drawing(self.runs[0].folder):
            if HTML in formats:
                made.append(write_comparison(runs, page))
            if set(formats) - {HTML}:
                made.append(write_comparison_paper(runs, page, formats))
        return made
