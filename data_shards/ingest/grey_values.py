"""The meaning of a volume's numbers: padding that is not air is recognised and taken as air; CT that is not in HU is
refused.

Padding is a constant that a converter or a resampling wrote where nothing was measured: exactly one number, at the
border.
Dimensions: I, J, K as in volumes.py. Limits are in HU for CT.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_shards.ingest.volumes import Volume, planes_in_memory

# Clipped air is padding that is air: scanners and converters end at -1000 or -1024 HU. Water is 0 by definition.
_AIR_HU = (-1100.0, -900.0)
# From this value on, the lower end of a window may also be fat.
_LOWEST_FAT_HU = -130.0
_AIR_NOW_HU = -1000.0
# In a field of view that is padded with 0, fat is this far below the padding.
_BELOW_PADDING_HU = 50.0
# Least share of the planes' borders with one number. Around a round field of view it is nearly all, at one side a
# third.
_BORDER_SHARE = 0.25
_VOLUME_SHARE = 0.01
# Air's noise makes a smooth histogram, even where a scanner cuts it off at 0: there 0 occurs 3 to 7 times as often as 1
# (CHAOS' MR). Padding is a number by itself.
_SPIKE = 10.0
# As a share of the range of values: numbers as near as this are neighbours in a histogram, or the next one that occurs,
# where values are steps apart: whole numbers saved as floats, eight bits stretched to twelve.
_NEAR, _STEP = 1e-3, 2e-2
# A converter may write two numbers, one inside the other (-2000 around the field of view, -3024 around that).
_MOST_PADDINGS = 3
# Least share of a plane for a patch at its border; smaller patches are tissue that happens to have the number.
_SMALLEST_PATCH = 1e-3
# Air or at least fat (about -100 HU) is in every CT of a trunk.
_FAT_HU = -90.0
_FEW = 1e-3
# Values of soft tissue if the offset was lost. In HU these are bone and contrast agent: a few per cent.
_TOO_BRIGHT_HU, _TOO_BRIGHT_SHARE = 700.0, 0.1
# Below the lowest number that scanners and converters write for what was not measured, -3024 and -4096.
_LOWEST_HU, _FEW_TOO_LOW = -4100.0, 1e-2
_TISSUE_HU, _LEAST_TISSUE = -300.0, 5e-3
_SMALLEST_SPAN_HU = 100.0
# Numbers below 0 that were stored with a sign and are read without one: air is 64,536.
_WITHOUT_SIGN = 60_000.0
# In MR nothing but padding is far below 0.
_LIKE_HU_SHARE = 0.05
_LOST_OFFSET = (
    "these are not HU (air is -1000). The conversion lost RescaleIntercept, often -1024: convert it again from DICOM, "
    "or write the intercept (NIfTI: scl_inter; DICOM: RescaleIntercept; MetaImage and NRRD: added to the values); if "
    "it was cut to a window, give it before that; if it is MR, state that with --prepare.modality MR"
)


@dataclass(frozen=True)
class Padding:
    """Padding that was taken as air. `num_voxels` of the volume have its lowest value for this reason; `notes` say
    so."""

    num_voxels: int
    notes: tuple[str, ...]


def take_padding_as_air(volume: Volume, modality: str) -> Padding:
    """Find padding that is not air and give it, in place, the lowest measured value.

    CT: numbers below any air (-2000, -3024), and numbers above air, such as 0, around lower ones. MR: one constant
    number at the border. Volumes without padding are not changed.
    """
    num_voxels, notes = 0, []
    filled_with: Any = None
    for _ in range(_MOST_PADDINGS):
        number = None
        for candidate in _border_numbers(volume.voxels_IJK):
            # The padding that was just filled is not found again.
            num_filled = num_voxels if candidate == filled_with else 0
            if _is_padding(volume, candidate, modality, num_filled):
                number = candidate
                break
        if number is None:
            break
        count, lowest = _fill(volume, number)
        if count == 0:
            break
        num_voxels = count if number == filled_with else num_voxels + count
        filled_with = lowest
        unit = " HU" if modality == "CT" else ""
        found = f"padding of {_value(volume, number):g}{unit}"
        notes.append(f"{found} is taken as air and left out of percentiles; crop it away if that is wrong")
    return Padding(num_voxels, tuple(notes))


def take_window_end_as_air(volume: Volume, modality: str) -> str | None:
    """In a CT that was cut to a window, set the voxels at the window's lower end, if that is air or lung, to -1000 HU,
    in place. Returns a note, or None if nothing was changed.

    The air of such a volume is, for example, -160 HU: in a window that reaches lower it would be grey, while that of
    other volumes is black.
    """
    if modality != "CT":
        return None
    voxels_IJK = volume.voxels_IJK
    end = voxels_IJK.min() if volume.slope > 0 else voxels_IJK.max()
    value = _value(volume, end)
    if not _AIR_HU[1] < value <= _LOWEST_FAT_HU or end not in list(_border_numbers(voxels_IJK)):
        return None
    air: Any = (_AIR_NOW_HU - volume.intercept) / volume.slope
    if voxels_IJK.dtype.kind in "iu":
        limits = np.iinfo(voxels_IJK.dtype)
        air = round(air)
        if not limits.min <= air <= limits.max:
            return None
    for k in range(voxels_IJK.shape[2]):
        plane = voxels_IJK[:, :, k]
        plane[plane == end] = air
    cut = f"cut to a window that ends at {value:g} HU, where air is: taken as {_AIR_NOW_HU:g} HU"
    return f"{cut}; give the CT before it was cut if you have it"


def problem_with_values(
    volume: Volume, modality: str, num_padding: int, stated: bool, name: str | None = None
) -> str | None:
    """Why these cannot be the values of a CT or MR, None if they can. CT: of values in HU; MR: of all others. `stated`:
    the user has stated the modality; `name`: what it is called."""
    if modality == "MR":
        share = (_count_below(volume, _TISSUE_HU) - num_padding) / max(1, volume.voxels_IJK.size - num_padding)
        if stated or share < _LIKE_HU_SHARE:
            return None
        value = f"taken as {name or modality}, but {100 * share:.0f} % of its voxels are below {_TISSUE_HU:g}, as in HU"
        return f"{value}; state which it is with --prepare.modality CT or MR"
    low, high = sorted(_value(volume, end) for end in (volume.voxels_IJK.min(), volume.voxels_IJK.max()))
    if high - low < _SMALLEST_SPAN_HU:
        return f"its values span {high - low:.4g} ({low:.4g} to {high:.4g}): these are not HU; give the CT in HU"

    def share_below(hu: float) -> float:
        return _share_below(volume, hu, num_padding)

    if 1.0 - share_below(_WITHOUT_SIGN) > _FEW:
        return f"values up to {high:g}: numbers below 0 were stored without their sign; convert it again from DICOM"
    if (lower := share_below(_LOWEST_HU)) > _FEW_TOO_LOW:
        value = f"{100 * lower:.0f} % of its voxels are below {_LOWEST_HU:g}"
        return f"{value}: these are not HU (air is -1000); give the CT in HU"
    negative, fat = share_below(0.0), share_below(_FAT_HU)
    if fat < _FEW and (negative < _FEW or 1.0 - share_below(_TOO_BRIGHT_HU) > _TOO_BRIGHT_SHARE):
        what = "no voxel of this CT is" if negative == 0 else f"only {100 * negative:.2g} % of this CT's voxels are"
        return f"{what} below 0: {_LOST_OFFSET}"
    if 1.0 - share_below(_TISSUE_HU) < _LEAST_TISSUE:
        remedy = "if RescaleIntercept was added twice, convert it again"
        return f"hardly any voxel of this CT is above {_TISSUE_HU:g} HU: it shows no tissue; {remedy}"
    return None


def doubt_about_values(volume: Volume, modality: str, num_padding: int) -> str | None:
    """What to say of a CT in which neither air nor fat is seen, though it can be one: a view of the brain alone, or a
    CT that was cut to a window; or it is no CT."""
    if modality != "CT" or _share_below(volume, _FAT_HU, num_padding) >= _FEW:
        return None
    lowest = min(_value(volume, end) for end in (volume.voxels_IJK.min(), volume.voxels_IJK.max()))
    seen = f"neither air nor fat is in this CT, whose values begin at {lowest:g}"
    return f"{seen}: if it was cut to a window, give it before that; if it is no CT, state --prepare.modality"


def _share_below(volume: Volume, hu: float, num_padding: int) -> float:
    """Of the measured voxels. Padding has the lowest value."""
    lowest = min(_value(volume, end) for end in (volume.voxels_IJK.min(), volume.voxels_IJK.max()))
    found = _count_below(volume, hu) - (num_padding if lowest < hu else 0)
    return found / max(1, volume.voxels_IJK.size - num_padding)


def _value(volume: Volume, number: Any) -> float:
    return float(number) * volume.slope + volume.intercept


def _border_numbers(voxels_IJK: np.ndarray) -> Iterator[Any]:
    """Stored numbers that fill a large part of the axial planes' borders, or a whole plane at either end."""
    sides = (voxels_IJK[0], voxels_IJK[-1], voxels_IJK[:, 0], voxels_IJK[:, -1])
    border = np.concatenate([side.ravel() for side in sides])
    numbers, counts = np.unique(border, return_counts=True)
    most = int(np.argmax(counts))
    if counts[most] >= _BORDER_SHARE * len(border):
        yield numbers[most]
    for plane in (voxels_IJK[:, :, 0], voxels_IJK[:, :, -1]):
        if (plane == plane[0, 0]).all():
            yield plane[0, 0]


