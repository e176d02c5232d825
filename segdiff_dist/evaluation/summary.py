"""From rows and feature statistics to summary.json: value, 95 % interval and n, overall and by group.

Dimensions: B batch, D features, N samples.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import numpy as np

from data_shards.labels import BODY, LabelTable
from data_shards.records import AXES, MODALITIES
from segdiff_dist.evaluation.metrics import FeatureStatistics, estimate, frechet_distance
from segdiff_dist.evaluation.worker import PAIRS, SIDES, ChunkResult, column_names, is_headline

FORMAT_VERSION = 1
HEADLINE_METRICS = (
    "psnr_db",
    "ssim",
    *(f"dice_{pair}" for pair in PAIRS),
    *(f"legacy_dice_{pair}" for pair in PAIRS),
)
# Name of the Frechet distance on each extractor's features. Only Inception's is called FID.
DISTANCES = {"segmenter": "segmenter_frechet", "inception": "fid"}
_UNITS = {"psnr_db": "dB", "pixel_std": "grey values"}
_LOWER_IS_BETTER = frozenset(DISTANCES.values())

Entry = dict[str, Any]
Key = tuple[str, str, str, str, str]


@dataclass(frozen=True)
class Group:
    """Items of these (source, target) modalities and, unless it is None, this axis."""

    modalities: frozenset[tuple[str, str]] = frozenset((m, m) for m in MODALITIES)
    axis: str | None = None

    @classmethod
    def of(cls, modality: str, axis: str | None = None) -> Group:
        """Images in their slice's own modality."""
        return cls(frozenset({(modality, modality)}), axis)

    def holds(self, source: str, target: str, axis: str) -> bool:
        """Whether an item belongs to it."""
        return (source, target) in self.modalities and self.axis in (None, axis)


@dataclass
class Distributions:
    """Feature statistics by (extractor, side, source modality, target modality, axis); first samples of a mask only."""

    by_key: dict[Key, FeatureStatistics] = field(default_factory=dict)
    # Groups often hold the same items (one axis, one modality), and a distance is costly.
    _entries: dict[tuple[tuple[Key, ...], ...], Entry | None] = field(default_factory=dict)

    def add(self, result: ChunkResult, groups: list[tuple[str, str, str]], first: np.ndarray) -> None:
        """Take in a chunk; `groups` (source, target, axis) of its items, `first` whether seed_index is 0."""
        for group in dict.fromkeys(groups):
            member = np.array([g == group for g in groups]) & first
            for (extractor, side), features_BD in result.features.items():
                chosen = features_BD[member]
                chosen = chosen[~np.isnan(chosen).any(axis=1)]
                if len(chosen):
                    key = (extractor, side, *group)
                    new = FeatureStatistics.of(chosen)
                    self.by_key[key] = self.by_key[key].merge(new) if key in self.by_key else new

    def entry(self, extractor: str, real: Group, gen: Group) -> Entry | None:
        """Distance between two groups; None when either has fewer than two samples."""
        members = tuple(self._members(extractor, side, group) for side, group in zip(SIDES, (real, gen), strict=True))
        if members not in self._entries:
            self._entries[members] = self._measure(*members)
        entry = self._entries[members]
        return None if entry is None else dict(entry)

    def _members(self, extractor: str, side: str, group: Group) -> tuple[Key, ...]:
        return tuple(k for k in sorted(self.by_key) if k[:2] == (extractor, side) and group.holds(*k[2:]))

    def _measure(self, real: tuple[Key, ...], gen: tuple[Key, ...]) -> Entry | None:
        if not real or not gen:
            return None
        first, second = (reduce(FeatureStatistics.merge, (self.by_key[k] for k in keys)) for keys in (real, gen))
        if min(first.count, second.count) < 2:
            return None
        return {
            "value": frechet_distance(first, second),
            "ci95": None,
            "n": second.count,
            "num_real": first.count,
            "num_features": len(first.mean_D),
            "unit": "1",
            "better": "lower",
        }


