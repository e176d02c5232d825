"""NIfTI headers: read without the voxels, checked, and the one rule for the position of a volume in space (docs/data.md
4).

nibabel decodes the header's fields; the file is opened here, so that only the header's bytes are read.
"""

from __future__ import annotations

import gzip
import logging
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.ingest.foreign_bytes import foreign
from data_shards.problems import InputProblems, Problem, problem, refuse

# Sizes and first bytes: NIfTI-1.1 (nifti1.h) and NIfTI-2 (nifti2.h); voxels follow the header and four bytes.
_HEADER_BYTES = {348: "Nifti1Header", 540: "Nifti2Header"}
_FEWEST_BYTES_BEFORE_VOXELS = {348: 352, 540: 544}
# Extensions (tables of labels, DICOM fields) are between header and voxels. They take kilobytes.
_MOST_BYTES_BEFORE_VOXELS = 64 * 2**20
# A few writers pad their files. More bytes than this after the voxels are another file, or an attack.
MOST_BYTES_BEHIND_VOXELS = 16 * 2**20
_MOST_DEFLATED = 1032  # deflate packs at most 258 bytes into two bits (RFC 1951)
# 1024 x 1024 x 2048: a whole body at 1 mm from a detector twice as fine as those in use.
_MOST_VOXELS = 2**31
# Codes of xyzt_units for space (nifti1.h). Writers often leave the unit out (0): the numbers are then millimetres.
_UNITS = {0: ("no unit", 1.0), 1: ("metres", 1000.0), 2: ("millimetres", 1.0), 3: ("micrometres", 0.001)}
# Limits of scanners for people: finer is microscopy, coarser shows no organ. A wrong unit is a factor of 1,000.
SPACING_LIMITS_MM = (0.05, 50.0)
# No person and no field of view is longer.
_LONGEST_MM = 5000.0
# pixdim and the columns of sform give the same length; writers round one of the two.
_SAME_LENGTH = 0.02
# Rounded headers leave hundredths of a degree. A tilted gantry makes 5 to 30.
_LARGEST_SHEAR_DEGREES = 1.0
# Two descriptions of the same axes; aligned to an atlas, they may differ by a little.
_SAME_AXIS_DEGREES = 5.0
# In notes of this format and of others.
SIDE_IS_A_GUESS = "which side is left is a guess"
_RESTORE = "restore the file from the archive"
_ONE_VOLUME = "give one 3-D volume a file: of a film one time, of one-hot labels the number of each voxel's class"


@dataclass(frozen=True)
class StoredAs:
    """What Geometry needs of the header of another format."""

    dtype: np.dtype[Any]

    def get_data_dtype(self) -> np.dtype[Any]:
        """Bytes of a stored voxel."""
        return self.dtype


@dataclass(frozen=True)
class Geometry:
    """The position of a file's voxels. shape: stored I, J, K; affine: 4x4, voxel index as stored to RAS mm.

    `notes`: texts about conversions and guesses; empty for most files. `header`: nibabel's. `is_flat`: the file is
    two-dimensional. `channel`: the number of the channel that is read, and of all in the file.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray
    notes: tuple[str, ...]
    header: Any
    is_flat: bool = False
    channel: tuple[int, int] = (0, 1)

    @property
    def spacing_mm(self) -> np.ndarray:
        """Distance between neighbouring voxels along each stored dimension."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)

    @property
    def canonical(self) -> tuple[tuple[int, ...], np.ndarray]:
        """Shape and affine in canonical orientation."""
        import nibabel as nib

        turned = nib.orientations.io_orientation(self.affine)
        shape = tuple(np.array(self.shape)[np.argsort(turned[:, 0])].tolist())
        return shape, self.affine @ nib.orientations.inv_ornt_aff(turned, self.shape)

    @property
    def stored_axes(self) -> str:
        """Where each stored dimension runs to, as LAS."""
        import nibabel as nib

        return "".join(map(str, nib.aff2axcodes(self.affine)))

    @property
    def has_guessed_side(self) -> bool:
        """Whether the header does not state which side is left, or states both."""
        return any(SIDE_IS_A_GUESS in note for note in self.notes)

    @property
    def voxel_bytes(self) -> int:
        """Bytes of all voxels as stored."""
        return int(np.prod(self.shape, dtype=object)) * int(self.header.get_data_dtype().itemsize)


