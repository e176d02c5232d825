"""Entries of summary.json as text, and their groups."""

from __future__ import annotations

from typing import Any

from data_shards.modalities import in_order
from segdiff_dist.evaluation.measure.segmenter_check import MARK, is_unreliable
from segdiff_dist.evaluation.measure.summary_text import FEW

DASH = "\u2013"


def groups_of(overall: dict[str, Any], by_modality: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Entries by "All" and modality, without empty groups; "All" is left out if there is one modality only."""
    groups = {"All": overall} | {m: by_modality[m] for m in in_order(by_modality)}
    groups = {name: entries for name, entries in groups.items() if entries}
    if len(groups) == 2:
        groups.pop("All", None)
    return groups


def format_number(value: float, digits: int) -> str:
    """A number with a true minus sign, and none before zero."""
    return f"{value:z.{digits}f}".replace("-", "\u2212")


def format_entry(entry: dict[str, Any] | None, digits: int) -> str:
    """A value of the summary, with a mark where it means nothing; a dash if there is none."""
    if entry is None:
        return "\u2013"
    few = f" {FEW}" if entry.get("too_few") else ""
    return format_number(entry["value"], digits) + few + (f" {MARK}" if is_unreliable(entry) else "")


def format_interval(entry: dict[str, Any] | None, digits: int, between: str = " to ") -> str:
    """Its 95 % interval, or nothing."""
    if entry is None or entry["ci95"] is None:
        return ""
    low, high = (format_number(end, digits) for end in entry["ci95"])
    return f"{low}{between}{high}"
