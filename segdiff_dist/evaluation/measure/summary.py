"""From running sums and distances to summary.json: value, 95 % interval and n, overall and by group.

Dimensions: B batch, N samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from data_shards.feed.order import sample_at
from data_shards.labels import BODY, LabelTable
from data_shards.modalities import in_order
from data_shards.records import AXES
from segdiff_dist.evaluation.measure.headline import is_headline
from segdiff_dist.evaluation.measure.rows import PATIENT
from segdiff_dist.evaluation.measure.trust import Spread
from segdiff_dist.evaluation.measure.worker import ChunkResult
from segdiff_dist.evaluation.metrics.air import AIR_METRICS
from segdiff_dist.evaluation.metrics.columns import (
    FALSE_POSITIVES,
    GREY_METRICS,
    HEADLINE_METRICS,
    HU_METRICS,
    ORGAN_METRICS,
    PAIRS,
    SIDES,
    column_names,
)
from segdiff_dist.evaluation.metrics.definitions import DEFINITIONS
from segdiff_dist.evaluation.metrics.distances import Distributions, Entry, Group
from segdiff_dist.evaluation.metrics.estimates import Estimate
from segdiff_dist.evaluation.metrics.organ_texture import organ_texture_entries
from segdiff_dist.evaluation.metrics.sharpness import (
    organ_entries,
    sharpness_entries,
    unpaired_entries,
    unpaired_organ_entries,
)
from segdiff_dist.evaluation.metrics.sums import Interval, PatientSums, SumKey

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT_VERSION = 2
DIVERSITY_METRICS = tuple(field.name for field in fields(Spread))
_UNITS = {"psnr_db": "dB", "pixel_std": "grey values"} | dict.fromkeys(HU_METRICS, "HU")
_UNITS |= dict.fromkeys((*GREY_METRICS, *AIR_METRICS), "grey values")
_UNITS |= {f"false_positive_area_mm2_{pair}": "mm2" for pair in PAIRS}
# Kinds of samples that are summed separately: see _kinds. Real images alone are those without generated counterparts.
_HEADLINE, _SEVERAL, _ACROSS, _REAL_ALONE = "headline", "several", "across", "real alone"


@dataclass
class Evaluated:
    """All items with their measurements, as far as summary.json needs them.

    `items` has a row a sample; `spread`: by the item id of a mask's first sample, where it has several. `is_paired`:
    the images have real counterparts.
    """

    table: LabelTable
    items: pa.Table
    spread: dict[int, Spread]
    seed: int
    sums: PatientSums
    distributions: Distributions
    grey_counts: dict[str, np.ndarray]
    several_rows: frozenset[int]
    is_paired: bool = True
    patient_of: Mapping[str, str] = field(default_factory=dict)
    """As ShardSet.patient_of. A column `patient` of the items has precedence."""

    @classmethod
    def empty(
        cls,
        table: LabelTable,
        items: pa.Table,
        spread: dict[int, Spread],
        *,
        capacity: int = 5000,
        seed: int = 0,
        is_paired: bool = True,
        patient_of: Mapping[str, str] | None = None,
    ) -> Evaluated:
        """Nothing measured yet; `capacity` and `seed` of the samples of features (see FeatureSample)."""
        rows = frozenset(items["row"].take(sorted(spread)).to_pylist()) if spread else frozenset()
        sums = PatientSums([*column_names(table), *DIVERSITY_METRICS])
        distributions = Distributions(capacity)
        return cls(table, items, spread, seed, sums, distributions, {}, rows, is_paired, patient_of or {})

    @property
    def modalities(self) -> tuple[str, ...]:
        """Those of the masks, of the images, and of real images."""
        names = (self.items[name].unique().to_pylist() for name in ("source_modality", "target_modality"))
        return in_order({*chain(*names), *self.grey_counts})

    def add(self, start: int, stop: int, result: ChunkResult) -> None:
        """Add the chunk of items start..stop-1. Chunks come in item order, so sums do not depend on timing."""
        items = self.items.slice(start, stop - start).to_pydict()
        num = stop - start
        groups = list(zip(*(items[name] for name in ("source_modality", "target_modality", "axis")), strict=True))
        columns = result.columns | spread_columns(self.spread, start, stop)
        values_BC = np.stack([columns[name] for name in self.sums.names], axis=1)
        cases, patients = items["case_id"], items.get(PATIENT) or self._units(items["case_id"])
        units = [
            (case, *group, "" if patient == case else patient)
            for case, group, patient in zip(cases, groups, patients, strict=True)
        ]
        keys = [(i, SumKey(k, *units[i])) for i in range(num) for k in self._kinds(items, i)]
        self.sums.add([key for _, key in keys], values_BC[[i for i, _ in keys]])
        first_B = np.array(items["seed_index"]) == 0
        priority_B = sample_at(np.arange(start, stop), self.items.num_rows, self.seed)
        self.distributions.failed |= result.failed
        self.distributions.add(result.features, groups, patients, first_B, priority_B)
        for (modality, _, _), counts_2G in zip(groups, result.grey_counts, strict=True):
            self.grey_counts[modality] = self.grey_counts.get(modality, 0) + counts_2G

    def add_real(self, slices: Sequence[tuple[str, str, str]], first: int, num: int, result: ChunkResult) -> None:
        """Add real images without generated counterparts: case, modality and axis of each. `first`: the place of the
        first among all `num` of them."""
        nothing_B = np.full(len(slices), np.nan)
        values_BC = np.stack([result.columns.get(name, nothing_B) for name in self.sums.names], axis=1)
        self.sums.add(
            [SumKey(_REAL_ALONE, case, m, m, axis, self._patient(case)) for case, m, axis in slices], values_BC
        )
        groups = [(m, m, axis) for _, m, axis in slices]
        priority_B = sample_at(np.arange(first, first + len(slices)), num, self.seed)
        self.distributions.failed |= result.failed
        units = self._units([case for case, _, _ in slices])
        self.distributions.add(result.features, groups, units, np.ones(len(slices), bool), priority_B)
        for (modality, _, _), counts_2G in zip(groups, result.grey_counts, strict=True):
            self.grey_counts[modality] = self.grey_counts.get(modality, 0) + counts_2G

    def _patient(self, case: str) -> str:
        return self.patient_of.get(case, "")

    def _units(self, cases: Sequence[str]) -> list[str]:
        """The patients, by name or case id."""
        return [self.patient_of.get(case, case) for case in cases]

    def _kinds(self, items: dict[str, list[Any]], i: int) -> list[str]:
        """The kinds that item i counts in: headline, one of several images of its mask, or another modality."""
        if items["source_modality"][i] != items["target_modality"][i]:
            return [_ACROSS]
        several = [_SEVERAL] if items["row"][i] in self.several_rows else []
        return ([_HEADLINE] if is_headline(items, i) else []) + several


def spread_columns(spread: dict[int, Spread], start: int, stop: int) -> dict[str, np.ndarray]:
    """DIVERSITY_METRICS of items start..stop-1, float64 [B]; NaN except for the first of a mask's several samples."""
    nothing = (np.nan,) * len(DIVERSITY_METRICS)
    values_BC = np.array([astuple(spread[i]) if i in spread else nothing for i in range(start, stop)])
    return dict(zip(DIVERSITY_METRICS, values_BC.T, strict=True))


