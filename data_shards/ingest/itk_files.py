"""MetaImage (.mha, .mhd) and NRRD volumes, read by SimpleITK and checked like NIfTI (docs/data.md 4).

Both formats state the number of voxels first and may keep the bytes in another file. Only a file beside the header, of
the stated size, is read: files elsewhere are not allowed.

SimpleITK is the extra `formats`; nothing imports it until such a file is read.
"""

from __future__ import annotations

import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.ingest.foreign_bytes import foreign
from data_shards.ingest.nifti import SIDE_IS_A_GUESS, Geometry, StoredAs, problems_in_space, problems_with_extent
from data_shards.problems import Problem, problem, refuse

ENDINGS = (".mha", ".mhd", ".nrrd")
# ITK counts to the left, the back and the head; we to the right, the front and the head.
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
# Both formats' headers are text of a few hundred bytes; NRRD's may carry a scanner's key-value pairs.
_MOST_HEADER_BYTES = 2**20
_BLOCK_BYTES = 2**20
_FIRST_HEADER_BYTES = 2**12
_READER = {".mha": "MetaImageIO", ".mhd": "MetaImageIO", ".nrrd": "NrrdImageIO"}
_DATA_FILE = {
    ".mha": re.compile(rb"^ElementDataFile\s*=\s*(.*?)\s*$", re.M),
    ".mhd": re.compile(rb"^ElementDataFile\s*=\s*(.*?)\s*$", re.M),
    ".nrrd": re.compile(rb"^data ?file:\s*(.*?)\s*$", re.M | re.I),
}
_HEADER_END = {
    ".mha": re.compile(rb"^ElementDataFile.*\n", re.M),
    ".mhd": re.compile(rb"^ElementDataFile.*(\n|\Z)", re.M),
    ".nrrd": re.compile(rb"\r?\n\r?\n"),
}
_IS_PACKED = {
    ".mha": re.compile(rb"^CompressedData\s*=\s*True", re.M | re.I),
    ".mhd": re.compile(rb"^CompressedData\s*=\s*True", re.M | re.I),
    ".nrrd": re.compile(rb"^encoding:(?!\s*raw)", re.M | re.I),
}
_IS_DEFLATED = _IS_PACKED | {".nrrd": re.compile(rb"^encoding:\s*(gzip|gz)\s*$", re.M | re.I)}
# As for NIfTI: one whole or floating number a voxel.
_NUMBERS = {
    "8-bit signed integer": np.int8,
    "8-bit unsigned integer": np.uint8,
    "16-bit signed integer": np.int16,
    "16-bit unsigned integer": np.uint16,
    "32-bit signed integer": np.int32,
    "32-bit unsigned integer": np.uint32,
    "64-bit signed integer": np.int64,
    "64-bit unsigned integer": np.uint64,
    "32-bit float": np.float32,
    "64-bit float": np.float64,
}
# Teem's spaces of a patient (NRRD format, "space"), of which ITK reads these; MetaIO's names of the matrix.
_ANATOMICAL = re.compile(
    rb"^space:\s*\"?(left-posterior-superior|right-anterior-superior|left-anterior-superior|LPS|RAS|LAS)\b", re.M | re.I
)
_MATRIX = re.compile(rb"^(TransformMatrix|Rotation|Orientation)\s*=", re.M)
_UNITS = {
    ".mha": re.compile(rb"^DistanceUnits\s*=\s*(.*?)\s*$", re.M),
    ".mhd": re.compile(rb"^DistanceUnits\s*=\s*(.*?)\s*$", re.M),
    ".nrrd": re.compile(rb"^space units:\s*(.*?)\s*$", re.M | re.I),
}
# MetaIO's linear function from voxels to values, which ITK does not apply.
_VALUES = re.compile(rb"^ElementToIntensityFunction(Slope|Offset)\s*=\s*(.*?)\s*$", re.M)
# Of a segmentation of 3D Slicer: what its number in the voxels is called.
_SEGMENT = re.compile(rb"^Segment(\d+)_(Name|LabelValue):=(.*?)\r?$", re.M)
# Keys of every such segmentation (3D Slicer's developer guide, "Segmentations").
_IS_SEGMENTATION = re.compile(rb"^Segment(ation|\d+)_\w+:=", re.M)
_ONE_LAYER = (
    'in its module Segmentations, under "Binary labelmap layers", press "Collapse labelmap layers", and save it again; '
    'if some overlap, tick "Force collapse to single layer" before, and the later one gets what they share'
)
_MILLIMETRES = ("mm", "millimeter", "millimeters", "millimetre", "millimetres", "?")
_RESTORE = "restore the file, or convert it to .nii.gz"


