"""The fifteen organs of AMOS, one function each, and the unlabelled bowel that fills the space between them.

Reference frame in mm (see patient.py): +x patient right, +y anterior, +z superior; the aorta's bifurcation is near z =
-55, the diaphragm's domes near z = 110. Earlier organs have precedence: each later organ is cut clear of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from data_shards.labels import AMOS
from data_shards.phantom.canvas import Canvas, Corner
from data_shards.phantom.patient import Box
from data_shards.phantom.shapes import Points, Vector, ellipsoid, intersection, sheet, tube, union
from data_shards.phantom.trunk import Spaces

_ID = {name: AMOS.names.index(name) for name in AMOS.names}
_BOWEL_GAP_MM = 4.0


def paint_organs(canvas: Canvas, spaces: Spaces) -> None:
    """All organs that the patient has, from those with a fixed place to those that give way."""
    _great_vessels(canvas)
    _adrenals(canvas)
    _kidneys(canvas)
    _gallbladder(canvas)
    _pancreas(canvas)
    _stomach(canvas, spaces)
    _oesophagus(canvas)
    _duodenum(canvas)
    _spleen(canvas, spaces)
    _liver(canvas, spaces)
    _genital(canvas)
    _bladder(canvas)
    _bowel(canvas, spaces)


class _Organ:
    """One organ's box and points, moved and sized for this patient: shapes are written down in reference mm."""

    def __init__(self, canvas: Canvas, name: str, low: Corner, high: Corner) -> None:
        self.canvas, self.label = canvas, _ID[name]
        shift, self.size = canvas.patient.organ_shift_mm[self.label], float(canvas.patient.organ_scale[self.label])
        self.box: Box = canvas.box(low, high)
        x, y, z = canvas.at(self.box)
        self.points: Points = (x - float(shift[0]), y - float(shift[1]), z - float(shift[2]))

    def ellipsoid(self, centre: Vector, radii: Vector) -> np.ndarray:
        return ellipsoid(self.points, centre, [r * self.size for r in radii])

    def tube(self, path: Sequence[Vector], radii: Sequence[float]) -> np.ndarray:
        return tube(self.points, path, [r * self.size for r in radii])

    def place(self, tissue: str, distance: np.ndarray, *, touching: tuple[str, ...] = ()) -> np.ndarray:
        ids = tuple(_ID[name] for name in touching)
        return self.canvas.organ(self.label, tissue, self.box, distance, touching=ids)

    def paint(self, tissue: str, distance: np.ndarray) -> None:
        self.canvas.paint(tissue, self.box, distance)


def _great_vessels(canvas: Canvas) -> None:
    aorta = _Organ(canvas, "aorta", (-40.0, -36.0, -60.0), (4.0, 8.0, 140.0))
    path = [(-6.0, -8.0, -52.0), (-14.0, -8.0, 20.0), (-15.0, -9.0, 70.0), (-25.0, -20.0, 150.0)]
    aorta.place("artery", aorta.tube(path, [12.5, 13.0, 13.0, 13.0]))
    cava = _Organ(canvas, "inferior_vena_cava", (4.0, -30.0, -66.0), (42.0, 30.0, 125.0))
    path = [(20.0, -8.0, -58.0), (22.0, -6.0, 30.0), (24.0, 2.0, 70.0), (17.0, 12.0, 112.0)]
    cava.place("vein", cava.tube(path, [13.5, 14.0, 14.0, 13.5]))


def _adrenals(canvas: Canvas) -> None:
    """Inverted V or Y: an apex in front, two limbs going back, 14 mm thick (twice life) to outlast coarse grids."""
    right = _Organ(canvas, "adrenal_gland_right", (25.0, -60.0, 35.0), (68.0, -8.0, 80.0))
    path = [(38.0, -44.0), (42.0, -23.0), (57.0, -41.0)]
    right.place("adrenal", sheet(right.points, path, 57.0, 9.0, 7.0 * right.size))
    left = _Organ(canvas, "adrenal_gland_left", (-68.0, -60.0, 40.0), (-25.0, -8.0, 85.0))
    path = [(-37.0, -44.0), (-42.0, -22.0), (-56.0, -41.0)]
    left.place("adrenal", sheet(left.points, path, 62.0, 9.0, 7.0 * left.size))


def _kidneys(canvas: Canvas) -> None:
    """Upper poles lean to the spine; the sinus is fat and unlabelled, which makes the bean."""
    for name, side, z in (("kidney_right", 1.0, -6.0), ("kidney_left", -1.0, 0.0)):
        if name in canvas.patient.missing:
            continue
        low, high = sorted((24.0 * side, 104.0 * side))
        organ = _Organ(canvas, name, (low, -80.0, z - 60.0), (high, -6.0, z + 60.0))
        px, py, pz = organ.points
        leaning: Points = (px + side * 0.16 * (pz - z), py, pz)
        kidney = ellipsoid(leaning, (65.0 * side, -42.0, z), [r * organ.size for r in (27.0, 25.0, 49.0)])
        sinus = ellipsoid(leaning, (44.0 * side, -36.0, z), (17.0, 8.0, 17.0))
        kidney = organ.place("kidney_cortex", intersection(kidney, -sinus, 6.0))
        organ.paint("kidney_medulla", kidney + 9.0)


