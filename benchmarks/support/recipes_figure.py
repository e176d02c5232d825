"""The comparison drawn: curves over images and over seconds, and what the images look like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from support.figure_style import STYLE

_LABELS = {
    "dice": "Dice of mask and generated image",
    "distance": "segmenter-feature distance (log)",
    "psnr_db": "PSNR, dB",
    "sharpness": "sharpness (1: the real images' power)",
    "sharpness_75_100": "power, finest band, generated / real",
    "texture": "texture in organs, generated / real",
}
# What real images have, of figures that are of two images.
_OF_REAL = {"sharpness": 1.0, "sharpness_75_100": 1.0, "texture": 1.0}
_COLOURS = {"paper": "#b7791f", "ours": "#0e7c86"}
_NUM_MASKS = 6


def draw_curves(result: Mapping[str, Any], title: str, file: Path) -> None:
    """Two rows, over images and over seconds; a column a metric; bands are the range over seeds.

    `result` is a data set's part of the JSON file.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    with mpl.rc_context(STYLE):
        canvas, axes = plt.subplots(
            2, len(_LABELS), figsize=(3.7 * len(_LABELS), 6.2), sharey="col", layout="constrained"
        )
        for row, by in enumerate(("images", "seconds")):
            for axis, (metric, label) in zip(axes[row], _LABELS.items(), strict=True):
                for name, colour in _COLOURS.items():
                    _band(axis, result["curves"][name], by, metric, colour)
                _references(axis, result, by, metric)
                axis.set_xlabel({"images": "images seen", "seconds": "seconds of training steps, one core"}[by])
                axis.set_xlim(left=0)
                if metric in ("distance", "sharpness_75_100"):
                    axis.set_yscale("log")
                if row == 0:
                    axis.set_title(label)
        axes[0][0].legend(loc="best", fontsize=8)
        canvas.suptitle(title, x=0.01, ha="left")
        file.parent.mkdir(parents=True, exist_ok=True)
        canvas.savefig(file, dpi=130)
        plt.close(canvas)


def _band(axis: Any, curve: Mapping[str, Any], by: str, metric: str, colour: str) -> None:
    at, values = _at(curve, by), curve[metric]
    axis.plot(at, [v["mean"] for v in values], color=colour, marker="o", markersize=3.5, label=curve["label"])
    axis.fill_between(at, [v["low"] for v in values], [v["high"] for v in values], color=colour, alpha=0.18, lw=0)


def _at(curve: Mapping[str, Any], by: str) -> list[float]:
    return curve["images"] if by == "images" else [seconds["mean"] for seconds in curve["seconds"]]


def _references(axis: Any, result: Mapping[str, Any], by: str, metric: str) -> None:
    """The paper's end, what real slices get, and the runs that were planned for a third."""
    end = result["curves"]["paper"][metric][-1]["mean"]
    axis.axhline(end, color=_COLOURS["paper"], lw=0.9, ls="--", label="where the paper's ends")
    real = result[f"real_{metric}"]["value"] if f"real_{metric}" in result else _OF_REAL.get(metric)
    if real is not None:
        axis.axhline(real, color="#6b7683", lw=0.9, ls=":", label="real slices")
    third = result["curves"]["a_third"]
    [value] = third[metric]
    axis.errorbar(
        _at(third, by),
        [value["mean"]],
        yerr=[[value["mean"] - value["low"]], [value["high"] - value["mean"]]],
        color=_COLOURS["ours"],
        marker="D",
        markersize=5,
        markerfacecolor="white",
        capsize=2,
        ls="none",
        label="ours, planned for a third",
    )


def draw_gallery(
    columns: Sequence[tuple[str, np.ndarray]], file: Path, num_labels: int, cell_inches: float = 1.15
) -> None:
    """A row a mask: columns are (title, uint8 [N, H, W]); the first holds label ids, below `num_labels`."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    chosen = _varied(columns[0][1])
    size = (cell_inches * len(columns), 1.026 * cell_inches * len(chosen) + 0.3)
    canvas, axes = plt.subplots(len(chosen), len(columns), figsize=size, squeeze=False)
    for row, index in enumerate(chosen):
        for column, (title, image_NHW) in enumerate(columns):
            axis, is_mask = axes[row][column], column == 0
            axis.imshow(
                image_NHW[index],
                cmap="tab20" if is_mask else "gray",
                vmin=0,
                vmax=num_labels - 1 if is_mask else 255,
                interpolation="nearest",
            )
            axis.set_axis_off()
            if row == 0:
                axis.set_title(title, fontsize=7)
    canvas.subplots_adjust(left=0.005, right=0.995, bottom=0.005, top=1 - 0.3 / size[1], wspace=0.03, hspace=0.03)
    file.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(file, dpi=110)
    plt.close(canvas)


def _varied(mask_NHW: np.ndarray) -> list[int]:
    """The masks with most labels, but spread over the list."""
    parts = np.array_split(np.arange(len(mask_NHW)), min(_NUM_MASKS, len(mask_NHW)))
    return [int(max(part, key=lambda i: len(np.unique(mask_NHW[i])))) for part in parts]