def read_geometry(file: Path, *, one_slice: bool = False, channel: int | None = None) -> Geometry:
    """The position of the volume in a .nii or .nii.gz, from its header alone. `channel`: the volume of a file that has
    several, in a fourth dimension.

    sform is used if its code is above 0, else qform if its code is above 0, else pixdim: then the orientation is a
    guess, and a note says so. Metres and micrometres are converted. Raises InputProblems, all at once, for a file that
    is not 3-D NIfTI of real numbers, is too short for its voxels, or has a contradictory or impossible geometry.
    `one_slice`: a two-dimensional image counts as a volume of one plane, and the width of a dimension with one voxel
    does not matter.
    """
    header = _read_header(file)
    is_flat = one_slice and int(header["dim"][0]) == 2
    if one_slice:
        _give_thickness(header)
    problems: list[Problem] = []
    shape, num_channels = _shape(file, header, channel, problems)
    if header.get_data_dtype().kind not in "iuf":
        problems.append(Problem(str(file), "data type", str(header.get_data_dtype()), "store one real number a voxel"))
    problems += _problems_with_numbers(file, header)
    affine, notes = _affine(file, header, problems)
    if shape is None or affine is None:
        raise InputProblems(problems)
    geometry = Geometry(shape, affine, tuple(notes), header, is_flat, (channel or 0, num_channels))
    problems += _problems_with_size(file, geometry)
    refuse(problems)
    return geometry


def is_packed(file: Path) -> bool:
    """Whether the file is gzip, by its first bytes, whatever its name is."""
    with file.open("rb") as stream:
        return stream.read(2) == b"\x1f\x8b"


def value_scale(header: Any) -> tuple[float, float]:
    """Slope and intercept: value = voxel * slope + intercept. 1 and 0 if those of the header cannot be used, as NIfTI
    specifies for slope 0."""
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    return (slope, intercept) if slope != 0 and np.isfinite(slope) else (1.0, 0.0)


def _read_header(file: Path) -> Any:
    """nibabel's header, without extensions."""
    import nibabel as nib
    from nibabel import imageglobals

    def wrong(reason: object) -> InputProblems:
        return problem(file, "header", f"not NIfTI ({' '.join(str(reason).split())[:120]})", _RESTORE)

    try:
        with gzip.open(file, "rb") if is_packed(file) else file.open("rb") as content:
            block = content.read(max(_HEADER_BYTES))
    except (OSError, EOFError, zlib.error) as error:
        if reason := getattr(error, "strerror", None):  # of the disk, and not of gzip
            raise problem(file, "file", f"cannot be read ({reason})", "make it readable, or restore it") from error
        raise wrong(error) from error
    sizes = {int.from_bytes(block[:4], order) for order in ("little", "big")}
    size = next((n for n in _HEADER_BYTES if n in sizes), None)
    if size is None or len(block) < size:
        value, remedy = foreign(block) or ("its first bytes are not a NIfTI header", _RESTORE)
        raise problem(file, "header", f"not NIfTI ({value})", remedy)
    made = getattr(nib, _HEADER_BYTES[size])
    try:
        raw = made(block[:size], check=False)
        with _without_log(imageglobals.logger):
            header = made(block[:size])
        header.get_data_dtype(), header.get_data_shape()
    except Exception as error:  # nibabel may raise any error on such bytes
        raise wrong(error) from error
    if not bytes(raw["magic"].item()).startswith(b"n+"):
        raise wrong(f"magic {raw['magic'].item()!r}: not header and voxels in one file")
    # nibabel replaces these if they are not above 0; here they are refused.
    header["pixdim"][1:4] = raw["pixdim"][1:4]
    offset = float(raw["vox_offset"])
    if not _FEWEST_BYTES_BEFORE_VOXELS[size] <= offset <= _MOST_BYTES_BEFORE_VOXELS:
        remedy = f"voxels begin {_FEWEST_BYTES_BEFORE_VOXELS[size]} bytes to 64 MiB after the start: repair the header"
        raise problem(file, "vox_offset", f"{offset:g}", remedy)
    return header


