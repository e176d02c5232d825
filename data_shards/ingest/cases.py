"""A case of any layout: its files, and the problems that their headers show."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from data_shards.ingest.dataset_json import DATASET_FILE, file_stem
from data_shards.ingest.dicom_labels import DicomLabels
from data_shards.ingest.dicom_series import DicomSeries
from data_shards.ingest.itk_files import is_segmentation
from data_shards.ingest.nifti import SIDE_IS_A_GUESS, Geometry
from data_shards.ingest.pictures import Pixel
from data_shards.ingest.volume_files import read_geometry
from data_shards.problems import InputProblems, Problem

# Image and label headers agree if no corner of the volume differs by more than this part of a voxel.
AFFINE_TOLERANCE_VOXELS = 0.1
_WHOLE = (
    "it was cropped, or drawn on another volume, in 3D Slicer: make this image its source geometry there, and save it "
    'without the option "Crop to minimum extent"'
)

# What a case's image or labels are read from.
Source = Path | DicomSeries | DicomLabels


@dataclass(frozen=True)
class Case:
    """Image, and label if there is one. `split` is train, val or test, or empty if the layout does not state it;
    `modality` is CT, MR or another name. `notes`: texts about statements of the archive that were ignored. `patient`:
    None if each case is a patient. `organs`: instead of `label`, a file of zeros and ones for each stored id.
    `is_flat`: its files may be two-dimensional. `channel`: of an image file that has several; None if it has one.
    `num_channels`: as many as dataset.json names. `pixel`: of pictures, what they do not state. `has_stated_ending`:
    the data set says how its files end, so that a file of the same name with another ending is not meant."""

    case_id: str
    modality: str
    split: str
    image: Path | DicomSeries
    label: Path | DicomLabels | None
    notes: tuple[str, ...] = ()
    patient: str | None = None
    organs: tuple[tuple[int, Path], ...] = ()
    is_flat: bool = False
    channel: int | None = None
    num_channels: int | None = None
    pixel: Pixel | None = None
    has_stated_ending: bool = False

    def pixel_of(self, file: Source) -> Pixel | None:
        """What is said of the pixels of one of its files: those of a mask have ids."""
        if self.pixel is None or file == self.image:
            return self.pixel
        return replace(self.pixel, scale=1.0, offset=0.0, is_label=True)

    @property
    def files(self) -> list[Path]:
        """Image and masks, if each is one file."""
        return [one for one in self.sources if isinstance(one, Path)]

    @property
    def is_labelled(self) -> bool:
        """Whether it has a drawn mask."""
        return self.label is not None or bool(self.organs)

    @property
    def sources(self) -> list[Source]:
        """Image and masks."""
        return [file for file in (self.image, self.label, *(file for _, file in self.organs)) if file is not None]

    def without_split(self) -> Case:
        """The same case, in no split."""
        return replace(self, split="")


@dataclass(frozen=True)
class Listing:
    """The contents of a folder in a layout. `problems`: of the folder. `problems_of`: by case id, those of its own
    files, and by another id those of files without a case. `names`: the classes of the label files by stored id; None
    if the ids are AMOS'; `has_ids`: the data state them, and not names alone. `problems_with_names`: problems of these,
    which do not matter if the user's table names the classes. `notes`: texts about the folder: what was chosen or left
    out."""

    cases: tuple[Case, ...]
    problems: tuple[Problem, ...] = ()
    problems_of: dict[str, list[Problem]] = field(default_factory=dict)
    names: dict[int, str] | None = None
    problems_with_names: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()
    has_ids: bool = True

    @property
    def all_problems(self) -> list[Problem]:
        """Each once."""
        return list(dict.fromkeys((*self.problems, *(one for found in self.problems_of.values() for one in found))))


def problems_by_case(cases: Iterator[Case] | tuple[Case, ...]) -> dict[str, list[Problem]]:
    """By case id, the problems that headers of its files show; cases without problems are not in it."""
    found = {case.case_id: problems_with_files(case) for case in cases}
    return {case_id: problems for case_id, problems in found.items() if problems}


def num_bytes(source: Source) -> int:
    """Bytes of its files."""
    return source.stat().st_size if isinstance(source, Path) else source.num_bytes


def nifti_files(folder: Path, case_id: str) -> list[Path]:
    """The NIfTI files of a case in a folder: at most its .nii.gz and its .nii, in this order."""
    for endings in ((".nii.gz", ".nii"), (".NII.GZ", ".NII")):
        if found := [file for ending in endings if (file := folder / f"{case_id}{ending}").is_file()]:
            return found
    return []


def problems_with_files(case: Case) -> list[Problem]:
    """Problems that headers show: files that are missing, exist twice, cannot be read, or are at different places."""
    problems = list(_problems_with_copies(case))
    geometries: dict[Path, Geometry] = {}
    for file in case.files:
        if not file.is_file():
            what = "a link to a file that is not there" if file.is_symlink() else "missing, but it is named"
            remedy = f"restore it, or take the case out of the folder and of its table ({DATASET_FILE}, manifest.csv)"
            problems.append(Problem(str(file), "file", what, remedy))
            continue
        try:
            channel = case.channel if file == case.image else None
            pixel = case.pixel_of(file)
            geometries[file] = read_geometry(file, one_slice=case.is_flat, channel=channel, pixel=pixel)
        except InputProblems as error:
            problems += error.problems
    if isinstance(case.image, Path) and case.image in geometries:
        problems += _problems_with_channels(case, case.image, geometries[case.image].channel[1])
        for file, geometry in geometries.items():
            problems += _problems_with_place(case.image, geometries[case.image], file, geometry)
    return problems


def _problems_with_channels(case: Case, image: Path, num_channels: int) -> Iterator[Problem]:
    """Phases, or a channel that was left out: which one is meant cannot be known."""
    if case.num_channels not in (None, num_channels):
        remedy = f"name each channel of the files, and no other, in `modality` of {DATASET_FILE}"
        value = f"{num_channels} in the file, {case.num_channels} in {DATASET_FILE}"
        yield Problem(str(image), "channels", value, remedy)


def _problems_with_copies(case: Case) -> Iterator[Problem]:
    """One of the files was compressed or unpacked by hand, and perhaps changed since. It cannot be known which one is
    meant."""
    for file in (case.image, case.label):
        if not isinstance(file, Path) or case.has_stated_ending:
            continue
        names = [file_stem(file.name)]
        # A label may also be named as its case, if that is not the image beside it.
        if file == case.label and file.parent != getattr(case.image, "parent", None) and case.case_id not in names:
            names.append(case.case_id)
        if len(both := [one for name in names for one in nifti_files(file.parent, name)]) > 1:
            value = f"both {both[0].name} and {both[1].name}"
            yield Problem(str(file.parent), f"case id {case.case_id}", value, "keep the one that is meant")


def _problems_with_place(image: Path, of_image: Geometry, label: Path, of_label: Geometry) -> Iterator[Problem]:
    remedy = "use the label that was drawn on this image, on its grid"
    # Both are turned to canonical orientation when they are read, so the order of voxels in the files may differ.
    shape, affine = of_image.canonical
    label_shape, label_affine = of_label.canonical
    if shape != label_shape:
        remedy = _WHOLE if is_segmentation(label) else remedy
        yield Problem(str(label), "shape", f"{of_label.shape}, its image has {of_image.shape}", remedy)
        return
    moved = largest_shift_voxels(shape, affine, label_affine)
    if moved > AFFINE_TOLERANCE_VOXELS:
        guessed = "; ".join(
            f"{file.name}: {note}" for file, one in ((image, of_image), (label, of_label)) for note in one.notes
        )
        value = f"off by {moved:.2g} voxels from its image" + (f" ({guessed})" if guessed else "")
        yield Problem(str(label), "affine", value, remedy)
        return
    yield from side_problems(image, of_image, label, of_label)


def side_problems(image: Path, of_image: Geometry, label: Path, of_label: Geometry) -> Iterator[Problem]:
    """A problem if a label's voxels run against those of its image by a guess: programs choose among sform, qform and
    nothing in different ways, so the label is mirrored as likely as not."""
    guessed = [file for file, one in ((image, of_image), (label, of_label)) if one.has_guessed_side]
    if not guessed or of_image.stored_axes == of_label.stored_axes:
        return
    names = " and ".join(dict.fromkeys(f"{file.parent.name}/{file.name}" for file in guessed))
    value = f"{of_label.stored_axes}, its image {of_image.stored_axes}, and {SIDE_IS_A_GUESS} in {names}"
    remedy = "write one affine as sform and qform of both if they show the same, voxel by voxel; else the right ones"
    yield Problem(str(label), "orientation", value, remedy)


def read_header(
    file: Path, problems: list[Problem], *, one_slice: bool = False
) -> tuple[tuple[int, ...], np.ndarray] | None:
    """Shape and affine (voxel index as stored to RAS mm) of a 3-D volume; None if they cannot be used, with the reasons
    added to `problems`. Guesses give a warning; `read_geometry` returns them as text."""
    try:
        geometry = read_geometry(file, one_slice=one_slice)
    except InputProblems as error:
        problems += error.problems
        return None
    for note in geometry.notes:
        warnings.warn(f"{file}: {note}", stacklevel=2)
    return geometry.shape, geometry.affine


def largest_shift_voxels(shape: tuple[int, ...], affine: np.ndarray, other: np.ndarray) -> float:
    """The largest distance by which the other affine moves a corner of a volume, in its smallest voxel sides."""
    corners = np.array(
        [[i, j, k, 1.0] for i in (0, shape[0] - 1) for j in (0, shape[1] - 1) for k in (0, shape[2] - 1)]
    )
    moved = corners @ (affine - other).T
    return float(np.linalg.norm(moved, axis=1).max() / np.linalg.norm(affine[:3, :3], axis=0).min())
