"""What MLflow shows of an evaluation: about twenty headline numbers as metrics, and all numbers as one table.

A runs table with a thousand columns is of no use. Beside the table, summary.json holds everything.
"""

from __future__ import annotations

from typing import Any

from data_shards.modalities import in_order
from segdiff_dist.evaluation.measure.summary import counts, groups
from segdiff_dist.evaluation.metrics.distances import Entry
from segdiff_dist.tracking.headline import HEADLINE

_BY_MODALITY = ("dice_either_mask_gen", "sharpness")
_COUNTS = ("num_samples", "num_patients", "trust/num_leaked", "trust/memorised_share")

TABLE = "evaluation/metrics.json"
# MLflow compares tables of several runs by their first column, and shows the second one.
COLUMNS = ("metric", "value", "low_95", "high_95", "images", "patients", "unit", "better")


def headline(summary: dict[str, Any]) -> dict[str, float]:
    """The metrics of MLflow's runs table: `dice_either_mask_gen`, `CT/dice_either_mask_gen`, `num_samples`, ..."""
    by_group, counted = groups(summary), counts(summary)
    modalities = in_order(summary["by_modality"])
    chosen = [("", name) for name in HEADLINE] + [(f"{m}/", name) for name in _BY_MODALITY for m in modalities]
    found = {
        f"{group}{name}": by_group[group][name]["value"] for group, name in chosen if name in by_group.get(group, {})
    }
    return found | {name: counted[name] for name in _COUNTS if name in counted}


def table(summary: dict[str, Any]) -> list[list[Any]]:
    """A row for each number of the summary, and of `downstream` where it is there, as COLUMNS says."""
    everything = groups(summary)
    for arm in summary.get("downstream", {}).get("arms", ()):
        everything[f"downstream/{arm['name']}/"] = {"dice": arm["dice"]}
        everything |= {f"downstream/{arm['name']}/{m}/": {"dice": entry} for m, entry in arm["by_modality"].items()}
        if "gain" in arm:
            everything[f"downstream/{arm['name']}/"]["gain"] = arm["gain"]["dice"]
    rows = [_row(f"{group}{name}", entry) for group, entries in everything.items() for name, entry in entries.items()]
    return rows + [_row(name, {"value": value}) for name, value in counts(summary).items()]


def _row(name: str, entry: Entry) -> list[Any]:
    numbers = (entry["value"], *(entry.get("ci95") or (None, None)))
    rounded = (None if number is None else float(f"{number:.6g}") for number in numbers)
    return [name, *rounded, *(entry.get(key) for key in ("n", "num_patients", "unit", "better"))]
