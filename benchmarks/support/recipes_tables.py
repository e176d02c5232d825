"""A data set's result as text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from support.recipes_targets import target_lines

_SHOWN = {
    "dice": "Dice",
    "distance": "distance",
    "psnr_db": "PSNR, dB",
    "sharpness": "sharpness",
    "sharpness_75_100": "power, finest band",
    "texture": "texture",
}


def print_result(name: str, result: dict[str, Any]) -> None:
    """Tables of one data set."""
    print(f"\n{name}: {result['num_masks']} masks of {result['num_patients']} patients, split {result['split']}")
    real_dice, real_distance = (result[f"real_{metric}"]["value"] for metric in ("dice", "distance"))
    print(f"real slices: Dice {real_dice:.3f}; distance to those of the training split {real_distance:.3f}")
    best = result["best_paper"]
    print("\nthe paper's recipe, by learning rate and weights, on the validation split")
    for row in result["search"]:
        chosen = "  <- its best" if (row["lr"], row["weights"]) == (best["lr"], best["weights"]) else ""
        print(f"  {row['lr']:<8g} {row['weights']:<10}" + _cells(lambda m, row=row: row[m]["value"]) + chosen)
    heads = "".join(f"{head:>25}" for head in _SHOWN.values())
    print(f"\n{'images':>8}{'seconds':>10}{heads}   (mean, range over seeds)")
    for curve in result["curves"].values():
        print(curve["label"])
        for i, images in enumerate(curve["images"]):
            values = "".join(f"{_range(curve[metric][i]):>25}" for metric in _SHOWN)
            print(f"{images:>8,}{curve['seconds'][i]['mean']:>10.0f}{values}")
    if result["ablations"]:
        print("\nours with one part changed")
    for row in result["ablations"]:
        print(f"  {row['name']:<20}" + _cells(lambda m, row=row: row[m]["mean"]) + f"   {row['about']}")
    print()
    for line in target_lines(result["targets"]):
        print(line)


def _cells(value: Callable[[str], float]) -> str:
    return f"  Dice {value('dice'):.3f}  distance {value('distance'):8.3f}  PSNR {value('psnr_db'):5.2f} dB" + (
        f"  sharpness {value('sharpness'):.3f}  finest {value('sharpness_75_100'):.3f}  texture {value('texture'):.3f}"
    )


def _range(value: dict[str, Any]) -> str:
    return f"{value['mean']:.3f} ({value['low']:.3f}-{value['high']:.3f})"
