"""Figures that compare several runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from segdiff_dist.evaluation.metrics.definitions import DEFINITIONS
from segdiff_dist.evaluation.report.figure_style import (
    Drawn,
    Figure,
    legend,
    modality_colour,
    note,
    plain,
    show_grey,
    show_labels,
    tiles,
)
from segdiff_dist.evaluation.report.pictures import Pictures

_ALL_COLOUR = "#1f2933"
_PANELS_A_ROW = 3
# Below a panel: the side of better values, by Definition.better.
_BETTER_SIDE = {"higher": "\u2192 better", "lower": "\u2190 better", "one": "1 is best"}


def metrics_of_runs(names: Sequence[str], groups: Mapping[str, Sequence[dict[str, Any]]], metrics: list[str]) -> Drawn:
    """A panel a metric, a line a run: values with their intervals, all samples and each modality.

    `groups`: by "All" and modality, for each run in order of `names`, its entries of summary.json.
    """
    from matplotlib import pyplot as plt

    metrics = [m for m in metrics if any(m in entries for runs in groups.values() for entries in runs)]
    if not metrics:
        return None
    num_columns = min(_PANELS_A_ROW, len(metrics))
    num_rows = -(-len(metrics) // num_columns)
    size = (1.4 + 3.1 * num_columns, 0.6 + num_rows * (0.75 + 0.42 * len(names)))
    canvas, axes = plt.subplots(num_rows, num_columns, figsize=size, sharey=True, squeeze=False, layout="constrained")
    canvas.get_layout_engine().set(h_pad=0.09, w_pad=0.09)
    for ax in axes.ravel()[len(metrics) :]:
        ax.set_visible(False)
    for ax, metric in zip(axes.ravel(), metrics, strict=False):
        _draw_metric(ax, metric, names, groups)
    handles = [_handle(group, _colour(group)) for group in groups]
    canvas.legend(handles=handles, loc="outside lower center", ncols=len(groups), fontsize=8)
    caption = (
        "Main metrics of generated against real images, a panel a metric and a line a run: of all images, and of each "
        "modality. Lines are 95 % bootstrap intervals over patients, where a metric has one. The arrow points to the "
        "better side."
    )
    return canvas, Figure("metrics.png", "Metrics of all runs", caption, "results")


def same_masks(
    names: Sequence[str], pictures: Sequence[Pictures], masks: Sequence[tuple[int, ...]], modality: str
) -> Drawn:
    """The real image, the mask, and every run's image of that mask. `masks`: from comparison.shared_masks."""
    if not masks:
        return None
    first = pictures[0]
    titles = ("real image", "mask", *(_shortened(name) for name in names))
    canvas, axes = tiles(len(masks), 2 + len(names), titles)
    for row, items in zip(axes, masks, strict=True):
        show_grey(row[0], first.real(items[0]), first.describe(items[0]))
        show_labels(row[1], first.mask(items[0]), first.label_table)
        for ax, run, i in zip(row[2:], pictures, items, strict=True):
            show_grey(ax, run.generated(i))
            note(ax, run.dice(i))
    legend(canvas, first.label_table, [first.mask(items[0]) for items in masks])
    caption = (
        f"The real {modality} image, its mask, and the images that each run generated from the same mask, with the "
        "Dice of the mask and the segmenter's labels on the generated image. The masks are at the lower quartile, "
        "the median and the upper quartile of the mean of that Dice over the runs, of different patients where there "
        "are enough. They are chosen by rule, not by eye."
    )
    return canvas, Figure(f"same_masks_{modality.lower()}.png", f"{modality}: the same masks", caption, "images")


def _handle(label: str, colour: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, marker="o", ms=4.5, label=label)


def _shortened(name: str) -> str:
    """A run's name, without its middle where it would not fit above a tile."""
    return plain(name if len(name) <= 24 else f"{name[:11]}\u2026{name[-12:]}")


def _draw_metric(ax: Any, metric: str, names: Sequence[str], groups: Mapping[str, Sequence[dict[str, Any]]]) -> None:
    """One panel of metrics_of_runs: a line a run, and in it a point a group."""
    for k, (group, runs) in enumerate(groups.items()):
        colour = _colour(group)
        offset = 0.22 * (k - (len(groups) - 1) / 2)
        for position, entries in enumerate(runs):
            if (entry := entries.get(metric)) is None:
                continue
            ax.plot(entry["value"], position + offset, "o", color=colour, ms=4.5)
            if entry["ci95"] is not None:
                ax.plot(entry["ci95"], [position + offset] * 2, color=colour, lw=1.4)
    definition = DEFINITIONS[metric]
    ax.set_title(definition.label, fontsize=9)
    ax.set_xlabel(_BETTER_SIDE.get(definition.better, ""), fontsize=7.5)
    ax.set_yticks(range(len(names)), [_shortened(name) for name in names])
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)


def _colour(group: str) -> str:
    return _ALL_COLOUR if group == "All" else modality_colour(group)
