"""A run's tables, figures and report for a paper, in RUN/evaluation/paper."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_shards.files import new_folder
from segdiff_dist.evaluation.measure.result_files import read_summary
from segdiff_dist.evaluation.report.figures import draw_figures
from segdiff_dist.evaluation.report.paper import HTML, Paper, bound
from segdiff_dist.evaluation.report.tables import run_tables

PAPER = "paper"


def write_paper(run: Path, formats: Sequence[str], *, amos_root: Path | None, progress: bool) -> Path:
    """Write what `formats` asks for into RUN/evaluation/paper, and return that folder. An earlier one is replaced.

    Figures are drawn where a format shows them, the page's too.
    """
    summary, folder = read_summary(run), run / "evaluation" / PAPER
    tables = run_tables(summary)
    with new_folder(folder, replaces=True) as unfinished:
        paper = Paper(unfinished, formats)
        paper.tables(tables)
        if paper.needs_figures or HTML in formats:
            with bound(paper, run.resolve().name, _above(run, summary), tables):
                also = paper.figure if paper.needs_figures else None
                draw_figures(run, amos_root=amos_root, progress=progress, also=also)
            paper.captions()
    return folder


def _above(run: Path, summary: dict[str, Any]) -> list[str]:
    """The first page's lines over its table: the run, and what its numbers are of."""
    made_from = summary["provenance"]
    shown = [
        f"{summary['num_samples']} images of {summary['num_patients']} patients; {', '.join(summary['by_axis'])}; "
        f"label table {made_from.get('label_table', 'not known')}."
    ]
    digests = {"Segmenter": "segmenter_sha256", "shard set": "shards_digest"}
    named = [f"{name} {str(made_from[key])[:12]}" for name, key in digests.items() if made_from.get(key)]
    version = made_from.get("versions", {}).get("segdiff-dist")
    named += [f"segdiff-dist {version}"] if version else []
    return [run.resolve().name, *shown, f"{', '.join(named)}." if named else ""]
