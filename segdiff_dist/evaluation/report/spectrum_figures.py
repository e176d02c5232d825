"""Power spectra of real and of generated images, one beside the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from segdiff_dist.evaluation.measure.rows import PATIENT
from segdiff_dist.evaluation.metrics.estimates import bootstrap_counts
from segdiff_dist.evaluation.report.figure_style import GENERATED_COLOUR, REAL_COLOUR, Drawn, Figure
from segdiff_dist.evaluation.report.pictures import Pictures
from segdiff_dist.spectra import RINGS, band_powers, ratio

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# A few milliseconds each. More of them would change the curves by less than their intervals.
_MOST_IMAGES = 200
_RESAMPLES = 200


def power_spectra(pictures: Pictures) -> Drawn:
    """Power of real and of generated images over the wavelength, a panel a modality, with intervals over patients."""
    from matplotlib import pyplot as plt

    chosen = {m: items for m in pictures.modalities if (items := _spread(pictures.headline(m)))}
    if not chosen or not pictures.is_paired:
        return None
    canvas, axes = plt.subplots(1, len(chosen), figsize=(1.0 + 3.7 * len(chosen), 3.3), sharey=True, squeeze=False)
    described = []
    for ax, (modality, items) in zip(axes[0], chosen.items(), strict=True):
        real_BHW, generated_BHW = (np.stack([image(i) for i in items]) for image in (pictures.real, pictures.generated))
        names_N = pictures.rows.get(PATIENT, pictures.rows["case_id"])
        patients = [str(names_N[i]) for i in items]
        sides = zip(band_powers(real_BHW, generated_BHW, RINGS), ("real", "generated"), strict=True)
        for (power_BF, label), colour in zip(sides, (REAL_COLOUR, GENERATED_COLOUR), strict=True):
            _curve(ax, power_BF, patients, label, colour)
        ax.set(title=modality, xscale="log", yscale="log", xlabel="wavelength, pixels (coarse to fine)")
        ax.set_xlim(64, 2)
        ax.set_xticks([64, 32, 16, 8, 4, 2], ["64", "32", "16", "8", "4", "2"])
        ax.minorticks_off()
        num = len(set(patients))
        described.append(f"{len(items)} {modality} images of {num} patient{'' if num == 1 else 's'}")
    axes[0][0].set_ylabel("power, grey values squared")
    axes[0][-1].legend()
    canvas.tight_layout()
    caption = (
        "Radially averaged power spectra of real images and of the images generated from their masks (Durall et al. "
        f"2020): {' and '.join(described)}, evenly spread over the samples; under a Hann window, without constant "
        "borders. Shaded: 95 % bootstrap intervals over patients. Where the generated curve is below the real one, "
        "detail of that size is missing; where it is above, there is too much. White noise is a level line."
    )
    return canvas, Figure("power_spectra.png", "Power spectra, real and generated", caption, "sharpness")


def _spread(items_by_row: dict[int, int]) -> list[int]:
    """At most _MOST_IMAGES items, evenly spread in the order of their slices."""
    items = [items_by_row[row] for row in sorted(items_by_row)]
    step = max(1.0, len(items) / _MOST_IMAGES)
    return [items[int(k * step)] for k in range(min(len(items), _MOST_IMAGES))]


def _curve(ax: Axes, power_BF: np.ndarray, patients: list[str], label: str, colour: str) -> None:
    """Mean power by ring; a band for the interval if there are several patients."""
    known_BF = np.isfinite(power_BF)
    names, patient_B = np.unique(patients, return_inverse=True)
    sums_PF, counts_PF = (np.zeros((len(names), len(RINGS))) for _ in range(2))
    np.add.at(sums_PF, patient_B, np.where(known_BF, power_BF, 0.0))
    np.add.at(counts_PF, patient_B, known_BF)
    mean_F = ratio(sums_PF.sum(axis=0), counts_PF.sum(axis=0))
    shown_F = np.isfinite(mean_F) & (mean_F > 0)
    wavelength_F = np.array([4 / (low + high) for low, high in RINGS])
    ax.plot(wavelength_F[shown_F], mean_F[shown_F], color=colour, lw=1.6, label=label)
    if len(names) >= 2:
        draws_RP = bootstrap_counts(len(names), _RESAMPLES, 0)
        low_F, high_F = np.nanpercentile(
            ratio(draws_RP @ sums_PF[:, shown_F], draws_RP @ counts_PF[:, shown_F]), (2.5, 97.5), axis=0
        )
        ax.fill_between(wavelength_F[shown_F], low_F, high_F, color=colour, alpha=0.2, lw=0)
