"""The patient around the organs, none of it labelled: skin, fat, muscle, bones, lungs, heart, great vessels.

Reference frame in mm (see patient.py). Sizes are those of a middling adult, rounded, and stacked more tightly.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_shards.phantom.canvas import Canvas
from data_shards.phantom.shapes import Points, ellipsoid, intersection, superellipse_cylinder, tube

_CAVITY_HALF_WIDTH_MM = 126.0
_CAVITY_HALF_DEPTH_MM = 80.0
_WALL_MM = 12.0
_SKIN_MM = 3.0
_SWELL_MM = 4.0
_VERTEBRA_PITCH_MM = 32.0
_RIB_PITCH_MM = 26.0
_FISSURE_MM = 20.0
_SIDES = (-1.0, 1.0)


@dataclass(frozen=True)
class Spaces:
    """Distances [X, Y, Z] to the spaces of organs: the inside of the muscle wall; its part below the diaphragm and
    clear of the spine; of this, the part in front of the kidneys' fat."""

    cavity: np.ndarray
    abdomen: np.ndarray
    peritoneum: np.ndarray


def half_width_mm(fat_mm: float) -> float:
    """Half width of the whole trunk, skin included, at its widest."""
    return _CAVITY_HALF_WIDTH_MM + _SWELL_MM + _WALL_MM + 0.8 * fat_mm + _SKIN_MM


def paint_trunk(canvas: Canvas) -> Spaces:
    """Draw everything that the organs then cover; returns the spaces for them."""
    x, y, z = canvas.points
    # A waist at the navel, wider at chest and hips.
    swell = (0.5 - 0.5 * np.cos(z * (1.0 / 45.0))) * _SWELL_MM
    cavity = superellipse_cylinder(x, y, _CAVITY_HALF_WIDTH_MM + swell, _CAVITY_HALF_DEPTH_MM + swell)
    # Fat is thickest on belly and back, thinner on the flanks.
    fat = canvas.patient.fat_mm * (0.75 + 0.35 * (y * (1.0 / 90.0)) ** 2)
    whole = canvas.whole
    canvas.paint("skin", whole, cavity - (_WALL_MM + _SKIN_MM + fat), "subcutaneous_fat")
    canvas.paint("fat", whole, cavity - (_WALL_MM + fat), "subcutaneous_fat")
    canvas.paint("muscle", whole, cavity - _WALL_MM, "muscle")
    canvas.paint("fat", whole, cavity, "inner_fat")
    above_diaphragm = _above_diaphragm((x, y, z))
    canvas.paint("muscle", whole, np.maximum(cavity, np.abs(above_diaphragm) - 2.5), "muscle")
    lung = np.maximum(cavity + 1.0, 1.5 - above_diaphragm)
    canvas.paint("lung", whole, lung, "lung_lower_lobe_{side}")
    # What reaches down in front of the lower lobes: the middle lobe, and the left upper lobe's lingula.
    in_front = (lung < 0.0) & (y > _FISSURE_MM)
    canvas.name("lung_middle_lobe_right", whole, in_front & (x > 0.0))
    canvas.name("lung_upper_lobe_left", whole, in_front & (x <= 0.0))
    _mediastinum(canvas)
    _muscles(canvas)
    _ribs(canvas, cavity)
    _pelvis(canvas, cavity)
    _spine(canvas)
    _iliac_vessels(canvas)
    back = _ellipse(x, y + 64.0, 54.0, 45.0)
    abdomen = intersection(intersection(cavity + 4.0, above_diaphragm + 4.0), -back)
    renal_fat = np.minimum(*(ellipsoid((x, y, z), (side * 52.0, -50.0, 22.0), (42.0, 34.0, 72.0)) for side in _SIDES))
    return Spaces(cavity, abdomen, intersection(abdomen, -renal_fat))


def _above_diaphragm(points: Points) -> np.ndarray:
    """Distance above the diaphragm: a right dome, a left one 10 mm lower, both falling away to the chest wall."""
    x, y, z = points
    front_to_back = ((y - 8.0) * (1.0 / 78.0)) ** 2
    right = 116.0 - 50.0 * (((x - 62.0) * (1.0 / 78.0)) ** 2 + front_to_back)
    left = 106.0 - 50.0 * (((x + 62.0) * (1.0 / 78.0)) ** 2 + front_to_back)
    # 0.75: the domes slope, so the way to them is shorter than the height above them.
    return np.asarray(0.75 * (z - np.maximum(right, left)))


def _mediastinum(canvas: Canvas) -> None:
    box = canvas.box((-70.0, -52.0, 60.0), (50.0, 75.0, 140.0))
    points = canvas.at(box)
    above = 1.5 - _above_diaphragm(points)
    canvas.paint("fat", box, np.maximum(ellipsoid(points, (-10.0, 8.0, 150.0), (50.0, 58.0, 90.0)), above), "inner_fat")
    canvas.paint(
        "heart", box, np.maximum(ellipsoid(points, (-16.0, 36.0, 150.0), (46.0, 30.0, 40.0)), above + 3.0), "heart"
    )


