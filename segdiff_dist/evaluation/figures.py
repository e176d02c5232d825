"""The figures of the report, Figures 1 to 7 of the paper among them. This file owns matplotlib.

RUN/evaluation/figures/{name}.png, index.json (title and caption of each, in order)
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_shards.labels import BACKGROUND, BODY, LabelTable
from data_shards.records import MODALITIES
from segdiff_dist.evaluation.densities import Clipping, clipping_of
from segdiff_dist.evaluation.pictures import Pictures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

INDEX = "index.json"
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
_SAMPLES_OF_A_MASK = 4
_NUM_NEAREST = 4
_NAMES_OF_PAIRS = {
    "dice_mask_real": "mask and prediction on the real image",
    "dice_mask_gen": "mask and prediction on the generated image",
}
_COLOURS_OF_PAIRS = {"dice_mask_real": REAL_COLOUR, "dice_mask_gen": GENERATED_COLOUR}


@dataclass(frozen=True)
class Figure:
    """A drawn figure: its file in the figures folder, and what stands above and below it."""

    file: str
    title: str
    caption: str


def draw_figures(run: Path, *, amos_root: Path | None = None, progress: bool = False) -> list[Figure]:
    """Draw all figures that the evaluated `run` has material for, into RUN/evaluation/figures.

    `amos_root`: the archive that the shards were made from; only with it are intensities outside the window seen.
    """
    import matplotlib as mpl
    from matplotlib import pyplot as plt
    from tqdm import tqdm

    folder = run / "evaluation" / "figures"
    partial = folder.with_name("figures.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    summary = json.loads((run / "evaluation" / "summary.json").read_text(encoding="utf-8"))
    pictures = Pictures.open(run)
    drawn: list[Figure] = []
    # A canvas of its own and no global backend: a notebook that calls this keeps its windows.
    with mpl.rc_context(_STYLE), plt.ioff():
        for draw in tqdm(
            _all_figures(pictures, summary, amos_root), desc="figures", unit="figure", disable=not progress
        ):
            result = draw()
            if result is not None:
                canvas, figure = result
                canvas.savefig(partial / figure.file, dpi=_DPI, bbox_inches="tight", pad_inches=0.08)
                drawn.append(figure)
    (partial / INDEX).write_text(json.dumps([asdict(figure) for figure in drawn], indent=1), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return drawn


Drawn = tuple["Canvas", Figure] | None


def _all_figures(pictures: Pictures, summary: dict[str, Any], amos_root: Path | None) -> list[Callable[[], Drawn]]:
    across = [(s, t) for s in MODALITIES for t in MODALITIES if s != t]
    return [
        *(lambda m=m: gallery(pictures, m) for m in MODALITIES),
        lambda: dice_by_organ(summary),
        lambda: diversity(pictures),
        lambda: cross_modality(pictures),
        *(lambda s=s, t=t: two_modalities(pictures, s, t) for s, t in across),
        lambda: nearest_training(pictures, summary),
        lambda: grey_values(summary["grey_values"]),
        lambda: clipping({m: clipping_of(pictures.shards, m, amos_root) for m in MODALITIES}),
    ]


def gallery(pictures: Pictures, modality: str) -> Drawn:
    """Real image, mask, generated image and the segmenter's labels on it (the paper's Figures 2 and 3)."""
    items = pictures.gallery(modality)
    if not items:
        return None
    canvas, axes = _tiles(len(items), 4, ("real image", "mask", "generated", "predicted on generated"))
    for row, i in zip(axes, items, strict=True):
        _show_grey(row[0], pictures.real(i), pictures.describe(i))
        _show_labels(row[1], pictures.mask(i), pictures.label_table)
        _show_grey(row[2], pictures.generated(i))
        _show_labels(row[3], pictures.predicted(i), pictures.label_table)
        _note(row[3], f"Dice {pictures.rows['dice_mask_gen'][i]:.2f}")
    _legend(canvas, pictures.label_table, [pictures.mask(i) for i in items] + [pictures.predicted(i) for i in items])
    caption = (
        "Samples at the lower quartile, the median and the upper quartile of Dice(mask, prediction on generated), of "
        "different patients where there are enough; not picked by eye. Paper: Figures 2 and 3."
    )
    return canvas, Figure(f"gallery_{modality.lower()}.png", f"{modality}: real and generated", caption)


def diversity(pictures: Pictures) -> Drawn:
    """Several images of one mask, and where they differ (Figure 4)."""
    groups = pictures.several_of_a_mask(_SAMPLES_OF_A_MASK)
    if not groups:
        return None
    num_samples = max(map(len, groups))
    titles = ("mask", *(f"sample {k + 1}" for k in range(num_samples)), "pixel std")
    canvas, axes = _tiles(len(groups), num_samples + 2, titles)
    stds = [np.stack([pictures.generated(i) for i in items]).astype(float).std(axis=0, ddof=1) for items in groups]
    top = max(float(np.percentile(std, 99.5)) for std in stds)
    for row, items, std in zip(axes, groups, stds, strict=True):
        _show_labels(row[0], pictures.mask(items[0]), pictures.label_table, pictures.describe(items[0]))
        for ax, i in zip(row[1:], items, strict=False):
            _show_grey(ax, pictures.generated(i))
        shown = row[-1].imshow(std, cmap="magma", vmin=0, vmax=max(top, 1.0))
        bar = canvas.colorbar(shown, ax=row[-1], fraction=0.046, pad=0.03)
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=7, length=0)
        bar.ax.grid(False)
    _legend(canvas, pictures.label_table, [pictures.mask(items[0]) for items in groups])
    caption = (
        "Images generated from the same mask with different noise, and the standard deviation of each pixel over them "
        "in grey values (0 to 255): what the mask does not fix. The mask shown is the one with the median spread of "
        "its modality. Paper: Figure 4."
    )
    return canvas, Figure("diversity.png", "Diversity: one mask, several images", caption)


def nearest_training(pictures: Pictures, summary: dict[str, Any]) -> Drawn:
    """Generated images beside the training images that they resemble most."""
    found = summary["trust"].get("memorisation", {"nearest": []})["nearest"][:_NUM_NEAREST]
    if not found:
        return None
    canvas, axes = _tiles(len(found), 3, ("generated", "nearest in pixels", "nearest in features"))
    for row, told in zip(axes, found, strict=True):
        _show_grey(row[0], pictures.generated(told["item_id"]), pictures.describe(told["item_id"]))
        _note(row[0], "suspect" if told["suspect"] else "")
        for ax, space in zip(row[1:], ("pixels", "segmenter"), strict=True):
            _show_grey(ax, pictures.slice_image(told[f"training_row_{space}"]))
    caption = "Suspects first, then the nearest in pixels; a suspect is nearer than 99 % of unseen real images are."
    return canvas, Figure("nearest_training.png", "The training images that are nearest", caption)


def cross_modality(pictures: Pictures) -> Drawn:
    """An image of the other modality from a slice's mask (Figure 5)."""
    items = [i for s in MODALITIES for t in MODALITIES if s != t for i in pictures.across(s, t, 2)]
    if not items:
        return None
    canvas, axes = _tiles(len(items), 4, ("source image", "mask", "generated", "predicted on generated"))
    for row, i in zip(axes, items, strict=True):
        _show_grey(row[0], pictures.real(i), pictures.describe(i))
        _note(row[0], str(pictures.rows["source_modality"][i]))
        _show_labels(row[1], pictures.mask(i), pictures.label_table)
        _show_grey(row[2], pictures.generated(i))
        _note(row[2], str(pictures.rows["target_modality"][i]))
        _show_labels(row[3], pictures.predicted(i), pictures.label_table)
        _note(row[3], f"Dice {pictures.rows['dice_mask_gen'][i]:.2f}")
    _legend(canvas, pictures.label_table, [pictures.mask(i) for i in items] + [pictures.predicted(i) for i in items])
    caption = (
        "The mask of a slice of one modality, drawn in the other. There is no real counterpart, so only the mask can "
        "judge. Paper: Figure 5."
    )
    return canvas, Figure("cross_modality.png", "Cross-modality", caption)


