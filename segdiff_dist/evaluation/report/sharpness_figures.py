"""Power of the generated images divided by that of the real ones, by band of spatial frequency."""

from __future__ import annotations

from typing import Any

import numpy as np

from segdiff_dist.evaluation.metrics.definitions import wavelengths
from segdiff_dist.evaluation.metrics.sharpness import SHARPNESS_BANDS
from segdiff_dist.evaluation.report.figure_style import Drawn, Figure, modality_colour

# Smaller ratios are drawn here: the axis is logarithmic.
_LOWEST = 1e-3


def power_by_band(summary: dict[str, Any]) -> Drawn:
    """Power of generated over real images by band, with intervals over patients, a line a modality."""
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    groups = {m: entries for m, entries in summary["by_modality"].items() if any(b in entries for b in SHARPNESS_BANDS)}
    if not groups:
        return None
    canvas, ax = plt.subplots(figsize=(6.6, 3.2))
    ax.axhspan(0.5, 2.0, color="#e4e7eb", lw=0, zorder=0)
    ax.axhline(1.0, color="#6b7683", lw=1.0)
    for k, (modality, entries) in enumerate(groups.items()):
        places = [f for f, band in enumerate(SHARPNESS_BANDS) if band in entries]
        at = np.array(places) + 0.08 * (k - (len(groups) - 1) / 2)
        chosen = [entries[SHARPNESS_BANDS[f]] for f in places]
        values = [max(entry["value"], _LOWEST) for entry in chosen]
        colour = modality_colour(modality)
        ax.plot(at, values, color=colour, marker="o", ms=4.5, lw=1.4, label=modality)
        for x, entry in zip(at, chosen, strict=True):
            if entry["ci95"] is not None:
                ax.plot([x, x], [max(end, _LOWEST) for end in entry["ci95"]], color=colour, lw=1.4)
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_xticks(range(len(SHARPNESS_BANDS)), [wavelengths(f) for f in range(len(SHARPNESS_BANDS))])
    ax.set(xlabel="wavelength, pixels (coarse to fine)", ylabel="power, generated / real")
    ax.legend()
    canvas.tight_layout()
    caption = (
        "Power of the generated images divided by that of the real ones, by wavelength; vertical lines are 95 % "
        "bootstrap intervals over patients. At 1 the detail is that of real images, below 1 it is blurred, above 1 "
        "noisier. Grey: half to twice."
    )
    return canvas, Figure("power_by_band.png", "Power by wavelength, generated over real", caption, "sharpness")
