"""The comparison of models drawn: a column a metric, a row what is equal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from support.figure_style import STYLE

_SHOWN = {
    "dice_either_mask_gen": "Dice, false organs count",
    "segmenter_frechet": "segmenter-feature distance",
    "sharpness": "sharpness",
    "sharpness_75_100": "power, finest band, generated / real",
    "psnr_db": "PSNR, dB",
}
_OF_REAL = {"sharpness": 1.0, "sharpness_75_100": 1.0}


def draw_models(results: Mapping[str, Mapping[str, Any]], title: str, file: Path) -> None:
    """Bars: mean over seeds; lines: the interval over patients of the first seed; points: seeds."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    with mpl.rc_context(STYLE):
        size = (3.1 * len(_SHOWN), 3.0 * len(results) + 0.4)
        canvas, axes = plt.subplots(len(results), len(_SHOWN), figsize=size, squeeze=False, layout="constrained")
        for row, (by, models) in zip(axes, results.items(), strict=True):
            for axis, (metric, label) in zip(row, _SHOWN.items(), strict=True):
                _draw(axis, models, metric)
                axis.set_title(f"{label}\nequal {by}")
        canvas.suptitle(f"{title}; dotted: real slices", x=0.01, ha="left")
        file.parent.mkdir(parents=True, exist_ok=True)
        canvas.savefig(file, dpi=110)
        plt.close(canvas)


def _draw(axis: Any, models: Mapping[str, Any], metric: str) -> None:
    for place, row in enumerate(models.values()):
        entry = row["metrics"].get(metric)
        if entry is None:
            continue
        axis.bar(place, entry["value"], width=0.6, color="#9fc5c9")
        if entry["ci95"]:
            axis.vlines(place, *entry["ci95"], color="#0e7c86", lw=1.5)
        axis.plot([place] * len(entry["of_seeds"]), entry["of_seeds"], "o", color="#1c2733", markersize=3)
    real = _OF_REAL.get(metric)
    if metric == "dice_either_mask_gen" and models:
        real = next(iter(models.values()))["metrics"]["dice_either_mask_real"]["value"]
    if real is not None:
        axis.axhline(real, color="#6b7683", lw=0.9, ls=":")
    axis.set_xticks(range(len(models)), list(models), rotation=30, ha="right")