def two_modalities(pictures: Pictures, source: str, target: str) -> Drawn:
    """Original, mask, two images of the same modality and two of the other (Figures 6 and 7)."""
    found = [(i, pictures.both_modalities(i, 2)) for i in pictures.across(source, target, 3)]
    rows = [(i, own, other) for i, (own, other) in found if own and other]
    if not rows:
        return None
    num_own = max(len(own) for _, own, _ in rows)
    num_other = max(len(other) for _, _, other in rows)
    titles = ("original", "mask", *[f"generated {source}"] * num_own, *[f"generated {target}"] * num_other)
    canvas, axes = _tiles(len(rows), 2 + num_own + num_other, titles)
    for row, (i, own, other) in zip(axes, rows, strict=True):
        _show_grey(row[0], pictures.real(i), pictures.describe(i))
        _show_labels(row[1], pictures.mask(i), pictures.label_table)
        for ax, j in zip(row[2 : 2 + num_own], own, strict=False):
            _show_grey(ax, pictures.generated(j))
        for ax, j in zip(row[2 + num_own :], other, strict=False):
            _show_grey(ax, pictures.generated(j))
    _legend(canvas, pictures.label_table, [pictures.mask(i) for i, _, _ in rows])
    caption = f"From left to right: original {source}, its mask, and images of either modality made from that mask. "
    figure = "6" if source == "CT" else "7"
    name = f"modalities_from_{source.lower()}.png"
    return canvas, Figure(name, f"Both modalities from {source} masks", f"{caption}Paper: Figure {figure}.")