def _is_padding(volume: Volume, number: Any, modality: str, num_filled: int) -> bool:
    """Whether a number at the border, which `num_filled` voxels have, is padding that is not air."""
    value = _value(volume, number)
    if modality == "CT" and _AIR_HU[0] <= value <= _AIR_HU[1]:
        return False
    voxels_IJK = volume.voxels_IJK
    centre = number.item()
    equal, just_below, just_above = -num_filled, 0, 0
    near_below, near_above = _reach(voxels_IJK, centre)
    for plane in planes_in_memory(voxels_IJK):
        equal += int(np.count_nonzero(plane == centre))
        just_below += int(np.count_nonzero((plane >= near_below) & (plane < centre)))
        just_above += int(np.count_nonzero((plane <= near_above) & (plane > centre)))
    size = voxels_IJK.size
    if equal == size or equal < _VOLUME_SHARE * size or equal < _SPIKE * max(just_below, just_above):
        return False
    # In a CT cut to a window, the lower end is air; a number above air is padding if there is air below it.
    return (
        modality == "MR"
        or value < _AIR_HU[0]
        or _count_below(volume, value - _BELOW_PADDING_HU) >= _VOLUME_SHARE * size
    )


def _reach(voxels_IJK: np.ndarray, centre: float) -> tuple[float, float]:
    """The range of numbers that are neighbours of `centre`."""
    lowest, highest = voxels_IJK.min().item(), voxels_IJK.max().item()
    below, above = lowest, highest
    for plane in planes_in_memory(voxels_IJK):
        lower, higher = plane[plane < centre], plane[plane > centre]
        below = max(below, lower.max().item()) if lower.size else below
        above = min(above, higher.min().item()) if higher.size else above
    span = float(highest) - float(lowest)
    near, step = _NEAR * span, _STEP * span
    return (
        min(centre - near, below) if centre - below <= step else centre - near,
        max(centre + near, above) if above - centre <= step else centre + near,
    )