@contextmanager
def _without_log(logger: logging.Logger) -> Iterator[None]:
    """Suppress nibabel's messages about corrected headers, which do not name the file."""
    was = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = was


def _give_thickness(header: Any) -> None:
    """Make a two-dimensional image a volume of one plane. The width of a dimension with one voxel, which nnU-Net writes
    as 999 and others as 0, becomes that of a pixel in the plane."""
    if int(header["dim"][0]) == 2:
        header["dim"][0], header["dim"][3] = 3, 1
    widths = header["pixdim"][1:4].astype(np.float64)
    rows = [header[f"srow_{name}"] for name in "xyz"]
    for d in np.flatnonzero(header["dim"][1:4] == 1).tolist():
        others = [other for other in range(3) if other != d]
        width = min((float(one) for one in widths[others] if np.isfinite(one) and one > 0), default=1.0)
        header["pixdim"][1 + d] = width
        along = np.array([row[d] for row in rows], dtype=np.float64)
        if not np.isfinite(along).all() or not along.any():
            first, second = (np.array([row[other] for row in rows], dtype=np.float64) for other in others)
            along = np.cross(first, second) * (-1.0 if d == 1 else 1.0)
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            along = along / np.linalg.norm(along) * width
        for row, step in zip(rows, along.tolist(), strict=True):
            row[d] = step


def _shape(
    file: Path, header: Any, channel: int | None, problems: list[Problem]
) -> tuple[tuple[int, int, int] | None, int]:
    """The shape of a volume, and the number of volumes."""
    shape = tuple(int(n) for n in header.get_data_shape())
    num_channels = int(np.prod(shape[3:], dtype=object))
    # Channels are in the fourth dimension, or, as vectors, in the fifth.
    if len(shape) > 3 and (set(shape[3:]) == {1} or (channel is not None and num_channels == max(shape[3:]))):
        shape = shape[:3]
    if channel is not None and not channel < num_channels:
        problems.append(Problem(str(file), "channel", str(channel), f"the file has {num_channels}, counted from 0"))
        return None, num_channels
    if len(shape) != 3:
        problems.append(Problem(str(file), "dimensions", f"{len(shape)}-D {shape}", _ONE_VOLUME))
        return None, num_channels
    if min(shape) < 1:
        problems.append(Problem(str(file), "shape", f"{shape} is empty", _RESTORE))
        return None, num_channels
    return (shape[0], shape[1], shape[2]), num_channels


def _problems_with_numbers(file: Path, header: Any) -> list[Problem]:
    slope, intercept = value_scale(header)
    if np.isfinite(intercept):
        return []
    value = f"{intercept}, though the slope is {slope:g}"
    return [Problem(str(file), "scl_inter", value, "write 0 there, or the intercept that is meant")]


def _affine(file: Path, header: Any, problems: list[Problem]) -> tuple[np.ndarray | None, list[str]]:
    """Stored voxel index to RAS mm, by the one rule, and notes; None, with the reasons in `problems`, if impossible."""
    unit_code = int(header["xyzt_units"]) & 7
    if unit_code not in _UNITS:
        known = ", ".join(f"{code} {name}" for code, (name, _) in _UNITS.items())
        problems.append(Problem(str(file), "xyzt_units", f"code {unit_code} for space", f"NIfTI has {known}"))
        return None, []
    unit, factor = _UNITS[unit_code]
    converted = f"{unit} are converted to millimetres; if the numbers are millimetres, write 2 into xyzt_units"
    notes = [] if factor == 1.0 else [converted]
    affine, said = _stated_affine(file, header, problems)
    if affine is None:
        return None, []
    notes += said
    if wrong := problems_in_space(file, affine, unit, factor):
        problems += wrong
        return None, []
    if factor != 1.0:
        # Headers hold four bytes a number: 0.004 m comes back as 4.00000019 mm, and a voxel's edge on another side.
        affine = np.round(np.diag([factor, factor, factor, 1.0]) @ affine, 5)
    return affine, notes