def segment_names(file: Path) -> dict[int, str]:
    """The classes by id that a segmentation of 3D Slicer names in its header; empty for another file."""
    if file.suffix.lower() != ".nrrd" or not file.is_file():
        return {}
    of_segment: dict[bytes, dict[bytes, str]] = {}
    for number, key, value in _SEGMENT.findall(_header_text(file)):
        of_segment.setdefault(number, {})[key] = value.decode("utf-8", "replace").strip()
    pairs = ((one.get(b"LabelValue", ""), one.get(b"Name", "")) for one in of_segment.values())
    return {int(number): name for number, name in pairs if number.isdecimal() and len(number) < 9 and name}


def is_segmentation(file: Path) -> bool:
    """Whether it is a segmentation as 3D Slicer saves it (.seg.nrrd), by its header."""
    return file.suffix.lower() == ".nrrd" and file.is_file() and _IS_SEGMENTATION.search(_header_text(file)) is not None


def is_itk(file: Path) -> bool:
    """Whether the file's name says one of these formats."""
    return file.suffix.lower() in ENDINGS


def files_of(file: Path) -> list[Path]:
    """The file, and the file of its voxels if that is another one."""
    data = _data_file(file)
    return [file] if data is None else [file, data]


def read_geometry(file: Path, *, one_slice: bool = False) -> Geometry:
    """Where the volume is, from its header alone. Raises InputProblems as nifti.read_geometry does."""
    reader = _reader(file)
    size, num_parts = reader.GetSize(), reader.GetNumberOfComponents()
    shape = tuple(size[:3]) if set(size[3:]) <= {1} else tuple(size)
    is_flat = one_slice and len(shape) == 2
    if (num_layers := max(num_parts, *size[3:], 1)) > 1 and is_segmentation(file):
        raise problem(file, "segments", f"in {num_layers} layers, as 3D Slicer saves segments that overlap", _ONE_LAYER)
    if len(shape) != 3 and not is_flat:
        raise problem(file, "dimensions", f"{len(shape)}-D {shape}", "give one 3-D volume a file")
    kind = simpleitk(file).GetPixelIDValueAsString(reader.GetPixelID())
    if num_parts != 1 or kind not in _NUMBERS:
        raise problem(file, "data type", f"{num_parts} x {kind}", "store one real number a voxel")
    affine = _affine(reader, is_flat)
    shape = (*shape, 1)[:3]
    notes = _notes(file)
    geometry = Geometry(shape, affine, notes, StoredAs(np.dtype(_NUMBERS[kind])), is_flat)
    problems = problems_in_space(file, affine) or problems_with_extent(file, geometry)
    refuse([*problems, *_problems_with_unit(file), *_problems_with_values(file), *_too_short(file, geometry)])
    return geometry


def read_stored(file: Path, geometry: Geometry) -> np.ndarray:
    """The voxels as stored, indexed I, J, K. Raises OSError and zlib.error for a damaged file."""
    sitk = simpleitk(file)
    _compare_checksum(file)
    try:
        voxels = sitk.GetArrayFromImage(sitk.ReadImage(str(file), imageIO=_READER[file.suffix.lower()]))
    except RuntimeError as error:
        raise OSError(_plain(error)) from error
    return np.asarray(voxels, geometry.header.get_data_dtype()).T.reshape(geometry.shape)


