"""The look of every figure: one colour a class, tiles of pixels, legends. This file and *_figures.py use matplotlib."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from data_shards.labels import BACKGROUND, BODY, LabelTable, shown_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

# One colour an organ, everywhere and always: neighbours differ, left and right of a pair are shades of one hue.
ORGAN_COLOURS = {
    BACKGROUND: "#0b0d10",
    BODY: "#454c57",
    "spleen": "#a56cc1",
    "kidney_right": "#e0a12b",
    "kidney_left": "#f5cf6a",
    "gallbladder": "#4caf6a",
    "esophagus": "#c79a7b",
    "liver": "#b5533c",
    "stomach": "#f2a0a1",
    "aorta": "#e5383b",
    "inferior_vena_cava": "#3f7fd9",
    "pancreas": "#d6e06b",
    "adrenal_gland_right": "#1fa6a0",
    "adrenal_gland_left": "#86dcd4",
    "duodenum": "#f47b20",
    "urinary_bladder": "#7cc4f0",
    "prostate_uterus": "#dd5fb0",
}
REAL_COLOUR, GENERATED_COLOUR = "#6b7683", "#0e7c86"
MODALITY_COLOURS = {"CT": "#2b6cb0", "MR": "#b7791f"}
_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": "#1f2933",
    "axes.labelcolor": "#3e4c59",
    "axes.edgecolor": "#9aa5b1",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e7eb",
    "grid.linewidth": 0.8,
    "xtick.color": "#52606d",
    "ytick.color": "#52606d",
    "legend.frameon": False,
    "figure.facecolor": "white",
}
_DPI = 130
_TILE_INCHES = 1.75


@dataclass(frozen=True)
class Figure:
    """A drawn figure: its file in the figures folder, title, caption, and its section of the report."""

    file: str
    title: str
    caption: str
    section: str


Drawn = tuple["Canvas", Figure] | None


@contextmanager
def styled() -> Iterator[None]:
    """Figures drawn inside look alike. No global backend is set: a notebook that draws keeps its windows."""
    import matplotlib as mpl
    from matplotlib import pyplot as plt

    with mpl.rc_context(_STYLE), plt.ioff():
        yield


def save(canvas: Canvas, target: Path | IO[bytes]) -> None:
    """Write it as PNG, and free its memory."""
    from matplotlib import pyplot as plt

    canvas.savefig(target, format="png", dpi=_DPI, bbox_inches="tight", pad_inches=0.08)
    plt.close(canvas)


def plain(text: str) -> str:
    """Text that matplotlib draws as it is: it would read text between two dollars as mathematics."""
    return text.replace("$", r"\$")


def organ_colour(name: str) -> str:
    """The fixed colour of a class; beyond the palette a colour computed from its name."""
    if name in ORGAN_COLOURS:
        return ORGAN_COLOURS[name]
    from matplotlib.colors import hsv_to_rgb, to_hex

    digest = hashlib.sha256(name.encode()).digest()
    return str(to_hex(hsv_to_rgb((digest[0] / 256, 0.45 + digest[1] / 640, 0.7 + digest[2] / 1024))))


def tiles(num_rows: int, num_columns: int, titles: Sequence[str]) -> tuple[Canvas, np.ndarray]:
    """Bare axes [rows, columns] for square images, with a title above each column."""
    from matplotlib import pyplot as plt

    # Beside the tiles: row labels on the left; above and below them, titles and the legend.
    size = (num_columns * _TILE_INCHES + 0.4, num_rows * _TILE_INCHES + 0.85)
    canvas, axes = plt.subplots(num_rows, num_columns, figsize=size, squeeze=False, layout="constrained")
    for ax in axes.ravel():
        ax.set(xticks=[], yticks=[])
        ax.grid(False)
        for spine in ax.spines.values():
            spine.set_visible(False)
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, loc="center", fontsize=9, fontweight="normal")
    return canvas, axes


def show_grey(ax: Axes, image_HW: np.ndarray, label: str | None = None) -> None:
    """An image of grey values 0 to 255; `label` is written to the left of it."""
    ax.imshow(image_HW, cmap="gray", vmin=0, vmax=255)
    if label is not None:
        ax.set_ylabel(label, fontsize=8)


def show_labels(ax: Axes, labels_HW: np.ndarray, table: LabelTable, label: str | None = None) -> None:
    """Label ids in their classes' colours."""
    from matplotlib.colors import to_rgb

    palette = np.array([to_rgb(organ_colour(name)) for name in table.names])
    ax.imshow(palette[labels_HW], interpolation="nearest")
    if label is not None:
        ax.set_ylabel(label, fontsize=8)


def note(ax: Axes, text: str) -> None:
    """A few words in a tile's upper corner."""
    box = {"boxstyle": "round,pad=0.25", "facecolor": "#000000", "alpha": 0.55, "linewidth": 0}
    ax.text(0.03, 0.97, text, transform=ax.transAxes, va="top", fontsize=7, color="white", bbox=box)


def legend(canvas: Canvas, table: LabelTable, label_maps: Sequence[np.ndarray]) -> None:
    """The classes that occur in the label maps, below all tiles."""
    from matplotlib.patches import Patch

    present = sorted(set(np.concatenate([np.unique(labels) for labels in label_maps]).tolist()))
    names = [table.names[i] for i in present if table.names[i] != BACKGROUND]
    handles = [Patch(color=organ_colour(name), label=plain(shown_name(name))) for name in names]
    columns = max(2, int(canvas.get_figwidth() / 1.45))
    if handles:
        canvas.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=7, handlelength=1.0)
