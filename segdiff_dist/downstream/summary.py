"""From the scores of all trainings to the table: Dice on real slices with intervals, and the gain by generated images.

Dimensions: N real slices that were tested, S seeds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_shards.modalities import in_order
from segdiff_dist.downstream.arms import Arm, Training, patients_of, rows_of
from segdiff_dist.evaluation.metrics.estimates import estimate
from segdiff_dist.evaluation.metrics.sums import Interval

if TYPE_CHECKING:
    from data_shards.store.shards import ShardSet

_PREFIX = "dice/"


@dataclass(frozen=True)
class Scores:
    """Scores of one arm: Dice of every tested slice by every seed, float64 [S, N], by column (`dice`, `dice/ORGAN`)."""

    seeds: tuple[int, ...]
    columns: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Tested:
    """The tested slices: patients and modalities [N]."""

    patient_N: np.ndarray
    modality_N: np.ndarray

    @property
    def modalities(self) -> tuple[str, ...]:
        """Those of the slices."""
        return in_order(self.modality_N.tolist())


def summarise(
    files: Mapping[Training, Path],
    shards: ShardSet,
    real_rows: np.ndarray,
    *,
    num_generated: int,
    interval: Interval,
) -> dict[str, Any]:
    """The part of summary.json that depends on the scores. `files`: scores.parquet by training; `real_rows`: the rows
    of the real set that may be trained on."""
    tested, scores = _read(files)
    arms = [_arm(arm, scores[arm], tested, interval) for arm in scores]
    for entry, arm in zip(arms, scores, strict=True):
        entry |= _sizes(arm, scores[arm].seeds, shards, real_rows, num_generated)
        alone = Arm(arm.real_fraction, generated=False)
        if arm.generated and arm.real_fraction:
            entry["gain"] = _gain(scores[alone], scores[arm], tested, interval)
    num_patients = len(np.unique(tested.patient_N))
    return {"num_tested": len(tested.patient_N), "num_test_patients": num_patients, "arms": arms}


def scalars(summary: dict[str, Any]) -> dict[str, float]:
    """Stable flat names for a tracker: `downstream/real_25_and_generated/dice`, `.../gain`."""
    flat = {}
    for arm in summary["arms"]:
        flat[f"downstream/{arm['name']}/dice"] = arm["dice"]["value"]
        if "gain" in arm:
            flat[f"downstream/{arm['name']}/gain"] = arm["gain"]["dice"]["value"]
    return flat


def format_downstream(summary: dict[str, Any]) -> str:
    """The table as text: a row a training set, 95 % intervals over patients in brackets."""
    modalities = in_order(m for arm in summary["arms"] for m in arm["by_modality"])
    rows = [["trained on", "patients", "real", "generated", "Dice", *modalities, "generated images bring"]]
    for arm in summary["arms"]:
        by_modality = [arm["by_modality"].get(m) for m in modalities]
        gain = arm["gain"]["dice"] if "gain" in arm else None
        counts = [f"{arm[name]:,}" for name in ("num_real_patients", "num_real_slices", "num_generated")]
        rows.append([arm["label"], *counts, _cell(arm["dice"]), *map(_cell, by_modality), _cell(gain, "+")])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _cell(entry: dict[str, Any] | None, sign: str = "") -> str:
    if entry is None:
        return "-"
    ends = entry["ci95"]
    texts = [f"{value:{sign}z.3f}" for value in (entry["value"], *(ends or ()))]
    return texts[0] + (f" [{texts[1]}, {texts[2]}]" if ends else "")


def _read(files: Mapping[Training, Path]) -> tuple[Tested, dict[Arm, Scores]]:
    """Scores by arm; all trainings were tested on the same slices."""
    import pyarrow.parquet as pq

    by_arm: dict[Arm, list[tuple[int, dict[str, np.ndarray]]]] = {}
    rows_N, tested = None, None
    for training, file in files.items():
        table = pq.read_table(file)
        columns = {n: table[n].to_numpy() for n in table.column_names if n == "dice" or n.startswith(_PREFIX)}
        by_arm.setdefault(training.arm, []).append((training.seed, columns))
        rows_N = table["row"].to_numpy() if rows_N is None else rows_N
        assert np.array_equal(rows_N, table["row"].to_numpy())
        unit = "patient" if "patient" in table.column_names else "case_id"
        tested = Tested(*(np.array(table[name].to_pylist()) for name in (unit, "modality")))
    assert tested is not None
    return tested, {
        arm: Scores(
            tuple(seed for seed, _ in by_seed),
            {name: np.stack([columns[name] for _, columns in by_seed]) for name in by_seed[0][1]},
        )
        for arm, by_seed in by_arm.items()
    }


def _arm(arm: Arm, scores: Scores, tested: Tested, interval: Interval) -> dict[str, Any]:
    everywhere = np.ones(len(tested.patient_N), dtype=bool)
    organs = {name.removeprefix(_PREFIX): values for name, values in scores.columns.items() if name != "dice"}
    dice_SN = scores.columns["dice"]

    def existing(entries: dict[str, dict[str, Any] | None]) -> dict[str, dict[str, Any]]:
        return {name: entry for name, entry in entries.items() if entry is not None}

    return {
        "name": arm.name,
        "label": arm.label,
        "real_fraction": arm.real_fraction,
        "generated": arm.generated,
        "seeds": list(scores.seeds),
        "dice": _entry(dice_SN, tested, everywhere, interval),
        "by_modality": existing(
            {m: _entry(dice_SN, tested, tested.modality_N == m, interval) for m in tested.modalities}
        ),
        "by_organ": existing({organ: _entry(values, tested, everywhere, interval) for organ, values in organs.items()}),
    }


def _gain(alone: Scores, both: Scores, tested: Tested, interval: Interval) -> dict[str, Any]:
    """Dice with generated images minus Dice without, slice by slice and seed by seed."""
    assert alone.seeds == both.seeds
    change_SN = both.columns["dice"] - alone.columns["dice"]
    everywhere = np.ones(len(tested.patient_N), dtype=bool)
    gains = {"dice": _entry(change_SN, tested, everywhere, interval)}
    for modality in tested.modalities:
        entry = _entry(change_SN, tested, tested.modality_N == modality, interval)
        if entry is not None:
            gains[modality] = entry
    return gains


def _entry(values_SN: np.ndarray, tested: Tested, chosen_N: np.ndarray, interval: Interval) -> dict[str, Any] | None:
    """The mean over slices of the mean over seeds, its interval over patients, and each seed's mean.

    The interval shows how much other patients may change the mean, and the seeds how much another training may.
    """
    values_SN = values_SN[:, chosen_N]
    mean = estimate(
        values_SN.mean(axis=0), tested.patient_N[chosen_N], resamples=interval.resamples, seed=interval.seed
    )
    if mean is None:
        return None
    return {
        "value": mean.value,
        "ci95": None if mean.interval is None else list(mean.interval),
        "n": mean.num_samples,
        "num_patients": mean.num_patients,
        "by_seed": [float(np.nanmean(values_N)) for values_N in values_SN],
    }


def _sizes(
    arm: Arm, seeds: tuple[int, ...], shards: ShardSet, real_rows: np.ndarray, num_generated: int
) -> dict[str, int]:
    """Sizes of the training set. Patients and slices differ from seed to seed: the number of slices is their mean."""
    real = Arm(arm.real_fraction, generated=False)
    slices = [len(rows_of(Training(real, seed), shards, real_rows)) for seed in seeds]
    return {
        "num_real_patients": len(patients_of(shards, real_rows, arm.real_fraction, seeds[0])),
        "num_real_slices": round(float(np.mean(slices))),
        "num_generated": num_generated * arm.generated,
    }