def problems_in_space(file: Path, affine: np.ndarray, unit: str = "millimetres", factor: float = 1.0) -> list[Problem]:
    """Why an affine cannot be that of a volume: its axes do not span space, no scanner has voxels of this size, or the
    gantry was tilted. `factor` converts its numbers from `unit` to mm."""
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    # Shown in the numbers of the header, where they must be corrected.
    lines = np.round(affine[:3], 4).tolist()
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        directions = affine[:3, :3] / spacing
        flat = not np.isfinite(affine).all() or not abs(np.linalg.det(directions)) > 1e-6
    if flat:
        return [Problem(str(file), "affine", str(lines), "the voxel axes must span space: repair the header")]
    low, high = SPACING_LIMITS_MM
    if not ((spacing * factor >= low * 0.999).all() and (spacing * factor <= high * 1.001).all()):
        value = f"{' x '.join(f'{one:.4g}' for one in spacing * factor)} mm (the header says {unit})"
        remedy = f"voxels are {low} to {high:.0f} mm wide: correct xyzt_units (mm is 2) or the numbers"
        return [Problem(str(file), "spacing", value, remedy)]
    cosine = np.abs(directions.T @ directions - np.eye(3)).max()
    shear = float(np.degrees(np.arcsin(min(1.0, cosine))))
    if shear > _LARGEST_SHEAR_DEGREES:
        remedy = "resample it to a rectangular grid (dcm2niix writes one for a tilted gantry, named *_Tilt)"
        return [Problem(str(file), "affine", f"its axes are {shear:.1f} degrees off a right angle", remedy)]
    return []


def _stated_affine(file: Path, header: Any, problems: list[Problem]) -> tuple[np.ndarray | None, list[str]]:
    """The numbers of the header, in its own unit."""
    pixdim = np.array(header["pixdim"][1:4], dtype=np.float64)
    has_pixdim = bool(np.isfinite(pixdim).all() and (pixdim > 0).all())
    qform = _qform(header)
    if int(header["sform_code"]) != 0:
        sform = np.array(header.get_sform(), dtype=np.float64)
        return sform, _compared(file, sform, qform, int(header["qform_code"]), pixdim if has_pixdim else None, problems)
    if not has_pixdim:
        remedy = "the size of a voxel must be stated: repair the header"
        problems.append(Problem(str(file), "pixdim", str(pixdim.tolist()), remedy))
        return None, []
    if int(header["qform_code"]) != 0:
        if qform is None:
            problems.append(Problem(str(file), "qform", "no rotation", "repair the header, or write an sform"))
        return qform, []
    note = f"neither qform nor sform: {SIDE_IS_A_GUESS} (columns are taken to run left, front, up)"
    note += "; look at `segdiff inspect`'s pictures, and write an sform if it is another"
    return _from_pixdim(header, pixdim), [note]


def _from_pixdim(header: Any, pixdim: np.ndarray) -> np.ndarray:
    """As nibabel and SPM read such a file: the first index goes to the left, the others to front and top, and the
    middle of the volume is the origin."""
    steps = pixdim * [-1.0, 1.0, 1.0]
    affine = np.diag([*steps, 1.0])
    shape = (*header.get_data_shape(), 1, 1, 1)[:3]
    affine[:3, 3] = -steps * (np.array(shape, dtype=np.float64) - 1.0) / 2.0
    return affine


def _qform(header: Any) -> np.ndarray | None:
    if int(header["qform_code"]) == 0:
        return None
    try:
        return np.array(header.get_qform(), dtype=np.float64)
    except Exception:  # an invalid quaternion, a negative pixdim
        return None


