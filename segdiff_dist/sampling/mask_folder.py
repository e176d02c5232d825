"""Masks of a folder: NIfTI volumes, cut as `segdiff prepare` cuts, or PNG slices; in the ids of the model's table.

First all masks are listed, from headers alone. Then the chosen ones are read, one file at a time.

Dimensions: I, J, K as in data_shards.ingest.volumes; H rows, W columns; M masks that are drawn.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_shards.ingest.png_files import kind_of, read_png_header, read_png_ids
from data_shards.labels import UNUSED, LabelTable
from data_shards.problems import InputProblems, Problem, problem, refuse
from segdiff_dist.config import read_yaml
from segdiff_dist.sampling.config import SampleConfig
from segdiff_dist.sampling.items import MASK_FILE, NO_MODALITY
from segdiff_dist.sampling.mask_files import case_id_of, ending, is_named_after, mask_files

if TYPE_CHECKING:
    import pyarrow as pa

    from data_shards.ingest.nifti import Geometry
    from data_shards.store.shards import ShardSet

_MOST_IDS = 256
_LABEL_MAP = "--sample.label-map"


@dataclass(frozen=True)
class _Listed:
    """A file of masks: the axis for the model, the axis it is cut along, and the indices of its slices. `is_slice`: the
    file is a single slice in the size of the set's slices."""

    file: Path
    axis: str
    cut_along: str
    indices: Sequence[int]
    is_slice: bool