def _gallbladder(canvas: Canvas) -> None:
    if "gallbladder" in canvas.patient.missing:
        return
    organ = _Organ(canvas, "gallbladder", (45.0, 15.0, -12.0), (98.0, 82.0, 42.0))
    organ.place("bile", organ.tube([(66.0, 38.0, 22.0), (74.0, 54.0, 6.0)], [15.0, 18.0]))


def _pancreas(canvas: Canvas) -> None:
    """Head in the duodenum's C, neck before the great vessels, tail towards the spleen."""
    organ = _Organ(canvas, "pancreas", (-92.0, -30.0, -26.0), (48.0, 52.0, 62.0))
    path = [(28.0, 20.0, -4.0), (24.0, 24.0, 10.0), (-2.0, 28.0, 20.0), (-36.0, 18.0, 28.0), (-72.0, -6.0, 38.0)]
    organ.place("pancreas", organ.tube(path, [14.0, 14.0, 11.0, 11.5, 10.5]))


def _stomach(canvas: Canvas, spaces: Spaces) -> None:
    organ = _Organ(canvas, "stomach", (-105.0, -35.0, -25.0), (40.0, 82.0, 115.0))
    fundus = organ.ellipsoid((-62.0, 10.0, 72.0), (33.0, 36.0, 32.0))
    body = organ.tube([(-60.0, 18.0, 66.0), (-52.0, 44.0, 26.0), (-28.0, 54.0, 4.0)], [28.0, 24.0, 20.0])
    antrum = organ.tube([(-28.0, 54.0, 4.0), (8.0, 54.0, 6.0), (28.0, 44.0, 12.0)], [20.0, 17.0, 12.0])
    shape = union(union(fundus, body, 10.0), antrum, 8.0)
    stomach = organ.place("wall", intersection(shape, spaces.abdomen[organ.box]))
    organ.paint("stomach_fluid", stomach + 4.0)
    # The patient is on the back: air is above the fluid, in front.
    organ.paint("gas", np.maximum(stomach + 4.5, 56.0 - organ.points[1]))


def _oesophagus(canvas: Canvas) -> None:
    organ = _Organ(canvas, "esophagus", (-52.0, -28.0, 70.0), (18.0, 30.0, 140.0))
    path = [(1.0, -6.0, 150.0), (-6.0, 0.0, 112.0), (-18.0, 10.0, 94.0), (-42.0, 12.0, 84.0)]
    organ.place("oesophagus", organ.tube(path, [13.0, 13.0, 13.0, 12.0]), touching=("stomach",))


def _duodenum(canvas: Canvas) -> None:
    """Bulb, down beside the pancreatic head, across before the vena cava and aorta, up to the bowel."""
    organ = _Organ(canvas, "duodenum", (-55.0, -10.0, -62.0), (78.0, 62.0, 32.0))
    path = [(34.0, 44.0, 14.0), (52.0, 30.0, 14.0), (60.0, 16.0, -6.0), (56.0, 14.0, -32.0), (34.0, 22.0, -42.0)]
    path += [(0.0, 26.0, -40.0), (-28.0, 22.0, -30.0)]
    duodenum = organ.place("wall", organ.tube(path, [13.0] * len(path)), touching=("stomach",))
    organ.paint("duodenal_fluid", duodenum + 4.0)


def _spleen(canvas: Canvas, spaces: Spaces) -> None:
    organ = _Organ(canvas, "spleen", (-132.0, -82.0, -5.0), (-60.0, 30.0, 105.0))
    shape = organ.ellipsoid((-96.0, -28.0, 50.0), (27.0, 44.0, 42.0))
    organ.place("spleen", intersection(shape, spaces.peritoneum[organ.box]))


def _liver(canvas: Canvas, spaces: Spaces) -> None:
    """A wedge under the right dome, thick on the right, its left lobe crossing the midline in front."""
    organ = _Organ(canvas, "liver", (-70.0, -80.0, -20.0), (132.0, 85.0, 122.0))
    x, y, z = organ.points
    right = organ.ellipsoid((64.0, 0.0, 54.0), (66.0, 76.0, 64.0))
    left = organ.ellipsoid((-2.0, 38.0, 72.0), (56.0, 34.0, 30.0))
    under = 0.8 * (40.0 - 0.42 * x - 0.12 * y - z)
    shape = intersection(union(right, left, 12.0), under, 10.0)
    liver = organ.place("liver", intersection(shape, spaces.peritoneum[organ.box]))
    inside = liver + 4.0
    portal = organ.tube([(30.0, 16.0, 38.0), (58.0, 10.0, 52.0), (92.0, -10.0, 58.0)], [7.0, 6.0, 3.0])
    branch = organ.tube([(50.0, 12.0, 48.0), (66.0, 36.0, 66.0)], [5.0, 3.0])
    hepatic = organ.tube([(20.0, 12.0, 102.0), (58.0, -6.0, 90.0), (92.0, -24.0, 76.0)], [6.0, 5.0, 3.0])
    middle = organ.tube([(20.0, 14.0, 102.0), (46.0, 40.0, 84.0)], [6.0, 3.0])
    vessels = np.minimum(np.minimum(portal, branch), np.minimum(hepatic, middle))
    organ.paint("liver_vessel", np.maximum(inside, vessels))


