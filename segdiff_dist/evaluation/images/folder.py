"""Pairs of image and mask files as samples: listed and checked first, then stored for the evaluation.

Volumes are cut as in `segdiff prepare`: like the set of real images if there is one, else with its defaults.

Dimensions: H rows, W columns; I, J, K as in data_shards.ingest.volumes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_shards.ingest.png_files import read_png_header, read_png_ids
from data_shards.ingest.volumes import UnreadableVolume, Volume, read_labels
from data_shards.labels import LabelTable
from data_shards.modalities import grey_rule, window_of
from data_shards.problems import InputProblems, Problem, problem, refuse
from data_shards.store.set_index import file_sha256
from segdiff_dist.evaluation.images import pixels
from segdiff_dist.evaluation.images.config import ImagesConfig
from segdiff_dist.evaluation.images.pairs import DICOM, Pair, find_pairs
from segdiff_dist.evaluation.measure.subject import SPACING
from segdiff_dist.sampling.items import NO_MODALITY
from segdiff_dist.sampling.mask_files import ending
from segdiff_dist.sampling.mask_folder import cut_as, label_map
from segdiff_dist.sampling.store import LABELS, SampleStore

if TYPE_CHECKING:
    import pyarrow as pa

    from data_shards.store.shards import ShardSet

_LABEL_MAP = "--images.label-map"
_REGION = 64
_MOST_IDS = 256
# If no pixel of any image is brighter, the files may use a part of their type's range only, as 12 bits of 16.
_DARK = 63


@dataclass(frozen=True)
class Sample:
    """A slice of a pair: uint8 image and label ids, and its position."""

    pair: Pair
    axis: str
    slice_index: int | None
    image_HW: np.ndarray
    mask_HW: np.ndarray
    spacing_mm: pixels.Spacing


class ImageFolder:
    """The images of a folder with their masks. `items`: as a store has them; `size`: rows and columns of all of them.

    Every file is read once, and all problems are raised together as InputProblems: files that cannot be read or have no
    partner, unknown ids, images of several sizes. `shards`: the set of real images; volumes are cut like its slices.
    """

    def __init__(self, config: ImagesConfig, table: LabelTable, shards: ShardSet | None) -> None:
        assert config.folder is not None
        assert config.masks is not None
        assert config.modality is not None
        self.config, self.table, self.folder, self.masks = config, table, config.folder, config.masks
        self.modality: str = config.modality
        self._to_own = label_map(config.label_map, table, _LABEL_MAP)
        self._cut_as = _cutting(shards, config.size)
        window = _window(shards, config.modality)
        self._grey = pixels.Grey(config.modality, config.value_range or window, config.value_range is not None)
        self.pairs = find_pairs(config.folder, config.masks)
        self._brightest = 0
        self.items, self.size = self._listed()

    def __len__(self) -> int:
        return int(self.items.num_rows)

    @property
    def window(self) -> tuple[float, float] | None:
        """The values that become black and white."""
        return self._grey.window

    @cached_property
    def job(self) -> dict[str, Any]:
        """The entries for job.json."""
        job = {
            "images": str(self.folder.resolve()),
            "images_digest": _digest(self.folder, [pair.image for pair in self.pairs]),
            "masks": str(self.masks.resolve()),
            "masks_digest": _digest(self.masks, [pair.mask for pair in self.pairs]),
            "label_map": None if self.config.label_map is None else file_sha256(self.config.label_map),
            "images_as": self.config.recorded() | {"window": self._grey.window, "volumes_cut_as": self._cut_as},
            LABELS: self.table.described,
            "region_size": _REGION,
        }
        as_read_back: dict[str, Any] = json.loads(json.dumps(job))  # tuples are lists
        return as_read_back

    def store(self, path: Path) -> SampleStore:
        """Write the missing ones to `path`."""
        store = SampleStore.create(path, self.job, self.items, self.size)
        missing = set(store.missing_regions())
        images, masks, region = [], [], 0
        problems: list[Problem] = []  # the files have changed since the first reading
        for number, sample in enumerate(self._samples(problems)):
            images.append(sample.image_HW)
            masks.append(sample.mask_HW)
            if len(images) == _REGION or number + 1 == len(store):
                if region in missing:
                    store.write_region(region, np.stack(images), np.stack(masks))
                images, masks, region = [], [], region + 1
        refuse(problems)
        return store

    def words(self) -> str:
        """One line for the user."""
        window = self._grey.window
        ends = "" if window is None else f", {window[0]:g} and {window[1]:g} of NIfTI and DICOM"
        images = f"{len(self)} images of {self.size}x{self.size} pixels, {self.modality}"
        dark = ""
        if self._brightest <= _DARK:
            dark = f"; ALL ARE DARK: no grey value is above {self._brightest} of 255, check the range of the files"
        return f"{images}; black and white: the ends of a PNG file's range{ends}{dark}"

    def _listed(self) -> tuple[pa.Table, int]:
        import pyarrow as pa

        problems: list[Problem] = []
        first_of_size: dict[int, Pair] = {}
        items: list[dict[str, Any]] = []
        next_index: dict[tuple[str, str], int] = {}
        keys: dict[str, str] = {}
        for sample in self._samples(problems):
            first_of_size.setdefault(len(sample.image_HW), sample.pair)
            self._brightest = max(self._brightest, int(sample.image_HW.max()))
            of = (sample.pair.case_id, sample.axis)
            index = next_index.get(of, 0) if sample.slice_index is None else sample.slice_index
            next_index[of] = index + 1
            key = f"{sample.pair.case_id}-{sample.axis}-{index:04d}"
            if keys.setdefault(key, sample.pair.name) != sample.pair.name or (items and items[-1]["key"] == key):
                value = f"{keys[key]} and {sample.pair.name} are both {key}"
                problems.append(Problem(str(self.folder), "names", value, "rename one of them"))
            items.append(_item(len(items), key, sample, index, self.modality))
        if len(first_of_size) > 1:
            sizes = ", ".join(f"{size}x{size} ({pair.name})" for size, pair in sorted(first_of_size.items()))
            remedy = f"have all of them resampled: --images.size {max(first_of_size)}, for example"
            problems.append(Problem(str(self.folder), "sizes", sizes, remedy))
        refuse(problems)
        return pa.Table.from_pylist(items), next(iter(first_of_size))

    def _samples(self, problems: list[Problem]) -> Iterator[Sample]:
        """All slices in order. Problems of a pair are added to `problems`."""
        for pair in self.pairs:
            try:
                yield from self._read(pair)
            except InputProblems as error:
                problems += error.problems
            except OSError as error:
                value = f"cannot be read ({error.strerror or error})"
                problems.append(Problem(str(pair.image), "file", value, "make it readable"))

    def _read(self, pair: Pair) -> Iterator[Sample]:
        kind = ending(pair.image)
        if kind == ".png":
            image = pixels.read_png_image(pair.image)
        elif pair.image.suffix.lower() == DICOM:
            image = pixels.read_dicom(pair.image, self._grey)
        else:
            volume = pixels.read_nifti(pair.image)
            along = pixels.axis_of_flat(volume, self.config.axis)
            if along is None:
                yield from self._cut(pair, volume)
                return
            image = pixels.flat_of(pair.image, volume, along, self.config.axis, self._grey)
        yield self._flat(pair, image)

    def _flat(self, pair: Pair, image: pixels.Flat) -> Sample:
        """A pair of one slice."""
        mask_HW = self._flat_mask(pair, image)
        image_HW, spacing, size = image.image_HW, image.spacing_mm, self.config.size
        if size is not None and size != len(image_HW):
            step = len(image_HW) / size
            spacing = (spacing[0] * step, spacing[1] * step)
            image_HW, mask_HW = pixels.resampled(image_HW, size), pixels.resampled_ids(mask_HW, size)
        axis = pair.axis or image.axis or self.config.axis
        return Sample(pair, axis, pair.slice_index, image_HW, mask_HW, spacing)

    def _flat_mask(self, pair: Pair, image: pixels.Flat) -> np.ndarray:
        if ending(pair.mask) == ".png":
            header = read_png_header(pair.mask, None)
            pixels.refuse_unlike(pair.image, pair.mask, image, (header.height, header.width))
            is_known, sizes = self.config.label_map is not None, (header.width,)
            ids_HW = read_png_ids(pair.mask, sizes, _MOST_IDS, any_palette=is_known, flag=_LABEL_MAP)
            return self._to_own(pair.mask, ids_HW)
        labels = self._labels(pair.mask)
        along = pixels.axis_of_flat(labels, self.config.axis)
        if along is None:
            raise problem(pair.mask, "size", f"a volume {labels.voxels_IJK.shape}", "give the mask of this one slice")
        if image.volume is not None:
            pixels.refuse_elsewhere(pair.image, pair.mask, image.volume, labels)
        mask_HW = pixels.plane_of(labels.voxels_IJK, along)
        pixels.refuse_unlike(pair.image, pair.mask, image, mask_HW.shape)
        return mask_HW

    def _cut(self, pair: Pair, volume: Volume) -> Iterator[Sample]:
        """The slices of a volume."""
        from data_shards.ingest.body import BodyField
        from data_shards.ingest.slices import Cutting, cut

        if ending(pair.mask) == ".png":
            raise problem(pair.mask, "size", "one slice, and the image is a volume", "give a volume of labels")
        labels = self._labels(pair.mask)
        pixels.refuse_elsewhere(pair.image, pair.mask, volume, labels)
        ends = volume.values(np.array([volume.voxels_IJK.min(), volume.voxels_IJK.max()]))
        grey = self._grey.map_of(pair.image, ends)
        # Only the masks decide whether there is a class `body`.
        no_body = BodyField(np.broadcast_to(np.float32(0), volume.voxels_IJK.shape), np.ones(3))
        how = Cutting(axis=self.config.axis, body_id=0, **self._cut_as)
        for one in cut(volume, labels, no_body, grey, how):
            yield Sample(pair, self.config.axis, one.slice_index, one.image_HW, one.mask_HW, one.spacing_mm)

    def _labels(self, file: Path) -> Volume:
        """A volume of labels, in the table's ids."""
        try:
            stored = read_labels(file, _MOST_IDS, one_slice=True)
        except UnreadableVolume as error:
            raise problem(file, "voxels", error.reason, "give whole numbers from 0 to 255, one a voxel") from error
        return Volume(self._to_own(file, stored.voxels_IJK), 1.0, 0.0, stored.affine, stored.sha256)


