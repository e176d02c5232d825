"""The comparison of several runs for a paper: tables, figures and one PDF, in a folder beside the page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data_shards.files import updated_folder
from segdiff_dist.evaluation.report.comparison import EvaluatedRun, disagreements
from segdiff_dist.evaluation.report.comparison_page import (
    groups_of_runs,
    metrics_figure,
    organ_tables,
    result_table,
    same_mask_figures,
)
from segdiff_dist.evaluation.report.differences import difference_tables, sentences
from segdiff_dist.evaluation.report.figure_style import close
from segdiff_dist.evaluation.report.paper import Paper, bound
from segdiff_dist.evaluation.report.tables import Table


def paper_folder(page: Path) -> Path:
    """Where the files of a page of several runs go: comparison.html has comparison_paper beside it."""
    return page.with_name(f"{page.stem}_paper")


def write_comparison_paper(runs: Sequence[EvaluatedRun], page: Path, formats: Sequence[str]) -> Path:
    """Write what `formats` asks for; files of the same names are replaced, others stay. Returns the folder."""
    changes, tables = _tables(runs)
    above = [
        f"{len(runs)} runs side by side",
        ", ".join(f"{run.name} ({run.summary['num_samples']} images)" for run in runs) + ".",
        *(f"{difference.text}." for difference in disagreements(runs)),
        *sentences(changes),
    ]
    with updated_folder(paper_folder(page)) as unfinished:
        paper = Paper(unfinished, formats)
        paper.tables(tables)
        if paper.needs_figures:
            with bound(paper, above[0], above, tables):
                for drawn in (metrics_figure(runs), *same_mask_figures(runs)[0]):
                    if drawn is not None:
                        paper.figure(*drawn)
                        close(drawn[0])
            paper.captions()
    return paper_folder(page)


def _tables(runs: Sequence[EvaluatedRun]) -> tuple[list[Table], list[Table]]:
    """The tables of differences, and all tables."""
    differences = disagreements(runs)
    changes = difference_tables(runs, differences)
    results = [result_table(runs, group, differences) for group in groups_of_runs(runs)]
    return changes, [*results, *changes, *organ_tables(runs, differences)]