def summarise(measured: Evaluated, interval: Interval) -> dict[str, Any]:
    """The part of summary.json that depends on the samples."""
    means = _Means(measured.sums, interval, measured.is_paired)
    organs = [measured.table.names[i] for i in measured.table.organ_ids]
    by_modality = {m: Group.of(m) for m in measured.modalities}
    by_axis = {a: Group(axis=a) for a in AXES}
    by_both = {f"{m}/{a}": Group.of(m, a) for m in measured.modalities for a in AXES}

    def entries(group: Group) -> dict[str, Entry]:
        headline = means.headline(group)
        if measured.is_paired:
            headline |= sharpness_entries(measured.sums, _headline(group), interval)
        else:
            headline |= unpaired_entries(measured.sums, _headline(group), _real_alone(group))
        return headline | means.texture(group) | means.air(group) | measured.distributions.entries(group, group)

    def by_organ(group: Group) -> dict[str, Any]:
        sides = (_headline(group), _real_alone(group))
        entries = {o: means.organ(o, group) | means.texture(group, o) for o in organs}
        if measured.is_paired:
            return {o: entries[o] | organ_entries(measured.sums, o, sides[0], interval) for o in organs}
        return {o: entries[o] | unpaired_organ_entries(measured.sums, o, *sides) for o in organs}

    def existing(groups: dict[str, Group], make: Callable[[Group], dict[str, Any]]) -> dict[str, Any]:
        return {name: make(group) for name, group in groups.items() if measured.sums.num_samples(_headline(group))}

    return {
        "format_version": FORMAT_VERSION,
        "num_samples": measured.sums.num_samples(_headline(Group())),
        "num_patients": len(measured.sums.patients(_headline(Group()))),
        "metrics": entries(Group()),
        "by_modality": existing(by_modality, entries),
        "by_axis": existing(by_axis, entries),
        "by_modality_axis": existing(by_both, entries),
        "by_organ": by_organ(Group()),
        "by_modality_organ": existing(by_modality, by_organ),
        "by_axis_organ": existing(by_axis, by_organ),
        "body": means.body() if measured.table.body_id is not None else {},
        "cross_modality": _cross_modality(measured, means),
        "diversity": _diversity(measured, means),
        "grey_values": {
            m: {side: counts[i].tolist() for i, side in enumerate(SIDES)}
            for m, counts in sorted(measured.grey_counts.items())
            if counts.any(axis=1).all()
        },
    }


