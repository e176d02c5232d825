"""Figures and report.html of one evaluated run, drawn again; or a page that shows several runs side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import tyro

from data_shards.locks import lock_beside, locked
from data_shards.problems import Problem, refuse, saying_when_full
from segdiff_dist.experiment import collect
from segdiff_dist.stages.base import Plan, Result
from segdiff_dist.stages.configured import ConfiguredStage, refuse_addresses

if TYPE_CHECKING:
    from segdiff_dist.tracking.tracker import Tracker


@dataclass(frozen=True, kw_only=True)
class Report(ConfiguredStage):
    """Draw the report of one run again, or a page of several runs. Nothing is measured."""

    aliases: ClassVar = {"--out": "--compared"}
    needs_temporary_files: ClassVar = False

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")] = ()
    """Run folders that were evaluated."""
    compared: Path | None = None
    """The page of several runs: an HTML file, ./comparison.html by default."""

    def check(self) -> ReportPlan:
        """Opens the runs' summaries."""
        from segdiff_dist.evaluation.report.comparison import open_runs

        folders, out = self.runs, self.compared
        found = []
        if not folders:
            found.append(Problem("command line", "RUN", "not given", "name one evaluated run folder, or several"))
        if len(folders) == 1 and out is not None:
            found.append(Problem("command line", "--out", str(out), "name several runs; of one, it is RUN/evaluation"))
        if out is not None and out.is_dir():
            found.append(Problem(str(out), "--out", "a folder", "name an HTML file"))
        refuse_addresses(self.experiment, folders)
        _, runs = collect(lambda: refuse(found), lambda: open_runs(folders))
        return ReportPlan(self, tuple(runs))


@dataclass(frozen=True)
class ReportPlan(Plan):
    """Evaluated runs. Locks are taken where the pages are written."""

    stage: Report
    runs: tuple[Any, ...]

    def run(self, tracker: Tracker) -> Result:
        """Draw the page."""
        page = self._draw_one() if len(self.runs) == 1 else self._draw_several()
        return Result((f"report: {page.resolve()}",), value=page)

    def _draw_one(self) -> Path:
        from segdiff_dist.evaluation.evaluate import draw
        from segdiff_dist.evaluation.measure.saved import drawing

        [run] = self.runs
        amos_root = self.stage.experiment.amos_root or run.settings.get("amos_root")
        with drawing(run.folder):
            return draw(run.folder, amos_root=Path(amos_root) if isinstance(amos_root, str | Path) else None)

    def _draw_several(self) -> Path:
        from segdiff_dist.evaluation.measure.saved import drawing
        from segdiff_dist.evaluation.report.comparison_page import COMPARISON, write_comparison

        page = self.stage.compared or Path(COMPARISON)
        with locked(lock_beside(page), page, "is writing it"), saying_when_full(page), drawing(self.runs[0].folder):
            return write_comparison(list(self.runs), page)