class MaskFolder:
    """The masks of a folder. `rows`: one a mask (key, case_id, modality, axis, slice_index, and mask_file if names
    cannot be ids), in the order of the files' names; `problems`: those that the headers show.

    `model_size`: rows and columns of the model's input, the middle of the set's slices. PNG masks, and NIfTI files of
    one slice, that have this size or the size of the set's slices are taken as they are.
    """

    def __init__(self, folder: Path, shards: ShardSet, model_size: int, config: SampleConfig) -> None:
        self.folder, self.config, self.size = folder, config, shards.size
        self.sizes = (shards.size,) if model_size == shards.size else (shards.size, model_size)
        self.table = shards.label_table
        self._cut_as = cut_as(shards)
        self._to_own = label_map(config.label_map, self.table)
        self.problems: list[Problem] = []
        self._files: list[_Listed] = []
        notes: Counter[str] = Counter()
        for file in mask_files(folder):
            try:
                self._files.append(self._listed(file, notes))
            except InputProblems as error:
                self.problems += error.problems
            except OSError as error:
                self.problems.append(_unreadable(file, error))
        for note, count in notes.items():
            warnings.warn(f"{folder}: of {count} mask{'s' if count > 1 else ''}: {note}", stacklevel=2)
        self.rows = self._rows()
        self._first_row = np.cumsum([0, *(len(one.indices) for one in self._files)])

    def __len__(self) -> int:
        return int(self._first_row[-1])

    def read(self, rows: np.ndarray) -> np.ndarray:
        """uint8 [M, H, W]: the masks of some ascending rows, in the model's ids. One file is in memory at a time.

        Raises InputProblems for all problems of the folder at once: those of the headers, files that cannot be read,
        and ids that are neither in the label table nor in config.label_map.
        """
        mask_MHW = np.zeros((len(rows), self.size, self.size), np.uint8)
        problems = list(self.problems)
        file_M = np.searchsorted(self._first_row, rows, side="right") - 1
        for number in np.unique(file_M).tolist():
            at = np.flatnonzero(file_M == number)
            listed = self._files[number]
            indices = [listed.indices[row] for row in (rows[at] - self._first_row[number]).tolist()]
            try:
                for place, mask_HW in zip(at.tolist(), self._masks(listed, indices), strict=True):
                    first = (self.size - len(mask_HW)) // 2
                    mask_MHW[place, first : first + len(mask_HW), first : first + len(mask_HW)] = mask_HW
            except InputProblems as error:
                problems += error.problems
            except OSError as error:
                problems.append(_unreadable(listed.file, error))
        refuse(problems)
        return mask_MHW

    def renamed(self) -> dict[str, str]:
        """File and case id of the masks whose names cannot be ids."""
        files = (one.file.relative_to(self.folder) for one in self._files)
        return {str(file): case_id_of(file) for file in files if not is_named_after(file)}

    def _listed(self, file: Path, notes: Counter[str]) -> _Listed:
        """The contents of a file, by its header; guesses are noted in `notes`."""
        from data_shards.ingest.nifti import read_geometry
        from data_shards.ingest.slices import num_slices

        axis = self.config.masks_axis
        if ending(file) == ".png":
            read_png_header(file, self.sizes)
            return _Listed(file, axis, axis, (0,), True)
        _refuse_pictures(file)
        geometry = read_geometry(file, one_slice=True)
        notes.update(geometry.notes)
        shape, spacing_mm = _canonical(geometry)
        cut_along = axis_of(shape, axis)
        # A two-dimensional file does not hold its axis.
        given = axis if geometry.is_flat and cut_along == "axial" else cut_along
        num = num_slices(shape, spacing_mm, cut_along, self._cut_as["spacing_mm"])
        stride = self._cut_as["slice_stride"]
        # A volume thinner than half a stride gives the slice in its middle.
        indices = range(stride // 2, num, stride) or (num // 2,)
        return _Listed(file, given, cut_along, indices, _is_slice(shape, cut_along, self.sizes))

    def _rows(self) -> pa.Table:
        """A column at a time: hundreds of whole-body volumes are a hundred thousand slices."""
        import pyarrow as pa

        columns: dict[str, list[Any]] = {name: [] for name in ("key", "case_id", "axis", "slice_index", MASK_FILE)}
        for one in self._files:
            file, num = one.file.relative_to(self.folder), len(one.indices)
            case_id = case_id_of(file)
            columns["key"] += [f"{case_id}-{one.axis}-{index:04d}" for index in one.indices]
            columns["slice_index"] += one.indices
            for name, value in (("case_id", case_id), ("axis", one.axis), (MASK_FILE, _text(file))):
                columns[name] += [value] * num
        if twice := [key for key, count in Counter(columns["key"]).items() if count > 1]:
            value = f"two masks are called {twice[0]}"
            self.problems.append(Problem(str(self.folder), "names", value, "rename one of the files"))
        if not self.renamed():  # without the column, the list equals that of jobs from before it existed
            del columns[MASK_FILE]
        columns["modality"] = [NO_MODALITY] * len(columns["key"])
        return pa.table(columns)

    def _masks(self, listed: _Listed, indices: Sequence[int]) -> Iterator[np.ndarray]:
        """uint8 [H, W] in the model's ids: slices of a file."""
        from data_shards.ingest.body import BodyField
        from data_shards.ingest.intensity import GreyMap
        from data_shards.ingest.slices import VIEWS, Cutting, cut
        from data_shards.ingest.volumes import UnreadableVolume, Volume, read_labels

        file = listed.file
        if ending(file) == ".png":
            any_palette = self.config.label_map is not None
            yield self._to_own(
                file, read_png_ids(file, self.sizes, _MOST_IDS, any_palette=any_palette, flag=_LABEL_MAP)
            )
            return
        try:
            labels = read_labels(file, _MOST_IDS, one_slice=True)
        except UnreadableVolume as error:
            raise problem(file, "voxels", error.reason, "give whole numbers from 0 to 255, one a voxel") from error
        own_IJK = self._to_own(file, labels.voxels_IJK)
        if listed.is_slice:
            yield own_IJK.transpose(VIEWS[listed.cut_along])[0, ::-1, ::-1]
            return
        volume = Volume(own_IJK, 1.0, 0.0, labels.affine, labels.sha256)
        # There is no image. The label ids are passed in its place, and the grey values of the result are not used.
        no_body = BodyField(np.broadcast_to(np.float32(0), own_IJK.shape), np.ones(3))
        how = {"axis": listed.cut_along, "body_id": 0, **self._cut_as}
        for one in cut(volume, volume, no_body, GreyMap(1.0, 0.0), Cutting(indices=indices, **how)):
            yield one.mask_HW


@dataclass(frozen=True)
class ClassCounts:
    """Number of masks that show each class, int64 [256] by id, and of masks that show none."""

    num_masks_K: np.ndarray
    num_masks: int
    num_empty: int

    @classmethod
    def of(cls, masks: Iterable[np.ndarray]) -> ClassCounts:
        """Counts of uint8 [H, W] masks."""
        num_masks_K, num, num_empty = np.zeros(_MOST_IDS, np.int64), 0, 0
        for mask_HW in masks:
            num_masks_K += np.bincount(mask_HW.ravel(), minlength=_MOST_IDS) > 0
            num, num_empty = num + 1, num_empty + (not mask_HW.any())
        return cls(num_masks_K, num, num_empty)

    def words(self, table: LabelTable) -> str:
        """Id, name and number of masks of every class that occurs."""
        classes = [
            f"{i} {table.names[i] if i < table.num_classes else '?'} in {self.num_masks_K[i]:,}"
            for i in np.flatnonzero(self.num_masks_K)
        ]
        return f"classes in the {self.num_masks:,} mask{'s' if self.num_masks > 1 else ''}: {', '.join(classes)}"


def _unreadable(file: Path, error: OSError) -> Problem:
    return Problem(str(file), "file", f"cannot be read ({error.strerror or error})", "make it readable")


def cut_as(shards: ShardSet | None) -> dict[str, Any]:
    """How the set's slices were cut; without one, the defaults of `segdiff prepare`."""
    from data_shards.ingest.prepare_config import PrepareConfig

    defaults = PrepareConfig()
    names = ("size", "spacing_mm", "slice_stride", "fit", "mask_resize")
    of_the_set = {} if shards is None else shards.index["preprocessing"]
    return {name: of_the_set.get(name, getattr(defaults, name)) for name in names}


def _refuse_pictures(file: Path) -> None:
    """A picture whose file name says NIfTI is reported with its real format."""
    with file.open("rb") as stream:
        kind = kind_of(stream.read(16))
    if kind not in (None, "gzip"):
        remedy = "let its name end in .png" if kind == "PNG" else "save the mask itself as NIfTI or PNG"
        raise problem(file, "NIfTI", f"{kind} by its bytes, whatever its name", remedy)


def _canonical(geometry: Geometry) -> tuple[tuple[int, ...], np.ndarray]:
    """Shape and spacing in mm along I, J, K."""
    import nibabel as nib

    stored_of = np.argsort(nib.io_orientation(geometry.affine)[:, 0])
    return tuple(geometry.shape[d] for d in stored_of), geometry.spacing_mm[stored_of]


def axis_of(shape: Sequence[int], asked: str) -> str:
    """The axis of a volume; for a single slice, its own axis."""
    from data_shards.ingest.slices import VIEWS

    thin = [axis for axis, view in VIEWS.items() if shape[view[0]] == 1]
    return asked if asked in thin or len(thin) != 1 else thin[0]


def _is_slice(shape: Sequence[int], axis: str, sizes: Sequence[int]) -> bool:
    from data_shards.ingest.slices import VIEWS

    through, row, column = VIEWS[axis]
    return shape[through] == 1 and shape[row] == shape[column] and shape[row] in sizes


def _text(file: Path) -> str:
    return os.fsencode(file).decode(errors="replace")


def label_map(file: Path | None, table: LabelTable, flag: str = _LABEL_MAP) -> Callable[[Path, np.ndarray], np.ndarray]:
    """Turns ids of a file into the table's; unknown ids are refused, all of them at once. `flag`: the
    flag that gives `file`."""
    own_of = np.full(_MOST_IDS, -1, dtype=np.int16)
    if file is None:
        known = [i for i, name in enumerate(table.names) if name != UNUSED]
        own_of[known] = known
        remedy = f"no class of {table.name!r}: say what they mean in a {flag}"
    else:
        own_of[0] = 0
        for theirs, meant in _read_label_map(file, table).items():
            own_of[theirs] = meant
        remedy = f"{file} does not say what they mean: add them"

    def to_own(source: Path, ids: np.ndarray) -> np.ndarray:
        counts = sum(np.bincount(plane.ravel(), minlength=_MOST_IDS) for plane in ids)
        unknown = [int(i) for i in np.flatnonzero(counts) if own_of[i] < 0]
        if unknown:
            raise problem(source, "label ids", unknown, remedy)
        return own_of.clip(min=0).astype(np.uint8)[ids]

    return to_own


def _read_label_map(file: Path, table: LabelTable) -> dict[int, int]:
    """{their id: our id} of a YAML or JSON mapping to names or ids of the table."""
    known = {name: i for i, name in enumerate(table.names)} | {i: i for i in range(table.num_classes)}
    problems, meanings = [], {}
    for theirs, meant in read_yaml(file).items():
        is_id = str(theirs).isdecimal() and len(str(theirs)) <= 3 and int(theirs) < _MOST_IDS
        if not is_id:
            problems.append(Problem(str(file), "label id", repr(theirs), f"give whole numbers below {_MOST_IDS}"))
        elif not isinstance(meant, str | int) or isinstance(meant, bool) or meant not in known:
            remedy = f"choose from {', '.join(table.names)}"
            problems.append(Problem(str(file), f"label id {theirs}", repr(meant), remedy))
        else:
            meanings[int(theirs)] = known[meant]
    refuse(problems)
    return meanings