def write(file: Path, voxels: np.ndarray, affine: np.ndarray) -> None:
    """Write voxels, indexed I, J or I, J, K, at the place that `affine`, 4x4 to RAS mm, says."""
    sitk, num = simpleitk(file), voxels.ndim
    image = sitk.GetImageFromArray(np.ascontiguousarray(voxels.T))
    to_lps = (_LPS_TO_RAS @ affine)[:num]
    spacing = np.linalg.norm(to_lps[:, :num], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((to_lps[:, :num] / spacing).ravel().tolist())
    image.SetOrigin(to_lps[:, 3].tolist())
    sitk.WriteImage(image, str(file), True)


def _compare_checksum(file: Path) -> None:
    """Check the checksum of packed voxels, zlib's or gzip's, which ITK does not check."""
    head, data = _header_text(file), _data_file(file)
    if not _IS_DEFLATED[file.suffix.lower()].search(head):
        return
    unpacked = zlib.decompressobj(zlib.MAX_WBITS + 32)
    with (data or file).open("rb") as stream:
        stream.seek(len(head) if data is None else 0)
        while not unpacked.eof and (block := unpacked.unconsumed_tail or stream.read(_BLOCK_BYTES)):
            unpacked.decompress(block, _BLOCK_BYTES)
    if not unpacked.eof:
        raise OSError("its packed voxels end too early")


def simpleitk(where: object) -> Any:
    """The library. Raises InputProblems naming `where` it is needed, if it is not installed."""
    try:
        import SimpleITK
    except ImportError as error:
        remedy = 'pip install "segdiff-dist[formats]", or convert it to .nii.gz'
        raise problem(where, "SimpleITK", "is not installed, and reads and writes this format", remedy) from error
    return SimpleITK


def _reader(file: Path) -> Any:
    """SimpleITK's reader, with the header read."""
    sitk = simpleitk(file)
    data = _data_file(file)
    if data is not None and not data.is_file():
        raise problem(file, "data file", f"{data.name} is missing", _RESTORE)
    reader = sitk.ImageFileReader()
    reader.SetImageIO(_READER[file.suffix.lower()])  # by itself it knows endings in small letters alone
    reader.SetFileName(str(file))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        value, remedy = foreign(_start(file)) or (_plain(error), _RESTORE)
        raise problem(file, "header", f"not {file.suffix[1:].upper()} ({value})", remedy) from None
    return reader


def _start(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(_FIRST_HEADER_BYTES)


def _plain(error: Exception) -> str:
    """The last line of ITK's message, which names the problem; the lines above name the place in ITK."""
    return " ".join(str(error).strip().splitlines()[-1:])[:160]


def _header_text(file: Path) -> bytes:
    """The header alone: of NRRD up to an empty line, of MetaImage up to the line that names the voxels' file."""
    ending, head = _HEADER_END[file.suffix.lower()], b""
    try:
        with file.open("rb") as stream:
            while len(head) < _MOST_HEADER_BYTES and (block := stream.read(max(len(head), _FIRST_HEADER_BYTES))):
                head += block
                if (end := ending.search(head)) and end.end() < len(head):
                    return head[: end.end()]
    except OSError as error:
        raise problem(file, "file", f"cannot be read ({error})", _RESTORE) from None
    end = ending.search(head)
    return head if end is None else head[: end.end()]


def _data_file(file: Path) -> Path | None:
    """The file beside this header that has the voxels; None if they are in this one."""
    ending = file.suffix.lower()
    named = _DATA_FILE[ending].search(_header_text(file))
    if named is None or named[1].upper() == b"LOCAL":
        return None
    name = named[1].decode("utf-8", "replace")
    if ending != ".mhd" or not name or name != Path(name).name or name in (".", "..") or " " in name or "%" in name:
        remedy = "its voxels must be in it or, of .mhd, in one file of a plain name beside it: convert it to .nii.gz"
        raise problem(file, "data file", repr(name[:80]), remedy)
    return file.with_name(name)


def _affine(reader: Any, is_flat: bool) -> np.ndarray:
    affine = np.eye(4)
    num = reader.GetDimension()
    spacing, origin = np.array(reader.GetSpacing()), np.array(reader.GetOrigin())
    direction = np.array(reader.GetDirection()).reshape(num, num)
    used = min(num, 3)
    affine[:used, :used] = (direction * spacing)[:used, :used]
    affine[:used, 3] = origin[:used]
    if is_flat:
        affine[2, 2] = spacing.min()
    return _LPS_TO_RAS @ affine


def _notes(file: Path) -> tuple[str, ...]:
    """Notes on guesses: a NRRD without an anatomical space, or a MetaImage without a matrix, does not state its
    orientation."""
    ending, head = file.suffix.lower(), _header_text(file)
    if ending == ".nrrd":
        stated, field = _ANATOMICAL.search(head), "a `space` as left-posterior-superior"
    else:
        stated, field = _MATRIX.search(head), "a TransformMatrix"
    if stated:
        return ()
    guess = f"{SIDE_IS_A_GUESS} (columns are taken to run left, back, up)"
    return (
        f"its header has no {field.split()[-1] if ending != '.nrrd' else 'anatomical space'}: {guess}; give it {field}",
    )


def _problems_with_unit(file: Path) -> list[Problem]:
    """Units other than mm, which ITK does not read."""
    found = _UNITS[file.suffix.lower()].search(_header_text(file))
    words = [] if found is None else re.findall(r"[^\s\"]+", found[1].decode("utf-8", "replace"))
    strange = sorted({word for word in words if word.lower() not in _MILLIMETRES})
    if not strange:
        return []
    return [
        Problem(str(file), "unit", ", ".join(strange)[:60], "write the header in millimetres, or convert it to .nii.gz")
    ]


def _problems_with_values(file: Path) -> list[Problem]:
    """A slope or an offset, which ITK does not apply."""
    found = _VALUES.findall(_header_text(file)) if file.suffix.lower() != ".nrrd" else []
    return [
        Problem(
            str(file),
            f"ElementToIntensityFunction{name.decode()}",
            number.decode("utf-8", "replace")[:40],
            "write the values themselves, and take it out of the header",
        )
        for name, number in found
        if number not in ((b"1", b"1.0") if name == b"Slope" else (b"0", b"0.0"))
    ]


def _too_short(file: Path, geometry: Geometry) -> list[Problem]:
    head = _header_text(file)
    if _IS_PACKED[file.suffix.lower()].search(head):
        return []
    have = sum(one.stat().st_size for one in files_of(file)) - len(head)
    if have >= geometry.voxel_bytes:
        return []
    value = f"{geometry.shape} needs {geometry.voxel_bytes:,} bytes; truncated file of {have:,}"
    return [Problem(str(file), "shape", value, _RESTORE)]