def dice_by_organ(summary: dict[str, Any]) -> Drawn:
    """Dice of every organ on real and on generated images, with intervals over patients."""
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    panels = summary["by_modality_organ"]
    # What only a prediction holds has no mask to be judged by.
    names = [name for name, entries in summary["by_organ"].items() if "dice_mask_gen" in entries]
    if not names:
        return None
    size = (1.6 + 3.6 * len(panels), 1.1 + 0.34 * len(names))
    canvas, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False)
    for ax, (modality, organs) in zip(axes[0], panels.items(), strict=True):
        for position, name in enumerate(names):
            _dice_bars(ax, position, organs[name])
        ax.set(title=modality, xlim=(0, 1), xlabel="Dice")
        ax.grid(axis="y", visible=False)
        ax.tick_params(axis="y", length=0)
    axes[0][0].set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes[0][0].set_ylim(len(names) - 0.5, -0.5)
    canvas.tight_layout(rect=(0, 0.35 / size[1], 1, 1))
    handles = [Patch(color=colour, label=_NAMES_OF_PAIRS[pair]) for pair, colour in _COLOURS_OF_PAIRS.items()]
    canvas.legend(handles=handles, loc="lower center", ncols=2, fontsize=8)
    caption = (
        "Mean over the samples whose mask holds the organ; whiskers are 95 % intervals over patients. A bar without "
        "whiskers rests on one patient."
    )
    return canvas, Figure("dice_by_organ.png", "Dice by organ", caption)


def _dice_bars(ax: Axes, position: int, entries: dict[str, Any]) -> None:
    """Two bars, real above generated, or a word where the organ does not occur."""
    if "dice_mask_gen" not in entries:
        ax.text(0.01, position, "not in these samples", va="center", fontsize=7, color="#7b8794")
    for offset, (pair, colour) in zip((-0.19, 0.19), _COLOURS_OF_PAIRS.items(), strict=True):
        entry = entries.get(pair)
        if entry is None:
            continue
        value = entry["value"]
        ax.barh(position + offset, value, height=0.36, color=colour)
        if entry["ci95"] is not None:
            low, high = entry["ci95"]
            errors = [[max(value - low, 0)], [max(high - value, 0)]]
            ax.errorbar(value, position + offset, xerr=errors, color="#1f2933", lw=0.9, capsize=1.8)
        if value < 0.02:
            end = max(entry["ci95"] or (value,))
            ax.text(end + 0.012, position + offset, f"{value:.2f}", va="center", fontsize=6.5, color=colour)


def grey_values(by_modality: dict[str, dict[str, list[int]]]) -> Drawn:
    """How often each grey value occurs in real and in generated images."""
    from matplotlib import pyplot as plt

    if not by_modality:
        return None
    canvas, axes = plt.subplots(1, len(by_modality), figsize=(1 + 3.9 * len(by_modality), 2.9), squeeze=False)
    for ax, (modality, sides) in zip(axes[0], by_modality.items(), strict=True):
        for side, colour, label in (("real", REAL_COLOUR, "real"), ("gen", GENERATED_COLOUR, "generated")):
            counts = np.array(sides[side], dtype=float)
            share = counts.reshape(128, 2).sum(axis=1) / counts.sum() / 2
            ax.stairs(share, np.arange(0, 257, 2), color=colour, lw=1.4, label=label)
        ax.set(title=modality, xlabel="grey value", yscale="log", xlim=(0, 256))
    axes[0][0].set_ylabel("density (log)")
    axes[0][0].legend()
    canvas.tight_layout()
    caption = "Grey values of the real images and of the images generated from their masks, headline samples only."
    return canvas, Figure("grey_values.png", "Grey values, real and generated", caption)


