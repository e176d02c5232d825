"""How figures look: tiles of pixels, legends, colours. This file, pdf_report.py and *_figures.py use matplotlib."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from zlib import crc32

import numpy as np

from data_shards.labels import BACKGROUND, LabelTable, shown_name
from data_shards.store.contact_sheet import class_colours

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

REAL_COLOUR, GENERATED_COLOUR = "#6b7683", "#0e7c86"
_MODALITY_COLOURS = {"CT": "#2b6cb0", "MR": "#b7791f"}
_OTHER_MODALITIES = ("#2f855a", "#9b2c2c", "#6b46c1", "#b83280", "#2c7a7b", "#744210", "#4c51bf", "#718096")
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
    "pdf.fonttype": 42,  # TrueType: journals refuse type 3
    "hatch.linewidth": 0.6,
}
_DPI = 130
# Resolution of images in a vector figure: images of 256x256 keep all their pixels.
VECTOR_DPI = 300
_TILE_INCHES = 1.75


def modality_colour(modality: str) -> str:
    """The same in every figure: its own for CT and MR, one by its name for others."""
    by_name = _OTHER_MODALITIES[crc32(modality.encode()) % len(_OTHER_MODALITIES)]
    return _MODALITY_COLOURS.get(modality, by_name)


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
    canvas.savefig(target, format="png", dpi=_DPI, bbox_inches="tight", pad_inches=0.08)
    close(canvas)


def close(canvas: Canvas) -> None:
    """Free its memory."""
    from matplotlib import pyplot as plt

    plt.close(canvas)


def save_vector(canvas: Canvas, path: Path) -> None:
    """Write it as PDF, without a date; the canvas may be drawn on further."""
    undated = {"Creator": None, "CreationDate": None}
    canvas.savefig(path, format="pdf", dpi=VECTOR_DPI, bbox_inches="tight", pad_inches=0.05, metadata=undated)


def plain(text: str) -> str:
    """Text that matplotlib draws as it is: it would read text between two dollars as mathematics."""
    return text.replace("$", r"\$")


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
    """Label ids in their classes' colours, those of contact sheet and training pictures."""
    ax.imshow(class_colours(table)[labels_HW], interpolation="nearest")
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
    handles = [
        Patch(color=class_colours(table)[i] / 255, label=plain(shown_name(table.names[i])))
        for i in present
        if table.names[i] != BACKGROUND
    ]
    columns = max(2, int(canvas.get_figwidth() / 1.45))
    if handles:
        canvas.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=7, handlelength=1.0)
