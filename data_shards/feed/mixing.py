"""The proportions in which slices are drawn: weights for modalities, axes and shard sets, and their order.

A key is [SET:]MODALITY[/AXIS] or [SET:]*, with SET the index of a shard set among those opened together: `CT`,
`MR/axial`, `1:*`, `0:CT/coronal`. Weights are shares of the samples drawn, whatever the groups' sizes.
Dimensions: R rows, S shard sets, M modalities, A axes, G groups.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from data_shards.feed.order import Mixed, Order, Shuffled, mix_counts
from data_shards.modalities import MODALITIES, is_modality
from data_shards.problems import Problem, refuse
from data_shards.records import AXES

_KEY = re.compile(r"(?:(?P<set>\d+):)?(?:\*|(?P<modality>[^:/*]+)(?:/(?P<axis>[^:/*]+))?)")
_GRAMMAR = "write [SET:]MODALITY[/AXIS] or [SET:]*, for example CT, MR/axial or 1:*"


class Tagged(Protocol):
    """The interface that a mix uses of a ShardSet: integers for every row."""

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the modalities."""

    @property
    def modality_N(self) -> np.ndarray:
        """Indices into `modalities`."""

    @property
    def axis_N(self) -> np.ndarray:
        """Indices into AXES."""

    @property
    def member_N(self) -> np.ndarray:
        """Indices of the set that a row is from."""


@dataclass(frozen=True)
class MixGroup:
    """One key of a mix: the codes that it selects (None: any) and its weight."""

    key: str
    weight: float
    set_index: int | None = None
    modality: int | None = None
    axis: int | None = None

    def cells(self, shape: tuple[int, ...]) -> np.ndarray:
        """bool [S, M, A] of this shape: the combinations of set, modality and axis that it selects."""
        taken_SMA = np.zeros(shape, dtype=bool)
        at = tuple(slice(None) if code is None else code for code in (self.set_index, self.modality, self.axis))
        taken_SMA[at] = True
        return taken_SMA


def mix_problems(mix: Mapping[str, float], where: str = "config") -> list[Problem]:
    """Problems of a mix that are known without the shards."""
    return parse_mix(mix, where)[1]


def mix_groups(
    shards: Tagged, rows: np.ndarray, mix: Mapping[str, float], where: str = "config"
) -> tuple[tuple[np.ndarray, ...], tuple[float, ...]]:
    """The `rows` of each group, ascending, and the weights, in the order of the mix.

    Every row must fall into exactly one group, and every group must have rows. Raises InputProblems, all at once.
    """
    groups, problems = parse_mix(mix, where, shards.modalities)
    rows = np.asarray(rows, dtype=np.int64)
    num_sets = int(shards.member_N.max(initial=0)) + 1
    for group in groups:
        if group.set_index is not None and group.set_index >= num_sets:
            known = "0" if num_sets == 1 else f"0 to {num_sets - 1}"
            problems.append(Problem(where, _field(group), f"no shard set {group.set_index}", f"choose {known}"))
    groups = [group for group in groups if group.set_index is None or group.set_index < num_sets]
    shape = (num_sets, len(shards.modalities), len(AXES))
    cell_R = np.ravel_multi_index((shards.member_N[rows], shards.modality_N[rows], shards.axis_N[rows]), shape)
    rows_SMA = np.bincount(cell_R, minlength=math.prod(shape)).reshape(shape)
    taken_GSMA = np.array([group.cells(shape) for group in groups], dtype=bool).reshape(-1, *shape)
    for group, taken_SMA in zip(groups, taken_GSMA, strict=True):
        if not rows_SMA[taken_SMA].any():
            others = "".join(f" {one.key} {one.weight:g}" for one in groups if one is not group)
            remedy = f"leave it out: --loader.mix{others}; or choose its slices with loader.modalities and loader.axes"
            problems.append(Problem(where, _field(group), "matches none of the used slices", remedy))
    problems += _overlaps(groups, taken_GSMA, where)
    if not problems:  # otherwise the missing keys may be the wrong ones, misspelt
        problems += _unmatched(rows_SMA * ~taken_GSMA.any(axis=0), where, shards.modalities)
    refuse(problems)
    group_R = taken_GSMA.argmax(axis=0).ravel()[cell_R]
    return tuple(rows[group_R == g] for g in range(len(groups))), tuple(group.weight for group in groups)


def make_order(shards: Tagged, rows: np.ndarray, mix: Mapping[str, float], seed: int, where: str = "config") -> Order:
    """The order of the rows in training: all with equal weight without a mix, else as in mix_groups."""
    if not mix:
        return Shuffled(rows, seed)
    return Mixed(*mix_groups(shards, rows, mix, where), seed)


def parse_mix(
    mix: Mapping[str, float], where: str = "config", modalities: tuple[str, ...] | None = None
) -> tuple[list[MixGroup], list[Problem]]:
    """The groups of a mix, in its order, and the problems of its keys and weights. `modalities`: None if the sets are
    not known; then any name may be one."""
    groups: list[MixGroup] = []
    problems: list[Problem] = []
    for key, weight in mix.items():
        field = f"loader.mix.{key}"
        found = _KEY.fullmatch(key)
        if not (math.isfinite(weight) and weight > 0):
            problems.append(Problem(where, field, str(weight), "give a finite number above 0, or remove the key"))
        if found is None:
            problems.append(Problem(where, field, "not a key", _GRAMMAR))
            continue
        named = found["modality"]
        any_name = (named,) if is_modality(named) else MODALITIES
        words_of = {"modality": any_name if modalities is None else modalities, "axis": AXES}
        unknown = {name: word for name in words_of if (word := found[name]) not in (None, *words_of[name])}
        for name, word in unknown.items():
            problems.append(Problem(where, field, f"no {name} {word!r}", f"choose from {', '.join(words_of[name])}"))
        if not unknown:
            codes = {name: _code(found[name], words) for name, words in words_of.items()}
            groups.append(MixGroup(key, weight, int(found["set"]) if found["set"] else None, **codes))
    if mix and not problems:
        try:
            mix_counts(tuple(mix.values()))
        except ValueError as error:
            problems.append(Problem(where, "loader.mix", str(error), "bring the weights closer together"))
    return groups, problems


def _code(word: str | None, words: Sequence[str]) -> int | None:
    return None if word is None else words.index(word)


def _overlaps(groups: list[MixGroup], taken_GSMA: np.ndarray, where: str) -> list[Problem]:
    problems = []
    for second in range(len(groups)):
        for first in range(second):
            if (taken_GSMA[first] & taken_GSMA[second]).any():
                value = f"selects slices that {groups[first].key} selects too"
                problems.append(Problem(where, _field(groups[second]), value, "let every slice belong to one key"))
    return problems


def _unmatched(rows_SMA: np.ndarray, where: str, modalities: tuple[str, ...]) -> list[Problem]:
    problems = []
    for set_index, modality, axis in np.argwhere(rows_SMA).tolist():
        key = f"{modalities[modality]}/{AXES[axis]}"
        if rows_SMA.shape[0] > 1:
            key = f"{set_index}:{key}"
        value = f"{rows_SMA[set_index, modality, axis]} slices {key} belong to no key"
        remedy = f"add {key}, or leave them out with loader.modalities and loader.axes"
        problems.append(Problem(where, "loader.mix", value, remedy))
    return problems


def _field(group: MixGroup) -> str:
    return f"loader.mix.{group.key}"