def _fill(volume: Volume, number: Any) -> tuple[int, Any]:
    """Give padding the lowest value of all other voxels; returns their number, and their new stored number."""
    voxels_IJK = volume.voxels_IJK
    rising = volume.slope > 0
    lowest: Any = None
    for plane in planes_in_memory(voxels_IJK):
        others = plane[plane != number]
        if others.size:
            end = others.min() if rising else others.max()
            lowest = end if lowest is None else (min(lowest, end) if rising else max(lowest, end))
    if lowest is None:
        return 0, number
    is_lowest = number < lowest if rising else number > lowest
    count = 0
    for k in range(voxels_IJK.shape[2]):
        plane = voxels_IJK[:, :, k]
        padded = plane == number
        # Inside the range of values the body has the number too: water is 0 HU.
        padded = padded if is_lowest else _at_border(padded)
        plane[padded] = lowest
        count += int(np.count_nonzero(padded))
    return count, lowest


def _at_border(inside: np.ndarray) -> np.ndarray:
    """The patches of a plane that reach its border."""
    from scipy import ndimage

    parts, count = ndimage.label(inside)
    if count == 0:
        return inside
    sizes = np.bincount(parts.ravel(), minlength=count + 1)
    keep = np.zeros(count + 1, dtype=bool)
    for side in (parts[0], parts[-1], parts[:, 0], parts[:, -1]):
        keep[side] = True
    keep &= sizes >= _SMALLEST_PATCH * inside.size
    keep[0] = False
    return keep[parts]


def _count_below(volume: Volume, value: float) -> int:
    """Number of voxels with a lower value."""
    limit = (value - volume.intercept) / volume.slope
    if volume.voxels_IJK.dtype.kind in "iu":
        # As whole numbers, so that no plane is converted: n < 2.5 if n < 3, n > 2.5 if n > 2.
        limit = int(np.ceil(limit)) if volume.slope > 0 else int(np.floor(limit))
    total = 0
    for plane in planes_in_memory(volume.voxels_IJK):
        total += int(np.count_nonzero(plane < limit if volume.slope > 0 else plane > limit))
    return total
