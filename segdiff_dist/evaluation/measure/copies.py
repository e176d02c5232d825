"""Whether an image is a training image that was mirrored, turned, shifted, scaled, or changed in brightness.

Training shows its images so (data_shards.feed.augment), and a model may remember what it was shown. Coarse to fine: all
training images in all variants as means of 8x8, then the best few, at 32x32, by descent over angle, zoom and shift.

Dimensions: Q queries, N training images, V variants, C candidates, S pixels a side, D pixels.
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
# What is searched at least: more than the shipped recipes' augmentation.
_ANGLE_DEGREES, _ZOOM, _SHIFT = 15.0, 0.15, 0.06
# At 8x8 a variant half a step off is a quarter of a pixel off at the border.
_STEP_DEGREES, _STEP_ZOOM = 7.5, 0.15
_NUM_CANDIDATES = 4
# Each halves the steps of the descent: 3.75 degrees, 0.075 and 3 % of the side at first.
_NUM_HALVINGS, _ROUNDS = 5, 2
# Training images, times variants, that are warped at a time; and pairs that are refined at a time.
_ROWS_A_BLOCK = 16
_PAIRS_A_BLOCK = 512


@dataclass(frozen=True)
class Ranges:
    """How far training may have turned (degrees), scaled (fraction) and shifted (fraction of the side) its images."""

    angle: float = _ANGLE_DEGREES
    zoom: float = _ZOOM
    shift: float = _SHIFT

    @classmethod
    def of(cls, loader: dict[str, Any]) -> Ranges:
        """At least the defaults; of the `loader` section of a run's configuration."""
        angle, zoom = (float(loader.get(name) or 0.0) for name in ("rotate_degrees", "zoom"))
        return cls(max(_ANGLE_DEGREES, angle), max(_ZOOM, zoom))

    def variants(self) -> np.ndarray:
        """float32 [V, 5]: mirrored (1 or -1), angle in radians, zoom, shifts down and right in half sides."""

        def around(middle: float, reach: float, step: float) -> np.ndarray:
            return np.linspace(middle - reach, middle + reach, 2 * int(np.ceil(reach / step)) + 1)

        angles, zooms = np.deg2rad(around(0, self.angle, _STEP_DEGREES)), around(1, self.zoom, _STEP_ZOOM)
        shifts = 2 * around(0, self.shift, self.shift)
        return np.array(list(product((1.0, -1.0), angles, zooms, shifts, shifts)), np.float32)


@dataclass(frozen=True)
class CopyCandidates:
    """A worker's task: for each query in the file `queries` the training images of these rows that are most like it in
    any variant, and in which."""

    queries: Path
    rows: tuple[int, ...]
    ranges: Ranges

    def run(self, evaluator: Evaluator) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Correlation, row and variant, each [Q, C], by side."""
        import torch

        size = evaluator.store.image.shape[1]
        images_NHW = np.stack([evaluator.shards.read(row).cropped(size).image_uint8() for row in self.rows])
        with np.load(self.queries) as queries:
            coarse = {side: _normalised(_pooled(_squares(queries[f"pixels_{side}"]), _COARSE_SIDE)) for side in SIDES}
        variants = torch.from_numpy(self.ranges.variants())
        best: dict[str, list[torch.Tensor]] = {side: [] for side in SIDES}
        at: dict[str, list[torch.Tensor]] = {side: [] for side in SIDES}
        for start in range(0, len(images_NHW), _ROWS_A_BLOCK):
            block_NSS = _pooled(torch.from_numpy(images_NHW[start : start + _ROWS_A_BLOCK]).float(), _FINE_SIDE)
            n, v = len(block_NSS), len(variants)
            warped = warp(block_NSS.repeat_interleave(v, 0), variants.repeat(n, 1))
            shown_ND = _normalised(_pooled(warped, _COARSE_SIDE))
            for side in SIDES:
                correlation_QNV = (coarse[side] @ shown_ND.T).view(-1, n, v)
                values_QN, index_QN = correlation_QNV.max(dim=2)
                best[side].append(values_QN)
                at[side].append(index_QN)
        found = {}
        for side in SIDES:
            values_QN, index_QN = torch.cat(best[side], dim=1), torch.cat(at[side], dim=1)
            top = values_QN.topk(min(_NUM_CANDIDATES, values_QN.shape[1]), dim=1)
            rows_QC = np.asarray(self.rows)[top.indices.numpy()]
            found[side] = (top.values.numpy(), rows_QC, index_QN.gather(1, top.indices).numpy())
        return found


def best_candidates(
    parts: Iterable[dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]],
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Row and variant [Q, C] by side, over all parts of the training set; the lower row first where two are equal."""
    kept: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
    for part in parts:
        for side, found in part.items():
            both = [np.concatenate(pair, axis=1) for pair in zip(kept.get(side, found), found, strict=True)]
            columns = both if side in kept else list(found)
            order_QC = np.lexsort((columns[1], -columns[0]), axis=1)[:, :_NUM_CANDIDATES]
            kept[side] = tuple(np.take_along_axis(c, order_QC, axis=1) for c in columns)  # type: ignore[assignment]
    return {side: (rows_QC, variants_QC) for side, (_, rows_QC, variants_QC) in kept.items()}