def _muscles(canvas: Canvas) -> None:
    for side in _SIDES:
        low, high = sorted((8.0 * side, 85.0 * side))
        box = canvas.box((low, -95.0, -165.0), (high, -48.0, 140.0))
        path = [(36.0 * side, -70.0, -170.0), (34.0 * side, -71.0, 150.0)]
        canvas.paint("muscle", box, tube(canvas.at(box), path, [19.0, 19.0]), "autochthon_{side}")
        box = canvas.box((low, -60.0, -165.0), (high, 32.0, 40.0))
        path = [(30.0, -42.0, 25.0), (40.0, -40.0, -30.0), (60.0, -14.0, -110.0), (72.0, 12.0, -170.0)]
        psoas = tube(canvas.at(box), [(x * side, y, z) for x, y, z in path], [6.0, 15.0, 16.0, 14.0])
        canvas.paint("muscle", box, psoas, "iliopsoas_{side}")


def _ribs(canvas: Canvas, cavity: np.ndarray) -> None:
    _, y, z = canvas.points
    # Ribs run down to the front and end in cartilage there; the lowest end above the waist.
    along = z + 0.45 * y + canvas.patient.vertebra_phase_mm
    across = np.abs(along - _RIB_PITCH_MM * np.round(along * (1.0 / _RIB_PITCH_MM))) - 4.5
    ribs = np.maximum(np.abs(cavity - 5.5) - 3.5, across)
    canvas.paint("bone", canvas.whole, np.maximum(ribs, np.maximum(18.0 + 0.5 * y - z, y - 62.0)), "bone_other")


def _pelvis(canvas: Canvas, cavity: np.ndarray) -> None:
    """Iliac wings and pubic ring as part of one shell, the muscle outside it, sacrum and hip joints."""
    box = canvas.box((-135.0, -95.0, -165.0), (135.0, 95.0, -30.0))
    points = canvas.at(box)
    x, y, z = points
    shell = ellipsoid(points, (0.0, -5.0, -85.0), (104.0, 70.0, 92.0))
    # Gluteal muscle thins out towards the crest and the groin.
    thinning = np.maximum(z + 44.0, y - 34.0) + 0.9 * np.maximum(shell, 0.0)
    gluteal = np.maximum(np.maximum(cavity[box] - 4.0, -shell), thinning)
    canvas.paint("muscle", box, gluteal, "gluteus_maximus_{side}")
    wing = np.maximum(np.abs(shell) - 5.5, z + 38.0)
    # Higher up the ring is open in front (belly) and behind (sacrum); low down the pubic bones close it in front.
    open_front = np.minimum(y - 32.0, z + 140.0)
    wing = np.maximum(wing, np.maximum(open_front, np.where(y < 0.0, 34.0 - np.abs(x), -1e3)))
    hips = [ellipsoid(points, (side * 92.0, 6.0, -156.0), (23.0, 23.0, 23.0)) for side in _SIDES]
    sacrum = ellipsoid(points, (0.0, -66.0, -108.0), (46.0, 14.0, 46.0))
    bones = [(wing, "hip_{side}"), (sacrum, "sacrum"), *((hip, "femur_{side}") for hip in hips)]
    for bone, part in bones:
        canvas.paint("bone", box, bone, part)
        canvas.paint("marrow", box, bone + 3.5)


def _spine(canvas: Canvas) -> None:
    box = canvas.box((-48.0, -95.0, -90.0), (48.0, -18.0, 140.0))
    points = canvas.at(box)
    x, y, z = points
    phase = z + canvas.patient.vertebra_phase_mm
    height = np.abs(phase - _VERTEBRA_PITCH_MM * np.round(phase * (1.0 / _VERTEBRA_PITCH_MM)))
    end = -78.0 - z
    column = np.maximum(_ellipse(x, y + 42.0, 22.0, 17.0), end)
    arch = np.maximum(np.abs(_ellipse(x, y + 67.0, 14.0, 12.0)) - 3.0, end)
    spinous = np.maximum(np.maximum(np.abs(x) - 4.0, np.abs(y + 86.0) - 8.0), np.maximum(height - 9.0, end))
    transverse = np.maximum(np.maximum(np.abs(x) - 38.0, np.abs(y + 62.0) - 5.0), np.maximum(height - 6.0, end))
    canvas.paint("disc", box, column, "IVD")
    body = np.maximum(column, height - 12.0)
    for bone in (spinous, transverse, np.maximum(arch, height - 12.0)):
        canvas.paint("bone", box, bone, "vertebra_posterior_elements")
    canvas.paint("bone", box, body, "vertebra_body")
    canvas.paint("marrow", box, body + 3.0)
    canvas.paint("canal", box, np.maximum(_ellipse(x, y + 67.0, 11.0, 9.0), end), "spinal_channel")


def _iliac_vessels(canvas: Canvas) -> None:
    """Arteries and veins of the legs: bright like their trunks, but beyond the ends that AMOS labels."""
    box = canvas.box((-75.0, -30.0, -165.0), (75.0, 60.0, -50.0))
    points = canvas.at(box)
    for side in _SIDES:
        path = [(0.0, -12.0, -66.0), (44.0 * side, 0.0, -110.0), (62.0 * side, 34.0, -165.0)]
        canvas.paint("artery", box, tube(points, path, [6.0, 6.0, 6.0]), "iliac_artery_{side}")
        path = [(12.0, -16.0, -70.0), (38.0 * side, -12.0, -110.0), (52.0 * side, 28.0, -165.0)]
        canvas.paint("vein", box, tube(points, path, [6.5, 6.5, 6.5]), "iliac_vena_{side}")


def _ellipse(x: np.ndarray, y: np.ndarray, radius_x: float, radius_y: float) -> np.ndarray:
    norm = np.sqrt((x * (1.0 / radius_x)) ** 2 + (y * (1.0 / radius_y)) ** 2)
    return np.asarray((norm - 1.0) * min(radius_x, radius_y))