def scalars(summary: dict[str, Any]) -> dict[str, float]:
    """Stable flat names for a tracker: group, organ, then metric.

    `psnr_db`, `CT/psnr_db`, `axial/ssim`, `CT/axial/ssim`, `organ/liver/dice_mask_gen`, `CT/organ/liver/hu_mean_error`,
    `axial/organ/liver/dice_mask_gen`, `body/dice_mask_gen`, `cross_modality/CT_to_MR/dice_mask_gen`,
    `diversity/pixel_std`, `diversity/CT/pixel_std`, `trust/num_leaked`, `trust/memorised_share`,
    `trust/nearer_pixels`, `num_samples`, `num_patients`.
    """
    flat = {
        f"{group}{name}": entry["value"]
        for group, entries in groups(summary).items()
        for name, entry in entries.items()
    }
    return flat | counts(summary)


def groups(summary: dict[str, Any]) -> dict[str, dict[str, Entry]]:
    """All entries by the prefix of their group: "", "CT/", "CT/organ/liver/", ..."""
    diversity = summary["diversity"]
    found = {"": summary["metrics"], "body/": summary["body"], "diversity/": diversity.get("metrics", {})}
    sections = {
        "": summary["by_modality"] | summary["by_axis"] | summary["by_modality_axis"],
        "organ/": summary["by_organ"],
        "cross_modality/": summary["cross_modality"],
        "diversity/": diversity.get("by_modality", {}),
    }
    for part in ("by_modality_organ", "by_axis_organ"):
        sections |= {f"{group}/organ/": organs for group, organs in summary[part].items()}
    return found | {
        f"{prefix}{group}/": entries for prefix, part in sections.items() for group, entries in part.items()
    }


def counts(summary: dict[str, Any]) -> dict[str, float]:
    """What has no interval: how many samples and patients, and the section `trust`."""
    trust = summary.get("trust", {})
    flat = {name: float(summary[name]) for name in ("num_samples", "num_patients")}
    names = (("leakage", "num_leaked"), ("memorisation", "num_suspects"), ("memorisation", "memorised_share"))
    flat |= {f"trust/{name}": float(trust[part][name]) for part, name in names if name in trust.get(part, {})}
    nearer = trust.get("memorisation", {}).get("nearer", {})
    return flat | {f"trust/nearer_{space}": ratio for space, ratio in nearer.items() if ratio is not None}


