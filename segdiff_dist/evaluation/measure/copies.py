"""Whether an image is a training image that was mirrored, turned, shifted, scaled, cropped, or changed in brightness.

Training changes its images in these ways (data_shards.feed.augment), and a model may remember a changed image. The
search goes from coarse to fine. First all training slices are compared, mirrored, turned and scaled, as means of 8x8
pixels an image, at every place where training may have cut the image out. Then the best few are refined by descent over
angle, zoom and place, at 32x32 and at last from up to 64x64.

Dimensions: Q queries, N training slices, V variants (mirrored, angle, zoom), O places, C candidates, P pairs,
S pixels a side of an image, T of a slice at the same scale, D pixels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from segdiff_dist.evaluation.metrics import similarity
from segdiff_dist.evaluation.metrics.columns import SIDES

if TYPE_CHECKING:
    import torch

    from segdiff_dist.evaluation.measure.worker import Evaluator

_COARSE_SIDE, _FINE_SIDE = 8, 32
# The least range of the search: more than the augmentation of the shipped recipes.
_ANGLE_DEGREES, _ZOOM = 15.0, 0.15
# At 8x8 a variant half a step off is a quarter of a pixel off at the border.
_STEP_DEGREES, _STEP_ZOOM = 7.5, 0.15
# Places are half a pixel of 8x8 apart, a sixteenth of the side. One more than training used is searched either way.
_STEP_PLACE = 1 / 16
_NUM_CANDIDATES = 4
# Correlations that are held at a time (64 MiB), and pairs that are refined at a time.
_MOST_CORRELATIONS = 2**24
_PAIRS_A_BLOCK = 512
# Seconds of one core of an AMD EPYC, as measured: reading a slice and its features at 256x256; a variant at a place;
# its correlation with one query; the refinement of one query.
_FEATURES_S, _VARIANT_S, _CORRELATION_S, _REFINED_S = 0.025, 1.1e-5, 7e-9, 0.03


@dataclass(frozen=True)
class Descent:
    """How pairs are refined: images of `side` pixels, or as many as they have.

    The first steps are `first_step` times half a variant's step and a place's step. They are halved `num_halvings`
    times. Each is tried `rounds` times in every direction.
    """

    side: int
    first_step: float
    num_halvings: int
    rounds: int


# The second uses pixels, since means of 32x32 depend on the place where a crop begins.
_DESCENTS = (Descent(_FINE_SIDE, 1.0, 5, 2), Descent(64, 0.25, 3, 1))


@dataclass(frozen=True)
class Ranges:
    """The changes that training may have made to its slices: turned (degrees), scaled (fraction), and cropped, at the
    middle or `anywhere`."""

    angle: float = _ANGLE_DEGREES
    zoom: float = _ZOOM
    anywhere: bool = False

    @classmethod
    def of(cls, loader: dict[str, Any] | None) -> Ranges:
        """From the `loader` section of a run's configuration, and at least the defaults. None: the section is not
        known."""
        known = loader or {}
        angle, zoom = (float(known.get(name) or 0.0) for name in ("rotate_degrees", "zoom"))
        anywhere = loader is None or known.get("crop") == "random"
        return cls(max(_ANGLE_DEGREES, angle), max(_ZOOM, zoom), anywhere)

    def variants(self) -> np.ndarray:
        """float32 [V, 3]: mirrored (1 or -1), angle in radians, zoom."""

        def around(middle: float, reach: float, step: float) -> np.ndarray:
            return np.linspace(middle - reach, middle + reach, 2 * int(np.ceil(reach / step)) + 1)

        angles, zooms = np.deg2rad(around(0, self.angle, _STEP_DEGREES)), around(1, self.zoom, _STEP_ZOOM)
        return np.array(list(product((1.0, -1.0), angles, zooms)), np.float32)

    def num_places(self, room: float) -> int:
        """Number of places along an axis; the middle one is that of the slice. `room`: how much larger the slice is
        than the image, in sides of the image."""
        return 2 * (int(np.ceil(room / 2 / _STEP_PLACE)) * self.anywhere + 1) + 1

    def seconds(self, num_queries: int, num_training: int, side: int, room: float) -> float:
        """How long one core of a CPU takes to compare so many images of both sides together, `side` pixels wide, with
        so many training slices: their features, the coarse search, the refinement."""
        shown = len(self.variants()) * self.num_places(room) ** 2
        a_slice = _FEATURES_S * (side / 256) ** 2 + shown * (_VARIANT_S + _CORRELATION_S * num_queries)
        return num_training * a_slice + num_queries * _REFINED_S


@dataclass(frozen=True)
class CopyCandidates:
    """A worker's task: for each query in the file `queries` the most similar training slices of these rows, in any
    variant at any place, with the change (see warp)."""

    queries: Path
    rows: tuple[int, ...]
    ranges: Ranges

    def run(self, evaluator: Evaluator) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Correlation [Q, C], row [Q, C] and change [Q, C, 5], by side."""
        import torch

        with np.load(self.queries) as queries:
            wanted = {side: _normalised(_pooled(_squares(queries[f"pixels_{side}"]), _COARSE_SIDE)) for side in SIDES}
        values: dict[str, list[torch.Tensor]] = {side: [] for side in SIDES}
        indices: dict[str, list[torch.Tensor]] = {side: [] for side in SIDES}
        variants_V3 = torch.from_numpy(self.ranges.variants())
        size = evaluator.store.image.shape[1]
        places = 1
        for row in self.rows:
            slice_1TT, room = _slices(evaluator, [row], size, _FINE_SIDE)
            places = self.ranges.num_places(room)
            shown_KD = _windows(slice_1TT, variants_V3, places, room)
            for side, query_QD in wanted.items():
                parts = query_QD.split(max(1, _MOST_CORRELATIONS // len(shown_KD)))
                best = [(part @ shown_KD.T).max(dim=1) for part in parts]
                values[side].append(torch.cat([one.values for one in best]))
                indices[side].append(torch.cat([one.indices for one in best]))
        candidates = {}
        for side in SIDES:
            values_QN, index_QN = torch.stack(values[side], dim=1), torch.stack(indices[side], dim=1)
            top = values_QN.topk(min(_NUM_CANDIDATES, values_QN.shape[1]), dim=1)
            rows_QC = np.asarray(self.rows)[top.indices.numpy()]
            changes_QC5 = _changes(index_QN.gather(1, top.indices), variants_V3, places)
            candidates[side] = (top.values.numpy(), rows_QC, changes_QC5.numpy())
        return candidates


def best_candidates(
    parts: Iterable[dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]],
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Row [Q, C] and change [Q, C, 5] by side, over all parts of the training set; the lower row first where two are
    equal."""
    kept: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
    for part in parts:
        for side, new in part.items():
            both = [np.concatenate(pair, axis=1) for pair in zip(kept.get(side, new), new, strict=True)]
            columns = both if side in kept else list(new)
            order_QC = np.lexsort((columns[1], -columns[0]), axis=1)[:, :_NUM_CANDIDATES]
            each_Q1 = np.arange(len(order_QC))[:, None]
            kept[side] = (columns[0][each_Q1, order_QC], columns[1][each_Q1, order_QC], columns[2][each_Q1, order_QC])
    return {side: (rows_QC, changes_QC5) for side, (_, rows_QC, changes_QC5) in kept.items()}


@dataclass(frozen=True, eq=False)
class NearestCopy:
    """A worker's task: queries start..start+Q-1 of one side of the file, each against its candidates, refined."""

    queries: Path
    side: str
    start: int
    rows_QC: np.ndarray
    changes_QC5: np.ndarray

    def run(self, evaluator: Evaluator) -> tuple[np.ndarray, np.ndarray]:
        """Distance [Q] to the nearest candidate after its best change, and the row [Q] of that candidate.

        sqrt(2 - 2 r) of the correlation r: 0 where they agree up to brightness and contrast, 1.4 where they are not
        correlated.
        """
        import torch

        needed, of_needed = np.unique(self.rows_QC, return_inverse=True)
        size = evaluator.store.image.shape[1]
        with np.load(self.queries) as queries:
            query_QSS = _squares(queries[f"pixels_{self.side}"][self.start : self.start + len(self.rows_QC)])
        query_PD = _normalised(query_QSS).repeat_interleave(self.rows_QC.shape[1], 0)
        place_P = torch.from_numpy(of_needed.ravel())
        change_P5 = torch.from_numpy(self.changes_QC5.reshape(-1, 5))
        for descent in _DESCENTS:
            slices_NTT, room = _slices(evaluator, needed.tolist(), size, min(descent.side, size))
            blocks = zip(*(pairs.split(_PAIRS_A_BLOCK) for pairs in (place_P, query_PD, change_P5)), strict=True)
            refined = [descended(slices_NTT[place], query, change, room, descent) for place, query, change in blocks]
            change_P5, correlation_P = (torch.cat(parts) for parts in zip(*refined, strict=True))
        distance_QC = (2 - 2 * correlation_P).clamp(min=0).sqrt().numpy().reshape(self.rows_QC.shape)
        nearest_Q = distance_QC.argmin(axis=1)
        each = np.arange(len(nearest_Q))
        return distance_QC[each, nearest_Q], self.rows_QC[each, nearest_Q]


def descended(
    slices_PTT: torch.Tensor, query_PD: torch.Tensor, begin_P5: torch.Tensor, room: float, descent: Descent
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best change [P, 5] of each slice for its query, by coordinate descent from `begin` (see warp), and the
    correlation [P] there. Correlations are over pixels, so that brightness and contrast do not count."""
    import torch

    # Slices have descent.side pixels an image, or as many as the image has.
    side = min(descent.side, round(slices_PTT.shape[-1] / (1 + room)))

    def correlation(change_P5: torch.Tensor) -> torch.Tensor:
        return (_normalised(_fine(warp(slices_PTT, change_P5, room, side))) * query_PD).sum(dim=1)

    change_P5, best_P = begin_P5.clone(), correlation(begin_P5)
    steps = torch.tensor([0.0, np.deg2rad(_STEP_DEGREES) / 2, _STEP_ZOOM / 2, _STEP_PLACE, _STEP_PLACE])
    steps *= descent.first_step
    for _ in range(descent.num_halvings):
        for _, name, sign in product(range(descent.rounds), range(1, 5), (1.0, -1.0)):
            moved_P5 = change_P5.clone()
            moved_P5[:, name] += sign * steps[name]
            value_P = correlation(moved_P5)
            better_P = value_P > best_P
            change_P5 = torch.where(better_P[:, None], moved_P5, change_P5)
            best_P = torch.where(better_P, value_P, best_P)
        steps /= 2
    return change_P5, best_P


def warp(
    slices_PTT: torch.Tensor, change_P5: torch.Tensor, room: float = 0.0, side: int = _FINE_SIDE, extent: float = 1.0
) -> torch.Tensor:
    """Images float [P, S, S] of `side` pixels that are cut out of slices; what is outside of a slice is 0, as in
    training.

    `change`: mirrored (1 or -1), angle in radians, zoom, and the place of the image's middle: down and right of the
    slice's, in half sides of an image. `room`: how much larger a slice is than an image, in sides of an image.
    `extent`: of the result, in sides of an image.
    """
    import torch
    from torch.nn.functional import affine_grid, grid_sample

    mirror_P, angle_P, zoom_P, down_P, right_P = change_P5.unbind(dim=1)
    cos_P, sin_P = extent * angle_P.cos() / zoom_P, extent * angle_P.sin() / zoom_P
    rows = (torch.stack((mirror_P * cos_P, -mirror_P * sin_P, right_P), 1), torch.stack((sin_P, cos_P, down_P), 1))
    matrix_P23 = torch.stack(rows, dim=1) / (1 + room)
    grid = affine_grid(matrix_P23, [len(slices_PTT), 1, side, side], align_corners=False)
    return grid_sample(slices_PTT[:, None], grid, align_corners=False)[:, 0]


def _windows(slice_1TT: torch.Tensor, variants_V3: torch.Tensor, places: int, room: float) -> torch.Tensor:
    """A slice in every variant, cut at places x places, as normalised means of 8x8: [V * O, D]."""
    import torch
    from torch.nn.functional import avg_pool2d, unfold

    num, half = len(variants_V3), _FINE_SIDE // _COARSE_SIDE // 2  # the step from place to place, in pixels
    side = _FINE_SIDE + half * (places - 1)
    change_V5 = torch.cat((variants_V3, torch.zeros(num, 2)), dim=1)
    shown_VTT = warp(slice_1TT.expand(num, -1, -1), change_V5, room, side, side / _FINE_SIDE)
    means_VTT = avg_pool2d(avg_pool2d(shown_VTT[:, None], half), 2, stride=1)
    windows_VDO = unfold(means_VTT, _COARSE_SIDE, dilation=2)
    return _normalised(windows_VDO.transpose(1, 2).flatten(0, 1))


def _changes(index_QC: torch.Tensor, variants_V3: torch.Tensor, places: int) -> torch.Tensor:
    """The changes [Q, C, 5] for warp of rows of _windows. Training moves a slice after turning it, warp before."""
    import torch

    mirror_QC, angle_QC, zoom_QC = variants_V3[index_QC // places**2].unbind(dim=-1)
    down_QC, right_QC = (
        (at - places // 2) * 2 * _STEP_PLACE for at in (index_QC // places % places, index_QC % places)
    )
    cos_QC, sin_QC = angle_QC.cos() / zoom_QC, angle_QC.sin() / zoom_QC
    moved = (sin_QC * right_QC + cos_QC * down_QC, mirror_QC * (cos_QC * right_QC - sin_QC * down_QC))
    return torch.stack((mirror_QC, angle_QC, zoom_QC, *moved), dim=-1)


def _slices(evaluator: Evaluator, rows: list[int], size: int, side: int) -> tuple[torch.Tensor, float]:
    """Uncropped slices [N, T, T], scaled so that an image of `size` pixels has `side` pixels; and the room, see
    warp."""
    import torch

    slices_NHW = torch.from_numpy(np.stack([evaluator.shards.read(row).image_uint8() for row in rows])).float()
    stored = slices_NHW.shape[-1]
    return _pooled(slices_NHW, round(side * stored / size)), stored / size - 1


def _pooled(images_NHW: torch.Tensor, side: int) -> torch.Tensor:
    """Means over a grid of `side` squares a side; smaller images do not change."""
    from torch.nn.functional import adaptive_avg_pool2d

    height, width = (min(side, stored) for stored in images_NHW.shape[1:])
    return adaptive_avg_pool2d(images_NHW[:, None], (height, width))[:, 0]


def _fine(images_NSS: torch.Tensor) -> torch.Tensor:
    """Images as 32x32, as trust.downscaled makes them; smaller ones are interpolated."""
    from torch.nn.functional import interpolate

    pooled_NSS = _pooled(images_NSS, _FINE_SIDE)
    if pooled_NSS.shape[-1] == _FINE_SIDE:
        return pooled_NSS
    return interpolate(pooled_NSS[:, None], (_FINE_SIDE, _FINE_SIDE), mode="bilinear", align_corners=False)[:, 0]


def _squares(flat_QD: np.ndarray) -> torch.Tensor:
    """Means of trust.downscaled as images again, [Q, 32, 32], in grey values."""
    import torch

    side = round(flat_QD.shape[1] ** 0.5)
    return _fine(torch.from_numpy(flat_QD.reshape(len(flat_QD), side, side)).float() * similarity.GREY_RANGE)


def _normalised(images_NSS: torch.Tensor) -> torch.Tensor:
    """[N, D] of mean 0 and length 1 of images or of rows of pixels; zero where one is constant."""
    flat_ND = images_NSS.flatten(1)
    flat_ND = flat_ND - flat_ND.mean(dim=1, keepdim=True)
    return flat_ND / flat_ND.norm(dim=1, keepdim=True).clamp(min=1e-3)
