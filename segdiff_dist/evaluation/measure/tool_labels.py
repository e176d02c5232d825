"""Label maps of a segmenter that is a program and labels volumes: slices of a case are stacked, labelled and cut again.

They are made before anything is measured, and are read from predictions.zarr then.

Dimensions: H rows, W columns, K slices, N items.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_shards.problems import Problem
from segdiff_dist.evaluation.measure.subject import hu_window
from segdiff_dist.evaluation.metrics.columns import hu_of_slices
from segdiff_dist.evaluation.metrics.similarity import GREY_RANGE
from segdiff_dist.segmentation.tools import ToolSegmenter

if TYPE_CHECKING:
    import pyarrow as pa

    from data_shards.records import SliceMeta
    from data_shards.store.shards import ShardSet
    from segdiff_dist.evaluation.measure.worker import Evaluator
    from segdiff_dist.sampling.store import SampleStore

# A program that was trained on volumes needs some depth.
FEWEST_SLICES = 8
_EVENLY = 0.01


@dataclass(frozen=True)
class LabelVolume:
    """A worker's task: label the volume of these items, the generated ones ("gen") or their slices ("real")."""

    side: str
    ids: tuple[int, ...]

    def run(self, evaluator: Evaluator) -> np.ndarray:
        """uint8 [K, H, W] label maps."""
        from data_shards.ingest.volumes import Volume

        assert isinstance(evaluator.segmenter, ToolSegmenter)
        store, shards, size = evaluator.store, evaluator.shards, evaluator.store.image.shape[1]
        items = store.items.take(list(self.ids)).to_pylist()
        metas = [shards.meta(item["row"]) for item in items]
        if self.side == "gen":
            image_KHW = np.stack([np.asarray(store.image[i]) for i in self.ids])
        else:
            image_KHW = np.stack([shards.read(item["row"]).cropped(size).image_uint8() for item in items])
        case_id, modality = items[0]["case_id"], items[0]["target_modality"]
        values_KHW = _values(image_KHW, metas, modality, hu_window(store, shards), shards.in_hu)
        volume = Volume(values_KHW.transpose(1, 2, 0), 1.0, 0.0, affine_of(metas, (shards.size - size) // 2), "")
        with tempfile.TemporaryDirectory(prefix="segdiff-labels-") as work:
            labels_HWK = evaluator.segmenter.label(volume, modality, f"{case_id}_{self.side}", Path(work))
        return np.ascontiguousarray(labels_HWK.transpose(2, 0, 1))


def volume_tasks(items: pa.Table) -> list[LabelVolume]:
    """All volumes of the items: generated ones, and real ones where the items have real counterparts."""
    groups = _groups(items)
    own = [ids for (_, _, source, target, seed), ids in groups.items() if source == target and seed == 0]
    return [LabelVolume("gen", ids) for ids in groups.values()] + [LabelVolume("real", ids) for ids in own]


def no_volumes(store: SampleStore, shards: ShardSet | None, is_paired: bool) -> Iterator[Problem]:
    """Why the samples cannot be labelled as volumes."""
    where, field = str(store.path), "evaluate.segmenter"
    if shards is None or not is_paired:
        value = "it labels volumes, and these images have no place in one"
        yield Problem(where, field, value, "give a segmenter of slices; samples of a shard set have places")
        return
    remedy = "sample every slice of each case along one axis, once (sample.num, sample.samples_per_mask 1), or give a "
    remedy += "segmenter of slices"
    names = ("case_id", "axis")
    in_set = list(zip(*(shards.samples[name].to_pylist() for name in names), strict=True))
    for (case_id, axis, _, target, seed), ids in _groups(store.items).items():
        of = f"{case_id}, {axis}, {target}" + (f", image {seed} of each mask" if seed else "")
        metas = [shards.meta(row) for row in store.items["row"].take(list(ids)).to_pylist()]
        if len(ids) != in_set.count((case_id, axis)):
            value = f"{of}: {len(ids)} of {in_set.count((case_id, axis))} slices; it labels whole volumes"
        elif len(ids) < FEWEST_SLICES:
            value = f"{of}: {len(ids)} slices; it labels volumes, of {FEWEST_SLICES} slices at least"
        elif not is_even(metas):
            value = f"{of}: the slices are not evenly spaced"
        elif target == "CT" and np.isnan(hu_of_slices(metas, shards.in_hu)).any() and hu_window(store, shards) is None:
            value = f"{of}: the HU of its grey values are not known"
        else:
            continue
        yield Problem(where, field, value, remedy)
        return  # one says it


def affine_of(metas: list[SliceMeta], first: int) -> np.ndarray:
    """float64 [4, 4] of the stack: (row, column, slice, 1) to RAS. `first`: the row and column at which crops begin."""
    affines = [np.array(meta.affine).reshape(4, 4) for meta in metas]
    affine = affines[0].copy()
    affine[:3, 2] = (affines[-1][:3, 3] - affines[0][:3, 3]) / (len(metas) - 1)
    affine[:3, 3] += affine[:3, :2] @ (first, first)
    return np.asarray(affine)


def is_even(metas: list[SliceMeta]) -> bool:
    """Whether the slices are parallel and evenly spaced."""
    affines = np.array([np.array(meta.affine).reshape(4, 4) for meta in metas])
    steps = np.diff(affines[:, :3, 3], axis=0)
    length = float(np.linalg.norm(steps, axis=1).mean())
    is_parallel = np.allclose(affines[:, :3, :2], affines[0, :3, :2], atol=_EVENLY)
    return bool(length > 0 and is_parallel and np.allclose(steps, steps.mean(axis=0), atol=_EVENLY * length))


def _groups(items: pa.Table) -> dict[tuple[str, str, str, str, int], tuple[int, ...]]:
    """Item ids in the order of their slices, by case, axis, source and target modality, and number of the image."""
    names = ("case_id", "axis", "source_modality", "target_modality", "seed_index")
    found: dict[tuple[Any, ...], list[tuple[int, int]]] = {}
    for item in items.to_pylist():
        found.setdefault(tuple(item[name] for name in names), []).append((item["slice_index"], item["item_id"]))
    return {key: tuple(id_ for _, id_ in sorted(of)) for key, of in found.items()}


def _values(
    image_KHW: np.ndarray,
    metas: list[SliceMeta],
    modality: str,
    window: tuple[float, float] | None,
    in_hu: Sequence[str],
) -> np.ndarray:
    """int16: HU of CT, by the slice's own scale, or by the common window if the mask is of an MR; grey values of MR."""
    if modality not in in_hu:
        return image_KHW.astype(np.int16)
    hu_K2 = hu_of_slices(metas, in_hu)
    if window is not None:
        hu_K2 = np.where(np.isnan(hu_K2), (window[0], (window[1] - window[0]) / GREY_RANGE), hu_K2)
    at_black_K, per_grey_K = hu_K2.T
    return np.rint(image_KHW * per_grey_K[:, None, None] + at_black_K[:, None, None]).astype(np.int16)