@dataclass
class Evaluated:
    """All items with what was measured: `items` and `columns` by name, [N] each, and the rest as sums."""

    table: LabelTable
    items: dict[str, list[Any]]
    columns: dict[str, np.ndarray]
    distributions: Distributions
    grey_counts: dict[str, np.ndarray]

    @classmethod
    def empty(cls, table: LabelTable, items: dict[str, list[Any]]) -> Evaluated:
        """Nothing measured yet."""
        num_items = len(items["item_id"])
        columns = {name: np.full(num_items, np.nan) for name in column_names(table)}
        return cls(table, items, columns, Distributions(), {})

    def add(self, start: int, stop: int, result: ChunkResult) -> None:
        """Take in the chunk of items start..stop-1. Chunks come in item order, so that sums do not depend on timing."""
        for name, values in result.columns.items():
            self.columns[name][start:stop] = values
        names = ("source_modality", "target_modality", "axis")
        groups = list(zip(*(self.items[name][start:stop] for name in names), strict=True))
        first = np.array(self.items["seed_index"][start:stop]) == 0
        self.distributions.add(result, groups, first)
        for i in range(stop - start):
            modality = groups[i][0]
            before = self.grey_counts.get(modality, np.zeros((2, 256), dtype=np.int64))
            self.grey_counts[modality] = before + result.grey_counts[i]

    @property
    def headline(self) -> np.ndarray:
        """Whether each item counts in the headline numbers, bool [N]."""
        return np.array([is_headline(self.items, i) for i in range(len(self.items["item_id"]))], dtype=bool)


@dataclass(frozen=True)
class Interval:
    """How intervals are drawn."""

    resamples: int
    seed: int


def summarise(measured: Evaluated, pixel_std: dict[int, float], interval: Interval) -> dict[str, Any]:
    """Everything of summary.json that comes of the samples; `pixel_std` by the item id of a mask's first sample."""
    groups = _Groups(measured, interval)
    headline = measured.headline
    modality = groups.of("source_modality")
    organs = [measured.table.names[i] for i in measured.table.organ_ids]

    def entries(group: Group) -> dict[str, Entry]:
        return groups.means(HEADLINE_METRICS, headline & groups.members(group)) | groups.distances(group)

    by_axis = {a: Group(axis=a) for a in AXES}
    by_modality = {m: Group.of(m) for m in MODALITIES}
    by_both = {f"{m}/{a}": Group.of(m, a) for m in MODALITIES for a in AXES}

    def existing(candidates: dict[str, Group]) -> dict[str, Any]:
        there = {name: group for name, group in candidates.items() if (headline & groups.members(group)).any()}
        return {name: entries(group) for name, group in there.items()}

    return {
        "format_version": FORMAT_VERSION,
        "num_samples": int(headline.sum()),
        "num_patients": len(set(groups.patients[headline])),
        "metrics": entries(Group()),
        "by_modality": existing(by_modality),
        "by_axis": existing(by_axis),
        "by_modality_axis": existing(by_both),
        "by_organ": {organ: groups.organ(organ, headline) for organ in organs},
        "by_modality_organ": {
            m: {organ: groups.organ(organ, headline & (modality == m)) for organ in organs}
            for m in MODALITIES
            if (headline & (modality == m)).any()
        },
        "body": groups.organ(BODY, headline) if measured.table.body_id is not None else {},
        "cross_modality": _cross_modality(groups),
        "diversity": _diversity(groups, pixel_std),
        "grey_values": {
            m: {side: counts[i].tolist() for i, side in enumerate(SIDES)}
            for m, counts in sorted(measured.grey_counts.items())
            if counts.any()
        },
    }


def scalars(summary: dict[str, Any]) -> dict[str, float]:
    """Stable flat names for a tracker: `psnr_db`, `CT/psnr_db`, `axial/ssim`, `organ/liver/dice_mask_gen`,
    `cross_modality/CT_to_MR/dice_mask_gen`, `diversity/pixel_std`."""
    flat = {name: entry["value"] for name, entry in summary["metrics"].items()}
    sections = [
        (group, summary[kind]) for kind, group in (("by_modality", ""), ("by_axis", ""), ("by_organ", "organ/"))
    ]
    sections.append(("cross_modality/", summary["cross_modality"]))
    for prefix, section in sections:
        for group, entries in section.items():
            flat |= {f"{prefix}{group}/{name}": entry["value"] for name, entry in entries.items()}
    flat |= {f"diversity/{name}": entry["value"] for name, entry in summary["diversity"].get("metrics", {}).items()}
    return flat


