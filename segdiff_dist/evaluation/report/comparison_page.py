"""The page that compares several evaluated runs: one HTML file that contains everything it shows."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_shards.labels import shown_name
from data_shards.modalities import in_order
from data_shards.problems import InputProblems
from segdiff_dist.evaluation.measure.segmenter_check import MARK, is_unreliable, segmenter_messages, weakness
from segdiff_dist.evaluation.measure.summary_text import headline_dice
from segdiff_dist.evaluation.metrics.definitions import DEFINITIONS
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
from segdiff_dist.evaluation.report.differences import difference_tables, sentences
from segdiff_dist.evaluation.report.figure_style import Drawn, save, styled
from segdiff_dist.evaluation.report.page import page_environment, png_url, write_page
from segdiff_dist.evaluation.report.pictures import Pictures
from segdiff_dist.evaluation.report.tables import Cell, Row, Table, headline_metrics

COMPARISON = "comparison.html"
_INTERVALS = "95 % bootstrap intervals over patients are below the values."
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
_KERNEL_DISTANCES = ("kid", "segmenter_kernel_distance", "imagenet_lite_kernel_distance", "network_kernel_distance")

# Entries of a summary by "All" and modality, for each run in order.
Groups = dict[str, list[dict[str, Any]]]


def write_comparison(runs: Sequence[EvaluatedRun], out: Path) -> Path:
    """Write the page of at least two runs to `out`; returns it."""
    differences = disagreements(runs)
    groups = groups_of_runs(runs)
    changes = difference_tables(runs, differences)
    with styled():
        metric_figure = _embedded(metrics_figure(runs))
        drawn, reason = same_mask_figures(runs)
        gallery = [shown for shown in map(_embedded, drawn) if shown is not None]
    page = (
        page_environment()
        .get_template("comparison.html.j2")
        .render(
            runs=runs,
            disagreements=differences,
            tables=[result_table(runs, group, differences) for group in groups],
            organ_tables=organ_tables(runs, differences),
            differences=changes,
            difference_sentences=sentences(changes),
            metric_figures=[metric_figure] if metric_figure is not None else [],
            gallery=gallery,
            no_gallery=reason or "The runs share no masks.",
            settings=differing_settings(runs),
            without_settings=[run.name for run in runs if not run.settings],
            segmenter_messages={run.name: messages for run in runs if (messages := segmenter_messages(run.summary))},
            mark=MARK,
            definitions={
                n: d for n, d in DEFINITIONS.items() if any(n in e for by_run in groups.values() for e in by_run)
            },
            one_store=len({run.tracked.store if run.tracked else None for run in runs}) == 1,
        )
    )
    return write_page(out, page)


def groups_of_runs(runs: Sequence[EvaluatedRun]) -> Groups:
    """Entries by "All" and modality; "All" is left out if all runs are of one modality."""
    groups = {"All": [run.summary["metrics"] for run in runs]}
    modalities = in_order(m for run in runs for m in run.summary["by_modality"])
    groups |= {m: [run.summary["by_modality"].get(m, {}) for run in runs] for m in modalities}
    groups = {group: entries for group, entries in groups.items() if any(entries)}
    if len(groups) == 2:
        groups.pop("All", None)
    return groups


def result_table(runs: Sequence[EvaluatedRun], group: str, differences: Sequence[Disagreement]) -> Table:
    """All metrics of a group of images, a row a metric and a column a run; the headline first."""
    by_run = groups_of_runs(runs)[group]
    first = headline_metrics({run.name: entries for run, entries in zip(runs, by_run, strict=True)})
    ordered = dict.fromkeys((*first, *DEFINITIONS))
    names = [name for name in ordered if any(name in entries for entries in by_run)]
    rows = [_row(DEFINITIONS[n].label, n, n, [e.get(n) for e in by_run], differences) for n in names]
    shown = "all images" if group == "All" else f"{group} images"
    caption = (
        f"Generated against real images of {len(runs)} runs, {shown}. {_INTERVALS} Marked: the best value of a row. "
        "Where intervals overlap widely, other patients could give another best."
    )
    if any("\u2020" in row.label for row in rows):
        caption += " \u2020: the runs' values cannot be compared."
    columns = tuple(run.name for run in runs)
    return Table(f"comparison_{group.lower()}", f"Results, {shown}", caption, "Metric", columns, tuple(rows))


def organ_tables(runs: Sequence[EvaluatedRun], differences: Sequence[Disagreement]) -> list[Table]:
    """By modality, a row an organ: Dice (mask, pred. gen.), with false organs where all runs have that."""
    metric, tables = headline_dice([run.summary["metrics"] for run in runs]), []
    for modality in in_order(m for run in runs for m in run.summary["by_modality_organ"]):
        by_run = [run.summary["by_modality_organ"].get(modality, {}) for run in runs]
        organs = dict.fromkeys(o for organs in by_run for o, entries in organs.items() if metric in entries)
        rows = []
        for organ in organs:
            entries = [of.get(organ, {}) for of in by_run]
            row = _row(shown_name(organ), organ, metric, [e.get(metric) for e in entries], differences)
            greys = [weakness(e) if metric in e else "" for e in entries]
            cells = [replace(c, grey=grey, best=c.best and not grey) for c, grey in zip(row.cells, greys, strict=True)]
            rows.append(replace(row, cells=tuple(cells)))
        caption = f"{DEFINITIONS[metric].label}, of each organ on {modality} images. {DEFINITIONS[metric].text} "
        caption += _INTERVALS
        columns, title = tuple(run.name for run in runs), f"{modality}: {DEFINITIONS[metric].label}, by organ"
        if rows:
            name = f"comparison_organs_{modality.lower()}"
            tables.append(Table(name, title, caption, "Organ", columns, tuple(rows), modality))
    return tables


def _row(label: str, name: str, metric: str, entries: list[Any], differences: Sequence[Disagreement]) -> Row:
    may_compare = is_comparable(metric, differences)
    # An unbiased estimate of a squared distance: values below 0 count as 0.
    least = 0.0 if metric in _KERNEL_DISTANCES else -math.inf
    # A number that means nothing is shown, and is never the best.
    values = [None if entry is None or is_unreliable(entry) else entry["value"] for entry in entries]
    best = best_of(values, DEFINITIONS[metric], least=least) if may_compare else set()
    cells = tuple(Cell(metric, entry, best=i in best) for i, entry in enumerate(entries))
    return Row(label if may_compare else f"{label} \u2020", name, cells, DEFINITIONS[metric].better)


def metrics_figure(runs: Sequence[EvaluatedRun]) -> Drawn:
    """The main metrics of all runs, with their intervals."""
    groups = groups_of_runs(runs)
    metrics = [m for m in _DRAWN if any(m in entries for by_run in groups.values() for entries in by_run)]
    return figures.metrics_of_runs([run.name for run in runs], groups, metrics[:_MOST_PANELS])


def same_mask_figures(runs: Sequence[EvaluatedRun]) -> tuple[list[Drawn], str]:
    """Figures of the masks that all runs have; or the reason why there are none."""
    if len({run.summary["provenance"].get("shards_digest") for run in runs}) > 1:
        return [], "The runs share no masks: they were sampled from different shard sets."
    try:
        pictures = [Pictures.open(run.folder) for run in runs]
    except InputProblems as error:
        return [], f"No images side by side: {error.problems[0]}."
    names = [run.name for run in runs]
    return [figures.same_masks(names, pictures, shared_masks(pictures, m), m) for m in pictures[0].modalities], ""


def _embedded(drawn: Drawn) -> dict[str, str] | None:
    """Title, caption and the picture as a data URL."""
    if drawn is None:
        return None
    canvas, figure = drawn
    file = io.BytesIO()
    save(canvas, file)
    return {"title": figure.title, "caption": figure.caption, "source": png_url(file.getvalue())}