def _compared(
    file: Path,
    sform: np.ndarray,
    qform: np.ndarray | None,
    qform_code: int,
    pixdim: np.ndarray | None,
    problems: list[Problem],
) -> list[str]:
    """Notes on a header whose sform is taken; a contradiction in the size of a voxel goes to `problems`."""
    import nibabel as nib

    lengths = np.linalg.norm(sform[:3, :3], axis=0)
    if not np.isfinite(sform).all() or not (lengths > 0).all():
        return []
    if pixdim is not None and (np.abs(lengths - pixdim) > _SAME_LENGTH * pixdim).any():
        value = f"{np.round(lengths, 4).tolist()} by sform, {np.round(pixdim, 4).tolist()} by pixdim"
        remedy = "which is the voxel's size cannot be known: repair the header"
        problems.append(Problem(str(file), "spacing", value, remedy))
    if qform_code == 0:
        return []
    if qform is None or not np.isfinite(qform).all() or not (np.linalg.norm(qform[:3, :3], axis=0) > 0).all():
        return ["its qform is broken; sform is taken; remove the qform (code 0) if sform is right"]
    codes = ["".join(str(code) for code in nib.aff2axcodes(one)) for one in (sform, qform)]
    if codes[0] != codes[1]:
        said = f"sform says {codes[0]} and is taken, qform says {codes[1]}"
        return [f"{SIDE_IS_A_GUESS}: {said}; give the code 0 to the wrong one"]
    cosine = (sform[:3, :3] / lengths * (qform[:3, :3] / np.linalg.norm(qform[:3, :3], axis=0))).sum(axis=0)
    angle = float(np.degrees(np.arccos(np.clip(cosine, -1.0, 1.0))).max())
    if angle > _SAME_AXIS_DEGREES:
        said = f"sform and qform are turned by {angle:.0f} degrees against each other; sform is taken"
        return [f"{said}; give the code 0 to the wrong one"]
    return []


def _problems_with_size(file: Path, geometry: Geometry) -> list[Problem]:
    """Problems of the file's length, and sizes that no volume has."""
    problems = []
    shape, needed = geometry.shape, geometry.voxel_bytes * geometry.channel[1]
    length, most = file.stat().st_size, file.stat().st_size
    offset = int(geometry.header.get_data_offset())
    if is_packed(file):
        most = length * _MOST_DEFLATED
    elif length > offset + needed + MOST_BYTES_BEHIND_VOXELS:
        value = f"{length - offset - needed:,} bytes behind the voxels"
        remedy = f"the header declares fewer voxels than there are; {_RESTORE}"
        problems.append(Problem(str(file), "length", value, remedy))
    if needed > most - offset:
        value = f"{shape} needs {needed:,} bytes; truncated file: it can hold at most {max(0, most - offset):,}"
        problems.append(Problem(str(file), "shape", value, _RESTORE))
        return problems + [one for one in problems_with_extent(file, geometry) if one.field != "shape"]
    return problems + problems_with_extent(file, geometry)


def problems_with_extent(file: Path, geometry: Geometry) -> list[Problem]:
    """Sizes that no volume has: too many voxels, or too great a length."""
    problems, shape = [], geometry.shape
    if int(np.prod(shape, dtype=object)) > _MOST_VOXELS:
        value = f"{shape} is {int(np.prod(shape, dtype=object)):,} voxels"
        problems.append(Problem(str(file), "shape", value, f"at most {_MOST_VOXELS:,} are read: resample it"))
    extent = float((geometry.spacing_mm * np.array(shape)).max())
    if extent > _LONGEST_MM:
        value = f"{extent / 1000:,.1f} m long ({shape} voxels of {np.round(geometry.spacing_mm, 3).tolist()} mm)"
        problems.append(Problem(str(file), "spacing", value, "correct xyzt_units, the spacing or the shape"))
    return problems
