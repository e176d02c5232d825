"""Figures that show numbers: by organ, by grey value."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from data_shards.labels import shown_name
from data_shards.modalities import MODALITIES, in_order
from segdiff_dist.evaluation.measure.segmenter_check import WEAK_DICE, weakness
from segdiff_dist.evaluation.metrics.densities import Clipping
from segdiff_dist.evaluation.report.figure_style import (
    GENERATED_COLOUR,
    REAL_COLOUR,
    Drawn,
    Figure,
    modality_colour,
    plain,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NAMES_OF_PAIRS = {
    "dice_mask_real": "mask and prediction on the real image",
    "dice_mask_gen": "mask and prediction on the generated image",
}
_COLOURS_OF_PAIRS = {"dice_mask_real": REAL_COLOUR, "dice_mask_gen": GENERATED_COLOUR}
_COLOURS_OF_SIDES = {"real": REAL_COLOUR, "gen": GENERATED_COLOUR}


def dice_by_organ(summary: dict[str, Any]) -> Drawn:
    """Dice of every organ on real and on generated images, with intervals over patients."""
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    panels = summary["by_modality_organ"]
    # An organ that only a prediction holds has no mask to compare with.
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
    axes[0][0].set_yticks(range(len(names)), [plain(shown_name(name)) for name in names])
    axes[0][0].set_ylim(len(names) - 0.5, -0.5)
    canvas.tight_layout(rect=(0, 0.35 / size[1], 1, 1))
    handles = [Patch(color=colour, label=_NAMES_OF_PAIRS[pair]) for pair, colour in _COLOURS_OF_PAIRS.items()]
    canvas.legend(handles=handles, loc="lower center", ncols=2, fontsize=8)
    caption = (
        "Dice of each organ: the mask against the segmenter's labels on the real image, and against its labels on "
        "the image generated from the mask; mean over the samples whose mask holds the organ. Whiskers are 95 % "
        "bootstrap intervals over patients; a bar without whiskers is of one patient. Hatched: the segmenter fails "
        f"on real images (Dice below {WEAK_DICE}, or an interval that includes it), so that the bar may show its "
        "failure rather than the denoiser's."
    )
    return canvas, Figure("dice_by_organ.png", "Dice by organ", caption, "organs")


def _dice_bars(ax: Axes, position: int, entries: dict[str, Any]) -> None:
    """Two bars, real above generated, or a word where the organ does not occur."""
    if "dice_mask_gen" not in entries:
        ax.text(0.01, position, "not in these samples", va="center", fontsize=7, color="#7b8794")
    for offset, (pair, colour) in zip((-0.19, 0.19), _COLOURS_OF_PAIRS.items(), strict=True):
        entry = entries.get(pair)
        if entry is None:
            continue
        value = entry["value"]
        if pair == "dice_mask_gen" and weakness(entries):
            ax.barh(position + offset, value, height=0.36, color="#e4e7eb", hatch="////", edgecolor="#9aa5b1", lw=0)
        else:
            ax.barh(position + offset, value, height=0.36, color=colour)
        if entry["ci95"] is not None:
            low, high = entry["ci95"]
            errors = [[max(value - low, 0)], [max(high - value, 0)]]
            ax.errorbar(value, position + offset, xerr=errors, color="#1f2933", lw=0.9, capsize=1.8)
        if value < 0.02:
            end = max(entry["ci95"] or (value,))
            ax.text(end + 0.012, position + offset, f"{value:.2f}", va="center", fontsize=6.5, color=colour)


def intensity_by_organ(summary: dict[str, Any], modality: str) -> Drawn:
    """Mean and spread of HU, or of grey values, inside each organ of the mask, on real and on generated images."""
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D

    of_modality = summary["by_modality_organ"].get(modality, {})
    in_hu = any("hu_mean_gen" in entries for entries in of_modality.values())
    kind, unit = ("hu", "HU") if in_hu else ("grey", "grey values (0 to 255)")
    organs = {n: e for n, e in of_modality.items() if f"{kind}_mean_gen" in e}
    if not organs:
        return None
    canvas, ax = plt.subplots(figsize=(7.4, 1.2 + 0.36 * len(organs)))
    colours = {s: c for s, c in _COLOURS_OF_SIDES.items() if any(f"{kind}_mean_{s}" in e for e in organs.values())}
    for position, entries in enumerate(organs.values()):
        for offset, (side, colour) in zip((-0.17, 0.17), _COLOURS_OF_SIDES.items(), strict=True):
            if f"{kind}_mean_{side}" not in entries:
                continue  # no real images are known, or none of this organ
            mean, std = entries[f"{kind}_mean_{side}"], entries[f"{kind}_std_{side}"]["value"]
            at, value = position + offset, mean["value"]
            ax.plot([value - std, value + std], [at, at], color=colour, lw=4, alpha=0.35, solid_capstyle="butt")
            if mean["ci95"] is not None:
                ax.plot(mean["ci95"], [at, at], color=colour, lw=1.6)
            ax.plot(value, at, "o", color=colour, ms=4)
    ax.set_yticks(range(len(organs)), [plain(shown_name(name)) for name in organs])
    ax.set(xlabel=unit, ylim=(len(organs) - 0.5, -0.5))
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)
    canvas.tight_layout(rect=(0, 0.35 / canvas.get_figheight(), 1, 1))
    names = {"real": "real", "gen": "generated"}
    handles = [Line2D([], [], color=c, marker="o", ms=4, label=names[side]) for side, c in colours.items()]
    canvas.legend(handles=handles, loc="lower center", ncols=2, fontsize=8)
    shown = "real and generated" if "real" in colours else "generated"
    caption = (
        f"{unit[0].upper()}{unit[1:]} inside each organ's mask on {shown} {modality} images. Points: the "
        "mean, averaged over images; thin lines: its 95 % bootstrap interval over patients; broad bars: one standard "
        "deviation inside the organ to either side."
    )
    if in_hu:
        caption += " From 8-bit grey values, in which HU outside the window are clipped."
    title = f"{modality}: {unit.split(' (', maxsplit=1)[0]} inside each organ, {shown}"
    name = f"{kind}_by_organ{'' if modality in MODALITIES else f'_{modality.lower()}'}.png"
    return canvas, Figure(name, title, caption, "hu")


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
    caption = (
        "How often each grey value (0 to 255) occurs in the real and in the generated images, on a logarithmic axis; "
        "samples without a real counterpart count only where no sample has one."
    )
    return canvas, Figure("grey_values.png", "Grey values, real and generated", caption, "intensities")


def clipping(densities: dict[str, Clipping | None]) -> Drawn:
    """Intensity density before and after clipping, by modality (Figure 1)."""
    from matplotlib import pyplot as plt

    present = {modality: density for modality, density in densities.items() if density is not None}
    if not present:
        return None
    canvas, axes = plt.subplots(len(present), 2, figsize=(8.2, 0.4 + 2.35 * len(present)), squeeze=False)
    for (before, after), (modality, density) in zip(axes, present.items(), strict=True):
        colour = modality_colour(modality)
        for ax, one in ((before, density.before), (after, density.after)):
            ax.stairs(one.values, one.edges, fill=True, color=colour, alpha=0.3)
            ax.stairs(one.values, one.edges, color=colour, lw=1.2)
            ax.set_yscale("log")
        before.axvspan(*density.window, color="#cbd2d9", alpha=0.45, lw=0, zorder=0)
        source = "volumes" if density.from_volumes else "stored slices mapped back"
        before.set_title(f"{modality} before clipping ({source})")
        before.set_xlabel("HU" if density.in_hu else "scanner units")
        before.set_ylabel("density (log)")
        after.set_title(f"{modality} after clipping")
        after.set(xlabel="grey value", xlim=(0, 256))
    canvas.tight_layout()
    cases = ", ".join(case for density in present.values() for case in density.case_ids)
    caption = (
        "Density of the intensities before and after clipping, by modality. The shaded range is the window that is "
        f"kept. Cases: {cases}. Counterpart in Hunecke and Chen: Figure 1."
    )
    if not all(density.from_volumes for density in present.values()):
        caption += " Values outside the window are not shown: they need the archive (amos_root)."
    return canvas, Figure("clipping.png", "Intensities before and after clipping", caption, "intensities")


def usefulness(downstream: dict[str, Any] | None) -> Drawn:
    """Dice on real slices of segmenters trained on real, on generated and on both, over the number of real patients."""
    from matplotlib import pyplot as plt

    if downstream is None:
        return None
    arms = downstream["arms"]
    groups = {"all": [arm["dice"] for arm in arms]}
    named = in_order(m for arm in arms for m in arm["by_modality"])
    modalities = [m for m in named if all(m in arm["by_modality"] for arm in arms)]
    if len(modalities) > 1:
        groups |= {m: [arm["by_modality"][m] for arm in arms] for m in modalities}
    canvas, axes = plt.subplots(1, len(groups), figsize=(0.9 + 3.1 * len(groups), 3.1), sharey=True, squeeze=False)
    for ax, (group, entries) in zip(axes[0], groups.items(), strict=True):
        for generated, label, colour in ((False, "real", REAL_COLOUR), (True, "real + generated", GENERATED_COLOUR)):
            chosen = [k for k, arm in enumerate(arms) if arm["real_fraction"] and arm["generated"] == generated]
            _curve(ax, [arms[k]["num_real_patients"] for k in chosen], [entries[k] for k in chosen], label, colour)
        for arm, entry in zip(arms, entries, strict=True):
            if not arm["real_fraction"]:
                ax.axhline(entry["value"], color="#b7791f", lw=1.2, ls="--", label="generated alone")
        counts = sorted({arm["num_real_patients"] for arm in arms if arm["real_fraction"]})
        ax.set(title=group, xlabel="real patients", xscale="log")
        ax.set_xticks(counts, [str(count) for count in counts])
        ax.minorticks_off()
        ax.margins(x=0.12)
    axes[0][0].set_ylabel("Dice on real slices")
    axes[0][-1].legend(loc="best")
    canvas.tight_layout()
    caption = (
        "Dice of the mask and the prediction on real test slices, of segmenters trained on real slices, on real and "
        "generated ones, and on generated ones alone, over the number of real patients in training. Bars are 95 % "
        "bootstrap intervals over test patients of the mean over seeds, small dots the seeds."
    )
    return canvas, Figure("downstream.png", "What generated images bring a segmenter", caption, "downstream")


def _curve(ax: Axes, counts: list[int], entries: list[dict[str, Any]], label: str, colour: str) -> None:
    # Side by side, since both curves have the same numbers of patients.
    at = [count * (0.97 if label == "real" else 1.03) for count in counts]
    values = [entry["value"] for entry in entries]
    ends = [entry["ci95"] or (entry["value"],) * 2 for entry in entries]
    errors = [[max(v - e[0], 0) for v, e in zip(values, ends, strict=True)]]
    errors += [[max(e[1] - v, 0) for v, e in zip(values, ends, strict=True)]]
    ax.errorbar(at, values, yerr=errors, color=colour, lw=1.4, marker="o", ms=4, capsize=2.5, label=label)
    for x, entry in zip(at, entries, strict=True):
        ax.scatter([x] * len(entry["by_seed"]), entry["by_seed"], color=colour, s=6, alpha=0.5, linewidths=0)
