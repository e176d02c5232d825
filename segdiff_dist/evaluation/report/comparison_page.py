"""The page that compares several evaluated runs: one HTML file that contains everything it shows."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_shards.labels import shown_name
from data_shards.problems import InputProblems
from data_shards.records import MODALITIES
from segdiff_dist.evaluation.measure.segmenter_check import MARK, is_unreliable, segmenter_messages
from segdiff_dist.evaluation.measure.summary import headline_dice, top_metrics
from segdiff_dist.evaluation.metrics.definitions import DEFINITIONS, Definition
from segdiff_dist.evaluation.report import comparison_figures as figures
from segdiff_dist.evaluation.report.comparison import (
    Disagreement,
    EvaluatedRun,
    best_of,
    differing_settings,
    disagreements,
    is_comparable,
    shared_masks,
)
from segdiff_dist.evaluation.report.look import Drawn, save, styled
from segdiff_dist.evaluation.report.page import page_environment, png_url, write_page
from segdiff_dist.evaluation.report.pictures import Pictures

COMPARISON = "comparison.html"
# Metrics of the figure, where runs have them.
_DRAWN = (
    *(
        "dice_either_mask_gen",
        "dice_either_mask_real",
        "segmenter_precision",
        "segmenter_recall",
        "sharpness",
        "texture",
    ),
    *("dice_mask_gen", "surface_dice_mask_gen", "psnr_db", "ssim", "lpips", "fid", "segmenter_frechet"),
)
_MOST_PANELS = 12
_KERNEL_DISTANCES = ("kid", "segmenter_kernel_distance")

# Entries of a summary by "All" and modality, for each run in order.
Groups = dict[str, list[dict[str, Any]]]


def write_comparison(runs: Sequence[EvaluatedRun], out: Path) -> Path:
    """Write the page of at least two runs to `out`; returns it."""
    differences = disagreements(runs)
    groups = _groups(runs)
    names = [run.name for run in runs]
    metrics = [m for m in _DRAWN if any(m in entries for by_run in groups.values() for entries in by_run)][
        :_MOST_PANELS
    ]
    with styled():
        drawn = [_embedded(figures.metrics_of_runs(names, groups, metrics))]
        gallery, reason = _gallery(runs)
    page = (
        page_environment()
        .get_template("comparison.html.j2")
        .render(
            runs=runs,
            disagreements=differences,
            tables={group: _metric_rows(entries, differences) for group, entries in groups.items()},
            organ_tables=_organ_tables(runs, differences),
            metric_figures=[figure for figure in drawn if figure is not None],
            gallery=gallery,
            no_gallery=reason,
            settings=differing_settings(runs),
            without_settings=[run.name for run in runs if not run.settings],
            organ_metric=DEFINITIONS[headline_dice([run.summary["metrics"] for run in runs])].label,
            segmenter_messages={run.name: messages for run in runs if (messages := segmenter_messages(run.summary))},
            mark=MARK,
            definitions={
                n: d for n, d in DEFINITIONS.items() if any(n in e for by_run in groups.values() for e in by_run)
            },
            one_store=len({run.tracked.store if run.tracked else None for run in runs}) == 1,
        )
    )
    return write_page(out, page)


def _groups(runs: Sequence[EvaluatedRun]) -> Groups:
    """Entries by "All" and modality; "All" is left out where all runs are of one modality."""
    groups = {"All": [run.summary["metrics"] for run in runs]}
    groups |= {m: [run.summary["by_modality"].get(m, {}) for run in runs] for m in MODALITIES}
    groups = {group: entries for group, entries in groups.items() if any(entries)}
    if len(groups) == 2:
        groups.pop("All", None)
    return groups


def _metric_rows(by_run: list[dict[str, Any]], differences: Sequence[Disagreement]) -> list[dict[str, Any]]:
    ordered = dict.fromkeys((*top_metrics(by_run), *DEFINITIONS))
    names = [name for name in ordered if any(name in entries for entries in by_run)]
    return [_row(DEFINITIONS[n].label, n, DEFINITIONS[n], [e.get(n) for e in by_run], differences) for n in names]


def _organ_tables(runs: Sequence[EvaluatedRun], differences: Sequence[Disagreement]) -> dict[str, list[dict[str, Any]]]:
    """By modality, a row an organ: Dice (mask, pred. gen.), with false organs where all runs have that."""
    metric, tables = headline_dice([run.summary["metrics"] for run in runs]), {}
    for modality in MODALITIES:
        by_run = [run.summary["by_modality_organ"].get(modality, {}) for run in runs]
        organs = dict.fromkeys(o for organs in by_run for o, entries in organs.items() if metric in entries)
        rows = [
            _row(
                shown_name(organ),
                metric,
                DEFINITIONS[metric],
                [organs.get(organ, {}).get(metric) for organs in by_run],
                differences,
            )
            for organ in organs
        ]
        if rows:
            tables[modality] = rows
    return tables


def _row(
    label: str, metric: str, definition: Definition, entries: list[Any], differences: Sequence[Disagreement]
) -> dict[str, Any]:
    may_compare = is_comparable(metric, differences)
    # An unbiased estimate of a squared distance: values below 0 count as 0.
    least = 0.0 if metric in _KERNEL_DISTANCES else -math.inf
    # A number that means nothing is shown, and is never the best.
    values = [None if entry is None or is_unreliable(entry) else entry["value"] for entry in entries]
    best = best_of(values, definition, least=least) if may_compare else set()
    cells = [{"entry": entry, "best": i in best} for i, entry in enumerate(entries)]
    return {"label": label, "definition": definition, "compares": may_compare, "cells": cells}


def _gallery(runs: Sequence[EvaluatedRun]) -> tuple[list[dict[str, str]], str]:
    """Figures of the masks that all runs have; or the reason why there are none."""
    if len({run.summary["provenance"].get("shards_digest") for run in runs}) > 1:
        return [], "The runs share no masks: they were sampled from different shard sets."
    try:
        pictures = [Pictures.open(run.folder) for run in runs]
    except InputProblems as error:
        return [], f"No images side by side: {error.problems[0]}."
    names = [run.name for run in runs]
    drawn = [figures.same_masks(names, pictures, shared_masks(pictures, m), m) for m in MODALITIES]
    shown = [figure for figure in map(_embedded, drawn) if figure is not None]
    return shown, "" if shown else "The runs share no masks."


def _embedded(drawn: Drawn) -> dict[str, str] | None:
    """Title, caption and the picture as a data URL."""
    if drawn is None:
        return None
    canvas, figure = drawn
    file = io.BytesIO()
    save(canvas, file)
    return {"title": figure.title, "caption": figure.caption, "source": png_url(file.getvalue())}