@dataclass(frozen=True, eq=False)
class NearestCopy:
    """A worker's task: queries start..start+Q-1 of one side of the file, each against its candidates, refined."""

    queries: Path
    side: str
    start: int
    rows_QC: np.ndarray
    variants_QC: np.ndarray
    ranges: Ranges

    def run(self, evaluator: Evaluator) -> tuple[np.ndarray, np.ndarray]:
        """Distance [Q] to the nearest candidate in its best variant (0 where they agree up to brightness and contrast,
        1.4 where nothing does) and that one's row [Q]."""
        import torch

        size = evaluator.store.image.shape[1]
        needed, place_P = np.unique(self.rows_QC, return_inverse=True)
        images = np.stack([evaluator.shards.read(row).cropped(size).image_uint8() for row in needed.tolist()])
        small_NSS = _pooled(torch.from_numpy(images).float(), _FINE_SIDE)
        with np.load(self.queries) as queries:
            query_QSS = _squares(queries[f"pixels_{self.side}"][self.start : self.start + len(self.rows_QC)])
        training_PSS = small_NSS[torch.from_numpy(place_P.ravel())]
        begin_P5 = torch.from_numpy(self.ranges.variants()[self.variants_QC.ravel()])
        asked_PSS = query_QSS.repeat_interleave(self.rows_QC.shape[1], 0)
        blocks = (block.split(_PAIRS_A_BLOCK) for block in (training_PSS, asked_PSS, begin_P5))
        distances = [refined(*block) for block in zip(*blocks, strict=True)]
        distance_QC = torch.cat(distances).numpy().reshape(self.rows_QC.shape)
        nearest_Q = distance_QC.argmin(axis=1)
        each = np.arange(len(nearest_Q))
        return distance_QC[each, nearest_Q], self.rows_QC[each, nearest_Q]


def refined(training_PSS: torch.Tensor, query_PSS: torch.Tensor, begin_P5: torch.Tensor) -> torch.Tensor:
    """Distance [P] of pairs of images after the best change of the first, by descent from `begin` (see variants).

    sqrt(2 - 2 r), r being the correlation over pixels, so that brightness and contrast do not count.
    """
    import torch

    query_PD = _normalised(query_PSS)

    def correlation(change_P5: torch.Tensor) -> torch.Tensor:
        return (_normalised(warp(training_PSS, change_P5)) * query_PD).sum(dim=1)

    change_P5, best_P = begin_P5.clone(), correlation(begin_P5)
    steps = torch.tensor([0.0, np.deg2rad(_STEP_DEGREES) / 2, _STEP_ZOOM / 2, _SHIFT, _SHIFT])
    for _ in range(_NUM_HALVINGS):
        for _, name, sign in product(range(_ROUNDS), range(1, 5), (1.0, -1.0)):
            moved_P5 = change_P5.clone()
            moved_P5[:, name] += sign * steps[name]
            value_P = correlation(moved_P5)
            better_P = value_P > best_P
            change_P5 = torch.where(better_P[:, None], moved_P5, change_P5)
            best_P = torch.where(better_P, value_P, best_P)
        steps = steps / 2
    return (2 - 2 * best_P).clamp(min=0).sqrt()


def warp(images_PSS: torch.Tensor, change_P5: torch.Tensor) -> torch.Tensor:
    """Images float [P, S, S] mirrored, turned and zoomed about the centre, and shifted; see Ranges.variants."""
    import torch
    from torch.nn.functional import affine_grid, grid_sample

    mirror_P, angle_P, zoom_P, down_P, right_P = change_P5.unbind(dim=1)
    cos_P, sin_P = angle_P.cos() / zoom_P, angle_P.sin() / zoom_P
    rows = (torch.stack((mirror_P * cos_P, -mirror_P * sin_P, right_P), 1), torch.stack((sin_P, cos_P, down_P), 1))
    grid = affine_grid(torch.stack(rows, dim=1), [len(images_PSS), 1, *images_PSS.shape[1:]], align_corners=False)
    return grid_sample(images_PSS[:, None], grid, padding_mode="border", align_corners=False)[:, 0]


def _pooled(images_NHW: torch.Tensor, side: int) -> torch.Tensor:
    """Means over a grid of `side` squares a side; images that are smaller stay."""
    from torch.nn.functional import adaptive_avg_pool2d

    height, width = (min(side, stored) for stored in images_NHW.shape[1:])
    return adaptive_avg_pool2d(images_NHW[:, None], (height, width))[:, 0]


def _squares(flat_QD: np.ndarray) -> torch.Tensor:
    """Means of trust.small, [Q, S, S] again, in grey values."""
    import torch

    side = round(flat_QD.shape[1] ** 0.5)
    return torch.from_numpy(flat_QD.reshape(len(flat_QD), side, side)).float() * similarity.GREY_RANGE


def _normalised(images_NSS: torch.Tensor) -> torch.Tensor:
    """[N, D] of mean 0 and length 1; zero where an image is constant."""
    flat_ND = images_NSS.flatten(1)
    flat_ND = flat_ND - flat_ND.mean(dim=1, keepdim=True)
    return flat_ND / flat_ND.norm(dim=1, keepdim=True).clamp(min=1e-3)
