"""Sharpness of generated images against real ones: columns of samples.parquet, entries of summary.json, messages.

The mathematics is in segdiff_dist/spectra.py. Dimensions: B batch, F bands, K label ids, P patients, R
bootstrap samples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from segdiff_dist.evaluation.metrics.air import lattice_message
from segdiff_dist.evaluation.metrics.definitions import DEFINITIONS, wavelengths
from segdiff_dist.evaluation.metrics.estimates import Estimate, bootstrap_counts
from segdiff_dist.evaluation.metrics.sums import Interval, PatientSums, SumKey
from segdiff_dist.spectra import (
    BAND_NAMES,
    FEWEST_PIXELS_A_SIDE,
    FEWEST_PIXELS_INSIDE,
    band_powers,
    mean_texture,
    ratio,
    sharpness,
    texture_stds,
)

if TYPE_CHECKING:
    from data_shards.labels import LabelTable

SHARPNESS_BANDS = tuple(f"sharpness_{name}" for name in BAND_NAMES)
SHARPNESS_METRICS = ("sharpness", *SHARPNESS_BANDS, "texture")
_SIDES = ("real", "gen")
# These need the generated image only, and are measured also where it has no real counterpart.
GENERATED_COLUMNS = (*(f"power_gen_{band}" for band in BAND_NAMES), "texture_gen")
# Blur lowers these and noise raises them. The coarser bands are shades and large organs.
_FINE_BANDS = SHARPNESS_BANDS[2:]
# A ratio below or above these gets a message: half of the real images' power, or twice as much.
_TOO_LITTLE, _TOO_MUCH = 0.5, 2.0

Entry = dict[str, Any]


def sharpness_columns(table: LabelTable) -> list[str]:
    """Names of the columns of samples.parquet, in order."""
    organs = [table.names[i] for i in table.organ_ids]
    names = ["sharpness", *(f"power_{side}_{band}" for side in _SIDES for band in BAND_NAMES)]
    names += [f"texture_{side}" for side in _SIDES]
    return names + [f"texture_{side}/{organ}" for side in _SIDES for organ in organs]


def measure(
    real_BHW: np.ndarray, generated_BHW: np.ndarray, mask_BHW: np.ndarray, table: LabelTable
) -> dict[str, np.ndarray]:
    """Float64 [B] by column, of uint8 images and the masks that the generated ones were made from.

    `sharpness` is one value an image. `texture_SIDE` is the mean over organs of `texture_SIDE/ORGAN`, the standard
    deviation of fine detail inside. NaN where there is nothing to measure.
    """
    columns: dict[str, np.ndarray] = {}
    powers = dict(zip(_SIDES, band_powers(real_BHW, generated_BHW), strict=True))
    columns["sharpness"] = sharpness(ratio(powers["gen"], powers["real"]))
    stds = texture_stds(mask_BHW, (real_BHW, generated_BHW), table.num_classes)
    for side, std_BK in zip(_SIDES, stds, strict=True):
        columns |= {f"power_{side}_{band}": powers[side][:, f] for f, band in enumerate(BAND_NAMES)}
        columns[f"texture_{side}"] = mean_texture(std_BK, table.organ_ids)
        columns |= {f"texture_{side}/{table.names[i]}": std_BK[:, i] for i in table.organ_ids}
    return columns


def sharpness_entries(sums: PatientSums, which: Callable[[SumKey], bool], interval: Interval) -> dict[str, Entry]:
    """Entries of SHARPNESS_METRICS over the samples that `which` selects, with intervals over patients.

    A ratio is one of sums over the samples. So an image without any detail does not make it infinite.
    """
    pairs = {
        metric: (f"power_gen_{band}", f"power_real_{band}")
        for metric, band in zip(SHARPNESS_BANDS, BAND_NAMES, strict=True)
    }
    pairs["texture"] = ("texture_gen", "texture_real")
    ratios = _ratios(sums, pairs, which, interval)
    bands = [ratios[metric] for metric in SHARPNESS_BANDS if metric in ratios]
    if bands:
        one, resampled_RF = bands[0][0], np.stack([resampled_R for _, resampled_R in bands], axis=1)
        value = float(sharpness(np.array([estimate.value for estimate, _ in bands])))
        overall = Estimate(value, _ends(sharpness(resampled_RF)), one.num_samples, one.num_patients)
        ratios = {"sharpness": (overall, np.empty(0))} | ratios
    num_samples = sums.num_samples(which)
    return {
        name: _entry(name, estimate) | {"num_left_out": num_samples - estimate.num_samples}
        for name, (estimate, _) in ratios.items()
    }


def unpaired_entries(
    sums: PatientSums, generated: Callable[[SumKey], bool], real: Callable[[SumKey], bool]
) -> dict[str, Entry]:
    """SHARPNESS_METRICS of generated images against real ones of other patients: ratios of means, without intervals."""
    values: dict[str, float] = {}
    counts: dict[str, int] = {}
    for metric, column in zip((*SHARPNESS_BANDS, "texture"), GENERATED_COLUMNS, strict=True):
        sums_P1, counts_P1 = sums.by_patient([column], generated)
        real_sums_P1, real_counts_P1 = sums.by_patient([column.replace("_gen", "_real")], real)
        mean, real_mean = ratio(sums_P1.sum(), counts_P1.sum()), ratio(real_sums_P1.sum(), real_counts_P1.sum())
        values[metric], counts[metric] = float(ratio(mean, real_mean)), int(counts_P1.sum())
    values = {"sharpness": float(sharpness(np.array([values[band] for band in SHARPNESS_BANDS])))} | values
    counts["sharpness"] = max(counts[band] for band in SHARPNESS_BANDS)
    num_patients = len(sums.patients(generated))
    return {
        metric: _entry(metric, Estimate(value, None, counts[metric], num_patients))
        for metric, value in values.items()
        if np.isfinite(value)
    }


def unpaired_organ_entries(
    sums: PatientSums, organ: str, generated: Callable[[SumKey], bool], real: Callable[[SumKey], bool]
) -> dict[str, Entry]:
    """`texture` of an organ in generated images against real ones of other patients: a ratio of means."""
    sums_P1, counts_P1 = sums.by_patient([f"texture_gen/{organ}"], generated)
    real_sums_P1, real_counts_P1 = sums.by_patient([f"texture_real/{organ}"], real)
    mean, real_mean = ratio(sums_P1.sum(), counts_P1.sum()), ratio(real_sums_P1.sum(), real_counts_P1.sum())
    value = float(ratio(mean, real_mean))
    if not np.isfinite(value):
        return {}
    return {"texture": _entry("texture", Estimate(value, None, int(counts_P1.sum()), int((counts_P1 > 0).sum())))}


def organ_entries(
    sums: PatientSums, organ: str, which: Callable[[SumKey], bool], interval: Interval
) -> dict[str, Entry]:
    """`texture` of an organ; empty if no sample shows enough of it. n counts the samples that do."""
    pairs = {"texture": (f"texture_gen/{organ}", f"texture_real/{organ}")}
    return {name: _entry(name, estimate) for name, (estimate, _) in _ratios(sums, pairs, which, interval).items()}


def _ratios(
    sums: PatientSums, pairs: dict[str, tuple[str, str]], which: Callable[[SumKey], bool], interval: Interval
) -> dict[str, tuple[Estimate, np.ndarray]]:
    """Ratios of two columns' sums by name, each with its values [R] over bootstrap samples of the patients.

    The values are NaN for a single patient. A ratio is left out if the second sum is not positive."""
    names = list(dict.fromkeys(name for pair in pairs.values() for name in pair))
    sums_PC, counts_PC = sums.by_patient(names, which)
    column = {name: c for c, name in enumerate(names)}
    ratios = {}
    for metric, (numerator, denominator) in pairs.items():
        a, b = column[numerator], column[denominator]
        has_P = counts_PC[:, b] > 0
        a_P, b_P, counts_P = sums_PC[has_P, a], sums_PC[has_P, b], counts_PC[has_P, b]
        if b_P.sum() <= 0:
            continue
        resampled_R = np.full(interval.resamples, np.nan)
        if len(b_P) >= 2:
            draws_RP = bootstrap_counts(len(b_P), interval.resamples, interval.seed)
            resampled_R = ratio(draws_RP @ a_P, draws_RP @ b_P)
        estimate = Estimate(float(a_P.sum() / b_P.sum()), _ends(resampled_R), int(counts_P.sum()), len(b_P))
        ratios[metric] = (estimate, resampled_R)
    return ratios


def _ends(resampled_R: np.ndarray) -> tuple[float, float] | None:
    """The 95 % interval of the values over bootstrap samples; None if no value is finite."""
    finite = resampled_R[np.isfinite(resampled_R)]
    if not len(finite):
        return None
    low, high = np.percentile(finite, (2.5, 97.5))
    return float(low), float(high)


def _entry(name: str, estimate: Estimate) -> Entry:
    return {
        "value": estimate.value,
        "ci95": None if estimate.interval is None else list(estimate.interval),
        "n": estimate.num_samples,
        "num_patients": estimate.num_patients,
        "unit": "1",
        "better": DEFINITIONS[name].better,
    }


def sharpness_messages(entries: dict[str, Entry]) -> list[str]:
    """Sentences that say where detail is missing and where there is too much, and whether there is a lattice.

    `entries` of summary.json by metric.
    """
    messages = []
    bands = {metric: entries[metric]["value"] for metric in SHARPNESS_BANDS if metric in entries}
    for fine, coarse, share in (
        ("blurred", "flatter than real ones", {m: v for m, v in bands.items() if v < _TOO_LITTLE}),
        ("noisier than real ones", "too uneven", {m: v for m, v in bands.items() if v > _TOO_MUCH}),
    ):
        if share:
            what = fine if set(share) & set(_FINE_BANDS) else coarse
            parts = ", ".join(
                f"{_percent(v)} at {wavelengths(SHARPNESS_BANDS.index(m))} pixels" for m, v in reversed(share.items())
            )
            messages.append(
                f"Generated images are {what}: their power as a share of the real images', by wavelength: {parts}."
            )
    if bands and not messages:
        messages.append("Generated images have between half and twice the real images' power at every wavelength.")
    texture = entries.get("texture", {}).get("value")
    if texture is not None:
        messages.append(f"Inside organs, fine texture is {_percent(texture)} of the real images'.")
    return [*messages, *filter(None, [lattice_message(entries)])]


def missing_reason(name: str) -> str:
    """Why one of SHARPNESS_METRICS has no value."""
    if name == "texture":
        return f"no organ has {FEWEST_PIXELS_INSIDE} pixels inside its outline"
    return f"no real image has {FEWEST_PIXELS_A_SIDE} pixels a side without its constant borders, and power in the band"


def _percent(share: float) -> str:
    return f"{share:.1%}" if share < 0.0995 else f"{share:.0%}"
