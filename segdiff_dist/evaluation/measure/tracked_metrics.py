"""What MLflow shows of an evaluation: about twenty headline numbers as metrics, and all numbers as one table.

A runs table with a thousand columns is of no use. Beside the table, summary.json holds everything.
"""

from __future__ import annotations

from typing import Any

from data_shards.records import MODALITIES
from segdiff_dist.evaluation.measure.summary import counts, groups
from segdiff_dist.evaluation.metrics.distances import Entry

# The headline Dice and its ceiling, sharpness, distances, then what others report.
_OVERALL = (
    *("dice_either_mask_gen", "dice_either_mask_real", "dice_mask_gen", "sharpness", "texture"),
    *("segmenter_frechet", "segmenter_precision", "segmenter_recall", "fid", "kid", "frd"),
    *("psnr_db", "ssim", "lpips"),
)
_BY_MODALITY = ("dice_either_mask_gen", "sharpness")
_COUNTS = ("num_samples", "num_patients", "trust/num_leaked", "trust/memorised_share")

TABLE = "evaluation/metrics.json"
COLUMNS = ("group", "metric", "value", "low_95", "high_95", "images", "patients", "unit", "better")


def headline(summary: dict[str, Any]) -> dict[str, float]:
    """The metrics of MLflow's runs table: `dice_either_mask_gen`, `CT/dice_either_mask_gen`, `num_samples`, ..."""
    by_group, counted = groups(summary), counts(summary)
    chosen = [("", name) for name in _OVERALL] + [(f"{m}/", name) for name in _BY_MODALITY for m in MODALITIES]
    found = {
        f"{group}{name}": by_group[group][name]["value"] for group, name in chosen if name in by_group.get(group, {})
    }
    return found | {name: counted[name] for name in _COUNTS if name in counted}


def table(summary: dict[str, Any]) -> list[list[Any]]:
    """A row for each number of the summary, and of `downstream` where it is there, as COLUMNS says."""
    rows = [
        _row(group.rstrip("/") or "all", name, entry)
        for group, entries in groups(summary).items()
        for name, entry in entries.items()
    ]
    rows += [["all", name, value, *[None] * (len(COLUMNS) - 3)] for name, value in counts(summary).items()]
    for arm in summary.get("downstream", {}).get("arms", ()):
        by_group = {"": arm["dice"]} | {f"/{name}": entry for name, entry in arm["by_modality"].items()}
        rows += [_row(f"downstream/{arm['name']}{group}", "dice", entry) for group, entry in by_group.items()]
        if "gain" in arm:
            rows.append(_row(f"downstream/{arm['name']}", "gain", arm["gain"]["dice"]))
    return rows


def _row(group: str, name: str, entry: Entry) -> list[Any]:
    low, high = entry.get("ci95") or (None, None)
    others = (entry.get(key) for key in ("n", "num_patients", "unit", "better"))
    return [group, name, entry["value"], low, high, *others]