class _Means:
    """Entries of means over the samples that a predicate on keys selects."""

    def __init__(self, sums: PatientSums, interval: Interval, is_paired: bool) -> None:
        self.sums, self.interval, self.is_paired = sums, interval, is_paired

    def of(self, names: Sequence[str], which: Callable[[SumKey], bool]) -> dict[str, Entry]:
        means, num_samples = self.sums.means(names, which, self.interval), self.sums.num_samples(which)
        return {
            name: _entry(name, mean) | {"num_left_out": num_samples - mean.num_samples}
            for name, mean in means.items()
            if mean is not None
        }

    def headline(self, group: Group) -> dict[str, Entry]:
        """HEADLINE_METRICS of a group; of real images alone where the generated ones have no counterparts."""
        entries: dict[str, Entry] = {}
        for pairs, which in self._parts(group):
            of_pairs = tuple(f"_{pair}" for pair in pairs)
            names = [n for n in HEADLINE_METRICS if self.is_paired or n.endswith(of_pairs)]
            entries |= self.of(names, which)
        return entries

    def organ(self, organ: str, group: Group) -> dict[str, Entry]:
        """The metrics of one organ. Here n counts the samples that hold it; the others do not count as left out."""
        entries: dict[str, Entry] = {}
        for pairs, which in self._parts(group):
            entries |= self._organ(organ, pairs, which)
        return entries

    def texture(self, group: Group, organ: str | None = None) -> dict[str, Entry]:
        """Noise level and autocorrelation inside one organ, or inside all."""
        entries: dict[str, Entry] = {}
        for _, which in self._parts(group):
            entries |= organ_texture_entries(self.sums, which, self.interval, organ)
        return entries

    def air(self, group: Group) -> dict[str, Entry]:
        """Air around the patient, and the lattice of 2x2 pixels."""
        entries: dict[str, Entry] = {}
        for _, which in self._parts(group):
            entries |= self.of(AIR_METRICS, which)
        return entries

    def _parts(self, group: Group) -> list[tuple[Sequence[str], Callable[[SumKey], bool]]]:
        """The pairs of label maps that each kind of samples has."""
        if self.is_paired:
            return [(PAIRS, _headline(group))]
        return [(("mask_gen",), _headline(group)), (("mask_real",), _real_alone(group))]

    def _organ(self, organ: str, pairs: Sequence[str], which: Callable[[SumKey], bool]) -> dict[str, Entry]:
        names = [f"{metric}/{organ}" for metric in (*ORGAN_METRICS, *HU_METRICS, *GREY_METRICS)]
        means = self.sums.means(names, which, self.interval)
        entries = {n.split("/")[0]: _entry(n.split("/")[0], mean) for n, mean in means.items() if mean is not None}
        for pair in pairs:
            reference, predicted = (f"area_mm2_{source}/{organ}" for source in pair.split("_"))
            volumes = self.sums.volume_error(reference, predicted, which, self.interval)
            if volumes is not None:
                # n counts patients' axes here.
                entries[f"volume_error_{pair}"] = _entry("volume_error_mask_gen", volumes)
        return entries

    def body(self) -> dict[str, Entry]:
        """Dice of the class `body`."""
        entries: dict[str, Entry] = {}
        for pairs, which in self._parts(Group()):
            means = self.sums.means([f"dice_{pair}/{BODY}" for pair in pairs], which, self.interval)
            entries |= {n.split("/")[0]: _entry(n.split("/")[0], mean) for n, mean in means.items() if mean is not None}
        return entries


def _headline(group: Group) -> Callable[[SumKey], bool]:
    return lambda key: key.kind == _HEADLINE and group.holds(key.source, key.target, key.axis)


def _real_alone(group: Group) -> Callable[[SumKey], bool]:
    return lambda key: key.kind == _REAL_ALONE and group.holds(key.source, key.target, key.axis)


def _entry(name: str, mean: Estimate) -> Entry:
    return {
        "value": mean.value,
        "ci95": None if mean.interval is None else list(mean.interval),
        "n": mean.num_samples,
        "num_patients": mean.num_patients,
        "unit": _UNITS.get(name, "1"),
        "better": DEFINITIONS[name].better or None,
    }


def _cross_modality(measured: Evaluated, means: _Means) -> dict[str, dict[str, Entry]]:
    """Images of one modality made from masks of the other. They have no real counterpart. They are compared with the
    mask, and with real images of the target modality, which are of other patients."""
    directions = {}
    kinds = ["dice_either", "dice", "sensitivity", "precision", "surface_dice", "area_error", *FALSE_POSITIVES]
    kinds += ["legacy_dice"]
    names = [f"{kind}_mask_gen" for kind in kinds]
    for source in measured.modalities:
        for target in measured.modalities:
            group = Group(frozenset({(source, target)}))

            def which(key: SumKey, group: Group = group) -> bool:
                return key.kind == _ACROSS and group.holds(key.source, key.target, key.axis)

            if source != target and measured.sums.num_samples(which):
                distances = measured.distributions.entries(Group.of(target), group)
                sharp = unpaired_entries(measured.sums, which, _headline(Group.of(target)))
                directions[f"{source}_to_{target}"] = means.of(names, which) | sharp | distances
    return directions


def _diversity(measured: Evaluated, means: _Means) -> dict[str, Any]:
    """Several images of one mask: how much they differ, and whether all of them follow the mask."""
    if not measured.spread:
        return {}

    def several(group: Group) -> Callable[[SumKey], bool]:
        return lambda key: key.kind == _SEVERAL and group.holds(key.source, key.target, key.axis)

    def entries(group: Group) -> dict[str, Entry]:
        metrics = means.of(("dice_either_mask_gen", "dice_mask_gen", *DIVERSITY_METRICS), several(group))
        for name in DIVERSITY_METRICS:
            if name in metrics:
                # One value a mask: its other images are not left out.
                metrics[name]["num_left_out"] = 0
        return metrics

    groups = {m: Group.of(m) for m in measured.modalities}
    return {
        "num_masks": len(measured.spread),
        "num_images": measured.sums.num_samples(several(Group())),
        "metrics": entries(Group()),
        "by_modality": {m: entries(g) for m, g in groups.items() if measured.sums.num_samples(several(g))},
    }