def clipping(densities: dict[str, Clipping | None]) -> Drawn:
    """Intensity density before and after clipping, by modality (Figure 1)."""
    from matplotlib import pyplot as plt

    found = {modality: density for modality, density in densities.items() if density is not None}
    if not found:
        return None
    canvas, axes = plt.subplots(len(found), 2, figsize=(8.2, 0.4 + 2.35 * len(found)), squeeze=False)
    for (before, after), (modality, density) in zip(axes, found.items(), strict=True):
        colour = MODALITY_COLOURS[modality]
        for ax, one in ((before, density.before), (after, density.after)):
            ax.stairs(one.values, one.edges, fill=True, color=colour, alpha=0.3)
            ax.stairs(one.values, one.edges, color=colour, lw=1.2)
            ax.set_yscale("log")
        before.axvspan(*density.window, color="#cbd2d9", alpha=0.45, lw=0, zorder=0)
        source = "volumes" if density.from_volumes else "stored slices mapped back"
        before.set_title(f"{modality} before clipping ({source})")
        before.set_xlabel("HU" if modality == "CT" else "scanner units")
        before.set_ylabel("density (log)")
        after.set_title(f"{modality} after clipping")
        after.set(xlabel="grey value", xlim=(0, 256))
    canvas.tight_layout()
    cases = ", ".join(case for density in found.values() for case in density.case_ids)
    caption = f"The shaded range is what is kept. Cases: {cases}. Paper: Figure 1."
    if not all(density.from_volumes for density in found.values()):
        caption += " Without the archive (amos_root) values outside the window are not seen here."
    return canvas, Figure("clipping.png", "Intensities before and after clipping", caption)


def organ_colour(name: str) -> str:
    """The fixed colour of a class; one drawn from its name for classes beyond the palette."""
    if name in ORGAN_COLOURS:
        return ORGAN_COLOURS[name]
    from matplotlib.colors import hsv_to_rgb, to_hex

    digest = hashlib.sha256(name.encode()).digest()
    return str(to_hex(hsv_to_rgb((digest[0] / 256, 0.45 + digest[1] / 640, 0.7 + digest[2] / 1024))))


def _tiles(num_rows: int, num_columns: int, titles: Sequence[str]) -> tuple[Canvas, np.ndarray]:
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


def _show_grey(ax: Axes, image_HW: np.ndarray, label: str | None = None) -> None:
    ax.imshow(image_HW, cmap="gray", vmin=0, vmax=255)
    if label is not None:
        ax.set_ylabel(label, fontsize=8)


def _show_labels(ax: Axes, labels_HW: np.ndarray, table: LabelTable, label: str | None = None) -> None:
    from matplotlib.colors import to_rgb

    palette = np.array([to_rgb(organ_colour(name)) for name in table.names])
    ax.imshow(palette[labels_HW], interpolation="nearest")
    if label is not None:
        ax.set_ylabel(label, fontsize=8)


def _note(ax: Axes, text: str) -> None:
    box = {"boxstyle": "round,pad=0.25", "facecolor": "#000000", "alpha": 0.55, "linewidth": 0}
    ax.text(0.03, 0.97, text, transform=ax.transAxes, va="top", fontsize=7, color="white", bbox=box)


def _legend(canvas: Canvas, table: LabelTable, label_maps: Sequence[np.ndarray]) -> None:
    from matplotlib.patches import Patch

    present = sorted(set(np.concatenate([np.unique(labels) for labels in label_maps]).tolist()))
    names = [table.names[i] for i in present if table.names[i] != BACKGROUND]
    handles = [Patch(color=organ_colour(name), label=name.replace("_", " ")) for name in names]
    columns = max(2, int(canvas.get_figwidth() / 1.45))
    if handles:
        canvas.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=7, handlelength=1.0)
