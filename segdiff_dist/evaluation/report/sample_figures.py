"""Figures that show samples: pixels, masks and labels side by side. pictures.py chooses the samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from data_shards.modalities import MODALITIES
from segdiff_dist.evaluation.report.figure_style import Drawn, Figure, legend, note, show_grey, show_labels, tiles
from segdiff_dist.evaluation.report.pictures import Pictures

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

_NUM_EXTREME = 2
_SAMPLES_OF_A_MASK = 4
# At least so many images beside their nearest training images; all suspects up to the second number.
_NUM_NEAREST, _MOST_SUSPECTS = 4, 24


def gallery(pictures: Pictures, modality: str) -> Drawn:
    """Real image, mask, generated image and the segmenter's labels on it (the paper's Figures 2 and 3)."""
    items = pictures.gallery(modality)
    if not items:
        return None
    canvas = _samples(pictures, items, [pictures.describe(i) for i in items])
    caption = (
        f"{modality} slices: {_shown(pictures)} Samples are at the lower quartile, the median and the upper quartile "
        "of Dice(mask, prediction on generated), of different patients where there are enough. They are chosen by "
        "rule, not by eye. Counterpart in Hunecke and Chen: Figures 2 and 3."
    )
    return canvas, Figure(f"gallery_{modality.lower()}.png", f"{modality}: real and generated", caption, "images")


def extremes(pictures: Pictures, modality: str) -> Drawn:
    """The samples that follow their masks worst and best, as `gallery` shows them."""
    worst, best = pictures.extremes(modality, _NUM_EXTREME)
    if not worst or not best:
        return None
    labels = [f"{end}\n{pictures.describe(i)}" for end, items in (("worst", worst), ("best", best)) for i in items]
    canvas = _samples(pictures, worst + best, labels)
    caption = (
        f"The {modality} samples with the lowest and with the highest Dice of the mask and the segmenter's labels on "
        f"the generated image, each of another patient where there are enough: {_shown(pictures)}"
    )
    name = f"extremes_{modality.lower()}.png"
    return canvas, Figure(name, f"{modality}: worst and best cases", caption, "images")


def _shown(pictures: Pictures) -> str:
    """What a row of `_samples` shows, for captions."""
    generated = "the mask, the segmenter's labels on the image that was generated from the mask, and that image"
    dice = "with the Dice of labels and mask over the organs of the mask."
    if not pictures.is_paired:
        return f"{generated}, {dice}"
    return (
        f"the real image, the segmenter's labels on it, {generated}, {dice} Where the labels on the real image are "
        "wrong too, the segmenter fails and not the generated image."
    )


def _samples(pictures: Pictures, items: Sequence[int], labels: Sequence[str]) -> Canvas:
    """A row a sample, of the slice's own modality or of the other, `labels` to the left."""
    across = any(pictures.rows["source_modality"][i] != pictures.rows["target_modality"][i] for i in items)
    has_real = pictures.is_paired and not across
    titles: tuple[str, ...] = ("mask", "predicted on generated", "generated")
    if pictures.is_paired:
        titles = ("source image", *titles) if across else ("real image", "predicted on real", *titles)
    canvas, axes = tiles(len(items), len(titles), titles)
    for row, i, label in zip(axes, items, labels, strict=True):
        tile = dict(zip(titles, row, strict=True))
        if pictures.is_paired:
            show_grey(row[0], pictures.real(i))
        show_labels(tile["mask"], pictures.mask(i), pictures.label_table)
        show_grey(tile["generated"], pictures.generated(i))
        show_labels(tile["predicted on generated"], pictures.predicted(i), pictures.label_table)
        note(tile["predicted on generated"], pictures.dice(i))
        row[0].set_ylabel(label, fontsize=8)
        if across:
            note(row[0], str(pictures.rows["source_modality"][i]))
            note(tile["generated"], str(pictures.rows["target_modality"][i]))
        if has_real:
            show_labels(tile["predicted on real"], pictures.predicted(i, "real"), pictures.label_table)
            note(tile["predicted on real"], pictures.dice(i, "real"))
    sides = ("gen", "real") if has_real else ("gen",)
    shown = [pictures.mask(i) for i in items] + [pictures.predicted(i, side) for i in items for side in sides]
    legend(canvas, pictures.label_table, shown)
    return canvas


def diversity(pictures: Pictures) -> Drawn:
    """Several images of one mask, and where they differ (Figure 4)."""
    groups = pictures.several_of_a_mask(_SAMPLES_OF_A_MASK)
    if not groups:
        return None
    num_samples = max(map(len, groups))
    titles = ("mask", *(f"sample {k + 1}" for k in range(num_samples)), "pixel std")
    canvas, axes = tiles(len(groups), num_samples + 2, titles)
    stds = [np.stack([pictures.generated(i) for i in items]).astype(float).std(axis=0, ddof=1) for items in groups]
    top = max(float(np.percentile(std, 99.5)) for std in stds)
    for row, items, std in zip(axes, groups, stds, strict=True):
        show_labels(row[0], pictures.mask(items[0]), pictures.label_table, pictures.describe(items[0]))
        for ax, i in zip(row[1:], items, strict=False):
            show_grey(ax, pictures.generated(i))
        shown = row[-1].imshow(std, cmap="magma", vmin=0, vmax=max(top, 1.0))
        bar = canvas.colorbar(shown, ax=row[-1], fraction=0.046, pad=0.03)
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=7, length=0)
        bar.ax.grid(False)
    legend(canvas, pictures.label_table, [pictures.mask(items[0]) for items in groups])
    caption = (
        "A mask, images generated from it with different noise, and the standard deviation of each pixel over these "
        "images in grey values (0 to 255). "
        "It is large where the mask does not determine the image. The mask shown is the one with the median spread of "
        "its modality. Counterpart in Hunecke and Chen: Figure 4."
    )
    return canvas, Figure("diversity.png", "Diversity: one mask, several images", caption, "trust")


