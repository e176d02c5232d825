"""Slices of a real data set's volumes, beside synthetic slices: cut along the same axes, to the same pixels, as the
slices of the model's set were.

Values are the volume's own, in 16 bits between its lowest and its highest, not in the set's window. Labels are the data
set's own ids, by the nearest voxel.

Dimensions: I, J, K canonical (right, anterior, superior); H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_shards.ingest.body import BodyField
from data_shards.ingest.intensity import GreyMap
from data_shards.ingest.prepare_config import PrepareConfig
from data_shards.ingest.slices import VIEWS, Cutting, cut, num_slices
from data_shards.ingest.volume_files import read_geometry
from data_shards.ingest.volumes import UnreadableVolume, Volume, read_labels, read_volume
from data_shards.problems import problem
from data_shards.records import AXES, SliceMeta, SliceRecord
from segdiff_dist.export.files import save_case
from segdiff_dist.export.samples import cropped_affine, plain_case

if TYPE_CHECKING:
    from segdiff_dist.export.real_set import RealSet
    from segdiff_dist.export.samples import FinishedSamples

_BITS = 16
_RESTORE = "restore the file, or take the case out of the data set"


@dataclass(frozen=True)
class Slicing:
    """How synthetic slices were cut. size: of the set's slices; crop: of the model's, their centre."""

    modality: str
    axes: tuple[str, ...]
    size: int
    crop: int
    spacing_mm: float
    slice_stride: int
    fit: str
    ending: str

    @classmethod
    def of(cls, samples: FinishedSamples, ending: str) -> Slicing | None:
        """None for masks of a folder, whose spacing is not kept."""
        if samples.shards is None:
            return None
        drawn = {item["axis"] for item in samples.items}
        preprocessing: Mapping[str, Any] = samples.shards.index["preprocessing"]
        names = ("spacing_mm", "slice_stride", "fit")
        how = {name: preprocessing.get(name, getattr(PrepareConfig, name)) for name in names}
        axes = tuple(axis for axis in AXES if axis in drawn)
        return cls(samples.modalities[0], axes, samples.shards.size, samples.size, ending=ending, **how)


@dataclass(frozen=True)
class RealSlices:
    """The slices of a data set's volumes."""

    real: RealSet
    how: Slicing

    @cached_property
    def names(self) -> dict[str, list[str]]:
        """The names of each case's slices, from headers. Raises InputProblems for files that cannot be read."""
        return {case: [name for *_, name in self._planned(case)] for case in (*self.real.cases, *self.real.tests)}

    @property
    def num_bytes(self) -> int:
        """Bytes of images and labels, before compression."""
        return sum(map(len, self.names.values())) * 3 * self.how.crop**2

    def write(self, folder: Path) -> None:
        """All slices into imagesTr and labelsTr, those of test cases into imagesTs and labelsTs."""
        from data_shards.progress import progress_bar

        cases = [*((case, "Tr") for case in self.real.cases), *((case, "Ts") for case in self.real.tests)]
        for case, end in progress_bar(cases, total=len(cases), desc="cut real volumes", unit="volume"):
            for name, record, is_labelled in self._cut(case, end):
                mask_HW = record.mask_HW if is_labelled else None
                save_case(folder, name, record, mask_HW, self.how.ending, end=end)

    def _planned(self, case: str) -> Iterator[tuple[str, int, str]]:
        """Axis, slice and name of each slice of a case; of a volume of one plane that plane alone."""
        shape, affine = read_geometry(self.real.image(case), one_slice=True).canonical
        spacing_mm = np.linalg.norm(affine[:3, :3], axis=0)
        stem = f"{plain_case(case)}_{self.how.modality.lower()}_real"
        for axis in self.how.axes:
            if 1 in shape and shape[VIEWS[axis][0]] != 1:
                continue
            num, stride = num_slices(shape, spacing_mm, axis, self.how.spacing_mm), self.how.slice_stride
            for index in range(stride // 2, num, stride) if num > 1 else (0,):
                yield axis, index, f"{stem}-{axis}-{index:04d}"

    def _cut(self, case: str, end: str) -> Iterator[tuple[str, SliceRecord, bool]]:
        image, labels = self._read(case, end)
        low, high = sorted(
            float(one) * image.slope + image.intercept for one in (image.voxels_IJK.min(), image.voxels_IJK.max())
        )
        grey = GreyMap.between(low, max(high, low + 1.0), _BITS)
        nowhere = BodyField(np.broadcast_to(np.float32(0), image.voxels_IJK.shape), np.ones(3))
        first = (self.how.size - self.how.crop) // 2
        window = slice(first, first + self.how.crop)
        planned: dict[str, dict[int, str]] = {}
        for axis, index, name in self._planned(case):
            planned.setdefault(axis, {})[index] = name
        for axis, name_of in planned.items():
            how = Cutting(
                axis, self.how.size, self.how.spacing_mm, 1, self.how.fit, body_id=0, indices=tuple(sorted(name_of))
            )
            for one in cut(image, labels, nowhere, grey, how):
                place = (axis, one.slice_index, "train", one.spacing_mm, cropped_affine(one.affine, first))
                values = (grey.scale, grey.offset)
                meta = SliceMeta(case, self.how.modality, *place, *values, "", (), labels is not None, "", bits=_BITS)
                record = SliceRecord(one.image_HW[window, window], one.mask_HW[window, window], meta)
                yield name_of[one.slice_index], record, labels is not None

    def _read(self, case: str, end: str) -> tuple[Volume, Volume | None]:
        """Image and label on one grid; None for a test case without a label."""
        from data_shards.ingest.masks import resampled_to_grid

        file, label = self.real.image(case), self.real.root / f"labels{end}" / f"{case}{self.real.ending}"
        try:
            image = read_volume(file, one_slice=True)
            if not label.is_file():
                return image, None
            drawn = read_labels(label, 256, one_slice=True)
            return image, resampled_to_grid(drawn, image.voxels_IJK.shape, image.affine, label)
        except UnreadableVolume as error:
            raise problem(error.file, "voxels", error.reason, _RESTORE) from error