def format_table(summary: dict[str, Any]) -> str:
    """The headline metrics as text: a row a metric, a column a modality, 95 % intervals in brackets."""
    columns = {"all": summary["metrics"], **summary["by_modality"]}
    rows = [["", *(f"{name} (n={_most_samples(entries)})" for name, entries in columns.items())]]
    rows += [
        [metric, *(_cell(entries.get(metric)) for entries in columns.values())]
        for metric in (*HEADLINE_METRICS, *DISTANCES.values())
        if any(metric in entries for entries in columns.values())
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _most_samples(entries: dict[str, Entry]) -> int:
    return max((entry["n"] for entry in entries.values()), default=0)


def _cell(entry: Entry | None) -> str:
    if entry is None:
        return "-"
    interval = entry.get("ci95")
    return f"{entry['value']:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


class _Groups:
    """Means and distances over groups of items."""

    def __init__(self, measured: Evaluated, interval: Interval) -> None:
        self.measured = measured
        self.interval = interval
        self.patients = np.array(measured.items["case_id"], dtype=object).astype(str)
        extractors = {key[0] for key in measured.distributions.by_key}
        self.extractors = [name for name in DISTANCES if name in extractors]

    def of(self, column: str) -> np.ndarray:
        return np.array(self.measured.items[column])

    def mean(self, name: str, values: np.ndarray, patients: np.ndarray) -> Entry | None:
        found = estimate(values, patients, resamples=self.interval.resamples, seed=self.interval.seed)
        if found is None:
            return None
        metric = name.split("/")[0]
        return {
            "value": found.value,
            "ci95": None if found.interval is None else list(found.interval),
            "n": found.num_samples,
            "num_patients": found.num_patients,
            "num_left_out": len(values) - found.num_samples,
            "unit": _UNITS.get(metric, "1"),
            "better": "lower" if metric in _LOWER_IS_BETTER else "higher",
        }

    def means(self, names: Iterable[str], member: np.ndarray) -> dict[str, Entry]:
        found = {name: self.mean(name, self.measured.columns[name][member], self.patients[member]) for name in names}
        return {name: entry for name, entry in found.items() if entry is not None}

    def organ(self, organ: str, member: np.ndarray) -> dict[str, Entry]:
        # Here n counts the samples that hold the organ; the others are not "left out" but do not bear on it.
        entries = self.means([f"dice_{pair}/{organ}" for pair in PAIRS], member)
        return {name.split("/")[0]: _without(entry, "num_left_out") for name, entry in entries.items()}

    def members(self, group: Group) -> np.ndarray:
        names = ("source_modality", "target_modality", "axis")
        items = zip(*(self.measured.items[name] for name in names), strict=True)
        return np.array([group.holds(*item) for item in items], dtype=bool)

    def distances(self, real: Group, gen: Group | None = None) -> dict[str, Entry]:
        found = {}
        for extractor in self.extractors:
            entry = self.measured.distributions.entry(extractor, real, gen or real)
            if entry is not None:
                found[DISTANCES[extractor]] = entry
        return found


def _cross_modality(groups: _Groups) -> dict[str, dict[str, Entry]]:
    """Images of one modality made from masks of the other. No real counterpart: the mask is followed or not, and the
    images are set against real ones of the target modality (other patients)."""
    found = {}
    for source in MODALITIES:
        for target in MODALITIES:
            group = Group(frozenset({(source, target)}))
            member = groups.members(group)
            if source != target and member.any():
                means = groups.means(("dice_mask_gen", "legacy_dice_mask_gen"), member)
                found[f"{source}_to_{target}"] = means | groups.distances(Group.of(target), group)
    return found


def _diversity(groups: _Groups, pixel_std: dict[int, float]) -> dict[str, Any]:
    """Several images of one mask: how far apart they are, and whether all of them follow the mask."""
    if not pixel_std:
        return {}
    rows, target, source = groups.of("row"), groups.of("target_modality"), groups.of("source_modality")
    first = np.array(sorted(pixel_std))
    several = np.isin(rows, rows[first]) & (target == source)

    def entries(modality: str | None) -> dict[str, Any]:
        masks = first if modality is None else first[source[first] == modality]
        member = several if modality is None else several & (source == modality)
        spread = groups.mean("pixel_std", np.array([pixel_std[int(i)] for i in masks]), groups.patients[masks])
        found = groups.means(("dice_mask_gen",), member)
        if spread is not None:
            # More spread is neither better nor worse by itself.
            found["pixel_std"] = spread | {"better": None}
        return found

    return {
        "num_masks": len(first),
        "num_images": int(several.sum()),
        "metrics": entries(None),
        "by_modality": {m: entries(m) for m in MODALITIES if (source[first] == m).any()},
    }


def _without(entry: Entry, name: str) -> Entry:
    return {key: value for key, value in entry.items() if key != name}
