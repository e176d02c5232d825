"""A data set's result as text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from _recipes_measure import METRICS
from _recipes_verdict import told


def print_result(name: str, result: dict[str, Any]) -> None:
    """Tables of one data set."""
    print(f"\n{name}: {result['num_masks']} masks of {result['num_patients']} patients, split {result['split']}")
    print(f"real slices: Dice {result['real_dice']['value']:.3f}")
    best = result["best_paper"]
    print("\nthe paper's recipe, by learning rate and weights, on the validation split")
    for row in result["search"]:
        chosen = "  <- its best" if (row["lr"], row["weights"]) == (best["lr"], best["weights"]) else ""
        print(f"  {row['lr']:<8g} {row['weights']:<10}" + _cells(lambda m, row=row: row[m]["value"]) + chosen)
    print(f"\n{'':<46}{'Dice':>18}{'distance':>18}{'PSNR':>18}")
    for curve in ("paper", "ours", "a_third"):
        told_curve = result["curves"][curve]
        for i, images in enumerate(told_curve["images"]):
            label = f"{told_curve['label'][:34]:<36}{images:>8,}  "
            print(label + "".join(f"{_spread(told_curve[m][i]):>18}" for m in METRICS))
    print("\nours with one part changed")
    for row in result["ablations"]:
        print(f"  {row['about']:<64}" + _cells(lambda m, row=row: row[m]["mean"]))
    print()
    for line in told(result["verdict"]):
        print(line)


def _cells(value: Callable[[str], float]) -> str:
    return f"  Dice {value('dice'):.3f}  distance {value('distance'):8.3f}  PSNR {value('psnr_db'):5.2f} dB"


def _spread(value: dict[str, Any]) -> str:
    return f"{value['mean']:.3f} ±{(value['high'] - value['low']) / 2:.3f}"