def nearest_training(pictures: Pictures, summary: dict[str, Any]) -> Drawn:
    """Generated images beside the training images that they resemble most."""
    memorisation = summary.get("trust", {}).get("memorisation")
    if memorisation is None or not memorisation["nearest"] or pictures.shards is None:
        return None
    num_shown = min(max(_NUM_NEAREST, memorisation.get("num_suspects", 0)), _MOST_SUSPECTS)
    neighbours, limits = memorisation["nearest"][:num_shown], memorisation["limits"]
    columns = {
        "pixels": "nearest in pixels",
        "segmenter": "nearest in features",
        "copies": "nearest, turned or mirrored",
    }
    # Evaluations of earlier versions did not search for changed copies.
    spaces = [space for space in columns if space in limits]
    canvas, axes = tiles(len(neighbours), 1 + len(spaces), ("generated", *(columns[space] for space in spaces)))
    for row, neighbour in zip(axes, neighbours, strict=True):
        show_grey(row[0], pictures.generated(neighbour["item_id"]), pictures.describe(neighbour["item_id"]))
        if neighbour["suspect"]:
            note(row[0], "suspect")
        for ax, space in zip(row[1:], spaces, strict=True):
            show_grey(ax, pictures.slice_image(neighbour[f"training_row_{space}"]))
            times = f"\n{neighbour[f'distance_{space}'] / limits[space]:.2f} x the limit" if limits[space] else ""
            note(ax, neighbour[f"training_key_{space}"] + times)
    caption = (
        "Generated images, each beside the training images that are nearest to it in pixels, in the segmenter's "
        "features, and among turned and mirrored copies; with the distance as a multiple of the limit, which is the "
        "distance that 99 % of the unseen real images exceed. Suspects of memorisation come first, then the nearest. "
        "A suspect is within the limits in pixels and in features, or within that of turned and mirrored copies."
    )
    return canvas, Figure("nearest_training.png", "The training images that are nearest", caption, "trust")


def cross_modality(pictures: Pictures) -> Drawn:
    """An image of the other modality from a slice's mask (Figure 5)."""
    items = [i for s in pictures.modalities for t in pictures.modalities if s != t for i in pictures.across(s, t, 2)]
    if not items:
        return None
    canvas = _samples(pictures, items, [pictures.describe(i) for i in items])
    caption = (
        "Images of one modality, each generated from the mask of a slice of the other: the source image, "
        "its mask, the generated image, and the segmenter's labels on it with the Dice of labels and mask. Such an "
        "image has no real counterpart, so only its mask can be compared. Counterpart in Hunecke and Chen: Figure 5."
    )
    return canvas, Figure("cross_modality.png", "Cross-modality", caption, "modalities")


def two_modalities(pictures: Pictures, source: str, target: str) -> Drawn:
    """Original, mask, two images of the same modality and two of the other (Figures 6 and 7)."""
    both = [(i, pictures.both_modalities(i, 2)) for i in pictures.across(source, target, 3)]
    rows = [(i, own, other) for i, (own, other) in both if own and other]
    if not rows:
        return None
    num_own = max(len(own) for _, own, _ in rows)
    num_other = max(len(other) for _, _, other in rows)
    titles = ("original", "mask", *[f"generated {source}"] * num_own, *[f"generated {target}"] * num_other)
    canvas, axes = tiles(len(rows), 2 + num_own + num_other, titles)
    for row, (i, own, other) in zip(axes, rows, strict=True):
        show_grey(row[0], pictures.real(i), pictures.describe(i))
        show_labels(row[1], pictures.mask(i), pictures.label_table)
        for ax, j in zip(row[2 : 2 + num_own], own, strict=False):
            show_grey(ax, pictures.generated(j))
        for ax, j in zip(row[2 + num_own :], other, strict=False):
            show_grey(ax, pictures.generated(j))
    legend(canvas, pictures.label_table, [pictures.mask(i) for i, _, _ in rows])
    caption = (
        f"From left to right: a real {source} slice, its mask, images generated in {source} from that mask, and images "
        f"generated in {target} from it."
    )
    name, title = f"modalities_from_{source.lower()}_to_{target.lower()}.png", f"{target} from {source} masks"
    if {source, target} == set(MODALITIES):
        caption += f" Counterpart in Hunecke and Chen: Figure {'6' if source == 'CT' else '7'}."
        name, title = f"modalities_from_{source.lower()}.png", f"Both modalities from {source} masks"
    return canvas, Figure(name, title, caption, "modalities")
