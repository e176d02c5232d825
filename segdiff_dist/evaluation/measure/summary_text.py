"""summary.json in words: which metrics come first, and the table that a command prints."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from segdiff_dist.evaluation.measure.segmenter_check import is_unreliable
from segdiff_dist.evaluation.metrics.columns import HEADLINE_METRICS
from segdiff_dist.evaluation.metrics.distances import DISTANCE_METRICS, Entry
from segdiff_dist.evaluation.metrics.sharpness import SHARPNESS_METRICS

# A page or a table shows these first. False organs, a segmenter that fails, blur, images unlike the real ones and lack
# of variety each make one of them worse.
TOP_METRICS = (
    *("dice_either_mask_gen", "dice_either_mask_real", "sharpness", "segmenter_frechet"),
    *("segmenter_precision", "segmenter_recall", "segmenter_patient_precision", "segmenter_patient_recall"),
)
# Evaluations of earlier versions have these in place of the first two.
_EARLIER = {"dice_either_mask_gen": "dice_mask_gen", "dice_either_mask_real": "dice_mask_real"}
# The mark behind a number of the terminal's table that means nothing.
UNRELIABLE = "(!)"
# The mark behind a Frechet distance of fewer images than twice its features.
FEW = "(few)"


def format_table(summary: dict[str, Any]) -> str:
    """The headline metrics as text: a row a metric, a column a modality, 95 % intervals in brackets; UNRELIABLE behind
    numbers that mean nothing."""
    columns = {"all": summary["metrics"], **summary["by_modality"]}
    rows = [["", *(f"{name} (n={_most_samples(entries)})" for name, entries in columns.items())]]
    rows += [
        [metric, *(_cell(entries.get(metric)) for entries in columns.values())]
        for metric in dict.fromkeys(
            (*top_metrics(columns.values()), *HEADLINE_METRICS, *SHARPNESS_METRICS, *DISTANCE_METRICS)
        )
        if any(metric in entries for entries in columns.values())
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def top_metrics(groups: Collection[dict[str, Entry]]) -> list[str]:
    """TOP_METRICS. One that no group has is replaced by the metric that earlier versions had in its place."""
    return [n if any(n in entries for entries in groups) else _EARLIER.get(n, n) for n in TOP_METRICS]


def headline_dice(groups: Collection[dict[str, Entry]]) -> str:
    """The Dice for comparing runs or groups of entries: the one that false organs lower, if all have it."""
    measured = [entries for entries in groups if "dice_mask_gen" in entries]
    return "dice_either_mask_gen" if all("dice_either_mask_gen" in entries for entries in measured) else "dice_mask_gen"


def _most_samples(entries: dict[str, Entry]) -> int:
    return max((entry["n"] for entry in entries.values()), default=0)


def _cell(entry: Entry | None) -> str:
    if entry is None:
        return "-"
    interval = entry.get("ci95")
    value = entry["value"]
    text = f"{value:z.3f}" if value == 0 or abs(value) >= 0.01 else f"{value:.2e}"
    text += f" [{interval[0]:z.3f}, {interval[1]:z.3f}]" if interval else ""
    text += f" {FEW}" if entry.get("too_few") else ""
    return f"{text} {UNRELIABLE}" if is_unreliable(entry) else text
