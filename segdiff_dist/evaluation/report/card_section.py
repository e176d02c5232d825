"""The numbers of an evaluation, as a section of a model card."""

from __future__ import annotations

from typing import Any

from segdiff_dist.evaluation.measure.segmenter_check import MARK, is_unreliable
from segdiff_dist.evaluation.measure.summary_text import FEW, top_metrics
from segdiff_dist.evaluation.report.entry_text import DASH, format_entry, format_interval, groups_of

_DIGITS = 3
# After those that every page shows first. RUN/evaluation has the others.
_MORE = (
    *("dice_either_real_gen", "dice_mask_gen", "surface_dice_mask_gen", "false_positive_rate_mask_gen"),
    *("psnr_db", "ssim", "lpips", "fid"),
)


def card_section(summary: dict[str, Any]) -> str:
    """Markdown. `summary`: what read_summary gave."""
    groups = groups_of(summary["metrics"], summary["by_modality"])
    metrics = dict.fromkeys((*top_metrics(groups.values()), *_MORE))
    rows = [[f"`{name}`", *(_cell(entries.get(name)) for entries in groups.values())] for name in metrics]
    rows = [row for row in rows if set(row[1:]) != {DASH}]
    lines = ["## Measured", "", _sentence(summary), ""]
    lines += [_row(["metric", *groups]), _row(["---"] * (1 + len(groups))), *map(_row, rows)]
    entries = [entry for group in groups.values() for name, entry in group.items() if name in metrics]
    if any(map(is_unreliable, entries)):
        lines += ["", f"{MARK}: the segmenter fails on real images, so this number means nothing."]
    if any(entry.get("too_few") for entry in entries):
        lines += ["", f"{FEW}: of so few images that the bias may be larger than the number."]
    return "\n".join(lines)


def _sentence(summary: dict[str, Any]) -> str:
    facts = summary["provenance"]
    digest = facts.get("shards_digest")
    of_set = "" if digest is None else f" Real images: shard set with sha256 `{digest[:16]}`."
    return (
        f"By `segdiff evaluate`, on {summary['num_samples']:,} images, masks of {summary['num_patients']:,} patients.\n"
        f"In brackets: 95 % intervals of a bootstrap over patients, and n.{of_set}\n"
        "The metrics are defined in segdiff's docs/metrics.md."
    )


def _cell(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return DASH
    interval = format_interval(entry, _DIGITS)
    n = f"n {entry['n']:,}" if "n" in entry else ""
    between = "; ".join(filter(None, (interval, n)))
    return format_entry(entry, _DIGITS) + (f" ({between})" if between else "")


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