def _genital(canvas: Canvas) -> None:
    """Uterus above and behind the bladder, or prostate below it: one label in AMOS."""
    organ = _Organ(canvas, "prostate_uterus", (-40.0, -40.0, -165.0), (40.0, 40.0, -62.0))
    if canvas.patient.is_female:
        shape = organ.tube([(0.0, -6.0, -130.0), (0.0, -2.0, -102.0)], [15.0, 24.0])
    else:
        shape = organ.ellipsoid((0.0, 6.0, -138.0), (27.0, 22.0, 18.0))
    organ.place("genital", shape)


def _bladder(canvas: Canvas) -> None:
    organ = _Organ(canvas, "urinary_bladder", (-48.0, -10.0, -150.0), (48.0, 76.0, -70.0))
    shape = organ.ellipsoid((0.0, 40.0, -112.0), (37.0, 27.0, 25.0))
    if not canvas.patient.is_female:
        shape = organ.ellipsoid((0.0, 30.0, -102.0), (39.0, 33.0, 24.0))
    bladder = organ.place("wall", shape)
    organ.paint("urine", bladder + 3.5)


_COLON = [
    (96.0, -6.0, -62.0), (102.0, -14.0, -25.0), (92.0, 12.0, -8.0), (70.0, 54.0, -22.0), (24.0, 62.0, -30.0),
    (-30.0, 62.0, -30.0), (-72.0, 52.0, -12.0), (-98.0, 22.0, 8.0), (-104.0, -12.0, -20.0), (-98.0, -8.0, -56.0),
    (-74.0, 8.0, -78.0), (-40.0, -16.0, -84.0), (-14.0, -32.0, -104.0), (0.0, -38.0, -130.0), (0.0, -38.0, -175.0),
]  # fmt: skip
_COLON_RADII = [19.0, 18.0, 16.0, 15.0, 15.0, 15.0, 15.0, 15.0, 14.0, 14.0, 13.0, 13.0, 12.0, 12.0, 11.0]
_SMALL_BOWEL_LEVELS_MM = (-58.0, -84.0)
_SMALL_BOWEL_RADIUS_MM = 11.5


def _bowel(canvas: Canvas, spaces: Spaces) -> None:
    """Colon as a frame and small bowel within it, unlabelled, cut clear of every organ; gas where it rises."""
    x, y, z = canvas.points
    bowel = np.full(x.shape, 1e3, np.float32)
    pieces: list[tuple[list[Vector], list[float]]] = [
        ([a, b], [ra, rb])
        for a, b, ra, rb in zip(_COLON[:-1], _COLON[1:], _COLON_RADII[:-1], _COLON_RADII[1:], strict=True)
    ]
    turns_xy = [(66.0, 34.0), (46.0, 2.0), (26.0, 46.0), (4.0, 16.0), (-20.0, 48.0), (-40.0, 6.0), (-62.0, 36.0)]
    for k, level in enumerate(_SMALL_BOWEL_LEVELS_MM):
        flip = (-1.0) ** k
        path = [(flip * px, py, level + 7.0 * (-1.0) ** i) for i, (px, py) in enumerate(turns_xy)]
        pieces += [([a, b], [_SMALL_BOWEL_RADIUS_MM] * 2) for a, b in pairwise(path)]
    for ends, radii in pieces:
        low, high = (
            [pick(c) + sign * max(radii) for c in zip(*ends, strict=True)] for pick, sign in ((min, -1), (max, 1))
        )
        box = canvas.box((low[0], low[1], low[2]), (high[0], high[1], high[2]))
        np.minimum(bowel[box], tube(canvas.at(box), ends, radii), out=bowel[box])
    box = canvas.box((-126.0, -60.0, -165.0), (126.0, 85.0, 40.0))
    bowel = intersection(bowel[box], np.maximum(spaces.cavity[box] + 3.0, _BOWEL_GAP_MM - canvas.organ_distance[box]))
    canvas.paint("wall", box, bowel, "intestine")
    canvas.paint("chyme", box, bowel + 3.0)
    x, y, z = canvas.at(box)
    phase = canvas.patient.vertebra_phase_mm
    bubbles = 9.0 * (0.35 - np.cos(x * (1.0 / 13.0) + phase) * np.cos(z * (1.0 / 11.0) - phase)) - 0.12 * (y - 20.0)
    canvas.paint("gas", box, np.maximum(bowel + 4.5, bubbles))