def _item(number: int, key: str, sample: Sample, index: int, modality: str) -> dict[str, Any]:
    return {
        "item_id": number,
        "row": number,
        "key": key,
        "case_id": sample.pair.case_id,
        "source_modality": NO_MODALITY,
        "target_modality": modality,
        "axis": sample.axis,
        "slice_index": index,
        "seed_index": 0,
        "image_file": sample.pair.name,
    } | dict(zip(SPACING, map(float, sample.spacing_mm), strict=True))


def _cutting(shards: ShardSet | None, size: int | None) -> dict[str, Any]:
    """How volumes are cut."""
    return cut_as(shards) | ({} if size is None else {"size": size})


def _window(shards: ShardSet | None, modality: str) -> tuple[float, float] | None:
    """The values that become black and white in the set, or by `segdiff prepare`; None if they differ by volume."""
    from data_shards.ingest.prepare_config import PrepareConfig

    named = {} if shards is None else shards.index["preprocessing"]
    kind = grey_rule(modality, named.get("intensities") or {}).kind
    if kind == "percentiles" or (kind == "hu" and named.get("intensity", "window") != "window"):
        return None
    return window_of(modality, named, PrepareConfig().hu_window)


def _digest(folder: Path, files: Sequence[Path]) -> str:
    """sha256 over names and bytes."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(os.fsencode(file.relative_to(folder)) + bytes.fromhex(file_sha256(file)))
    return digest.hexdigest()
