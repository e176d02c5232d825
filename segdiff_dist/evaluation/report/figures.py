"""The figures of a run's report, with Figures 1 to 7 of the paper, and their order.

RUN/evaluation/figures/{name}.png, index.json (title, caption and section of each, in order)
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_shards.files import new_folder
from segdiff_dist.evaluation.measure.result_files import read_downstream, read_summary
from segdiff_dist.evaluation.metrics.densities import clipping_of
from segdiff_dist.evaluation.report import number_figures as numbers
from segdiff_dist.evaluation.report import sample_figures as samples
from segdiff_dist.evaluation.report.figure_style import Drawn, Figure, save, styled
from segdiff_dist.evaluation.report.pictures import Pictures
from segdiff_dist.evaluation.report.sharpness_figures import power_by_band
from segdiff_dist.evaluation.report.spectrum_figures import power_spectra

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

INDEX = "index.json"


def draw_figures(
    run: Path,
    *,
    amos_root: Path | None = None,
    progress: bool = False,
    also: Callable[[Canvas, Figure], None] | None = None,
) -> list[Figure]:
    """Draw all figures that the evaluated `run` has data for, into RUN/evaluation/figures.

    `amos_root`: the archive that the shards were made from. Only it has intensities outside the window. `also` gets
    each drawn figure before it is closed.
    """
    from data_shards.progress import progress_bar

    folder = run / "evaluation" / "figures"
    summary = read_summary(run)
    pictures, downstream = Pictures.open(run), read_downstream(run)
    drawn: list[Figure] = []
    with new_folder(folder, replaces=True) as unfinished, styled():
        for draw in progress_bar(
            _all_figures(pictures, summary, downstream, amos_root), desc="figures", unit="figure", disable=not progress
        ):
            result = draw()
            if result is not None:
                canvas, figure = result
                if also is not None:
                    also(canvas, figure)
                save(canvas, unfinished / figure.file)
                drawn.append(figure)
        (unfinished / INDEX).write_text(json.dumps([asdict(figure) for figure in drawn], indent=1), encoding="utf-8")
    return drawn


def _all_figures(
    pictures: Pictures, summary: dict[str, Any], downstream: dict[str, Any] | None, amos_root: Path | None
) -> list[Callable[[], Drawn]]:
    modalities = pictures.modalities
    across = [(s, t) for s in modalities for t in modalities if s != t]
    of_set = () if pictures.shards is None else pictures.shards.modalities
    return [
        *(lambda m=m: samples.gallery(pictures, m) for m in modalities),
        *(lambda m=m: samples.extremes(pictures, m) for m in modalities),
        lambda: numbers.dice_by_organ(summary),
        lambda: power_by_band(summary),
        lambda: power_spectra(pictures),
        *(lambda m=m: numbers.intensity_by_organ(summary, m) for m in modalities),
        lambda: samples.nearest_training(pictures, summary),
        lambda: samples.diversity(pictures),
        lambda: samples.cross_modality(pictures),
        *(lambda s=s, t=t: samples.two_modalities(pictures, s, t) for s, t in across),
        lambda: numbers.usefulness(downstream),
        lambda: numbers.grey_values(summary["grey_values"]),
        lambda: numbers.clipping({m: clipping_of(pictures.shards, m, amos_root) for m in of_set}),
    ]
