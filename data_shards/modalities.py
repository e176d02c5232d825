"""Modalities: the names that a set's images have, and what their values mean.

CT is in HU. Other modalities have no unit that is known here, unless a setting says so (prepare.intensities). A set of
CT, MR or both has the modalities (CT, MR), as every set had before other names were possible; a set with another name
has those that its slices have.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

# Also the order in which they come first.
MODALITIES: tuple[Literal["CT", "MR"], ...] = ("CT", "MR")
# Contrasts of MR. They are names of their own, so that a model can tell them apart.
OF_MR = ("T1", "T1ce", "T2", "FLAIR", "PD", "DWI", "ADC", "DCE", "SWI", "STIR", "Dixon")
# Words with another meaning in settings, or names of other groups of results.
_RESERVED = {"same", "other", "none", "all", "axial", "coronal", "sagittal", "organ", "body", "diversity", "downstream"}
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9-]{0,23}")
MODALITY_RULE = "a name of letters, digits and -, a letter first, 24 characters at most"
# docs/data.md 4: a word, and two numbers that may follow it.
_RULE = re.compile(r"(hu|values|percentiles)(?:\s+(-?[0-9.]+)\s+(-?[0-9.]+))?")
INTENSITY_RULE = "`hu`, `hu LOW HIGH`, `percentiles`, `percentiles LOW HIGH` or `values LOW HIGH`"


def is_modality(value: object) -> bool:
    """Whether a value can name a modality."""
    return isinstance(value, str) and _NAME.fullmatch(value) is not None and value.lower() not in _RESERVED


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Each once: CT, MR, then the others by name."""
    known = set(names)
    return (*(one for one in MODALITIES if one in known), *sorted(known - set(MODALITIES), key=lambda one: one.lower()))


def modalities_of(names: Iterable[str]) -> tuple[str, ...]:
    """The modalities of a set whose slices have these names, in the order of their codes."""
    known = set(names)
    return in_order(known) if known - set(MODALITIES) else MODALITIES


@dataclass(frozen=True)
class GreyRule:
    """How values become grey values. kind: hu, a window in HU; values, a window in the image's own unit; percentiles,
    those of the volume. `ends`: None are those of the setting hu_window or mr_percentiles."""

    kind: str
    ends: tuple[float, float] | None = None


def grey_rule(modality: str, intensities: Mapping[str, str]) -> GreyRule:
    """The rule of a modality: what `intensities` says of it, else HU for CT and percentiles for others."""
    return parse_rule(intensities.get(modality, "")) or GreyRule("hu" if modality == "CT" else "percentiles")


def parse_rule(text: str) -> GreyRule | None:
    """None for a text that is no rule."""
    found = _RULE.fullmatch(text.strip())
    if found is None:
        return None
    try:
        ends = None if found[2] is None else (float(found[2]), float(found[3]))
    except ValueError:  # 1.2.3
        return None
    if (ends is None and found[1] == "values") or (ends is not None and not ends[0] < ends[1]):
        return None
    if found[1] == "percentiles" and ends is not None and not 0 <= ends[0] < ends[1] <= 100:
        return None
    return GreyRule(found[1], ends)


def is_in_hu(modality: str, preprocessing: Mapping[str, Any]) -> bool:
    """Whether the values of a modality are HU in a set with this `preprocessing` (index.json)."""
    return grey_rule(modality, preprocessing.get("intensities") or {}).kind == "hu"


def in_hu(modalities: Sequence[str], preprocessing: Mapping[str, Any]) -> tuple[str, ...]:
    """Those whose values are HU."""
    return tuple(one for one in modalities if is_in_hu(one, preprocessing))


def window_of(modality: str, preprocessing: Mapping[str, Any], default: Sequence[float]) -> tuple[float, float]:
    """The values that are black and white, of a modality with a window; `default`: if the set does not say it."""
    ends = grey_rule(modality, preprocessing.get("intensities") or {}).ends
    low, high = ends if ends is not None else preprocessing.get("hu_window", default)
    return float(low), float(high)
