"""Slices as pictures: PNG, and JPEG and TIFF as other programs write them.

A picture states neither spacing nor the meaning of its grey values. A table of its folder or a setting does.
Dimensions: H rows, W columns.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.ingest.nifti import Geometry, StoredAs, problems_in_space
from data_shards.ingest.png_files import (
    check_orientation,
    grey_of,
    kind_of,
    orientation_of,
    read_png_grey,
    read_png_header,
    read_png_ids,
)
from data_shards.problems import InputProblems, Problem, problem, refuse

_JPEG, _TIFF = (".jpg", ".jpeg"), (".tif", ".tiff")
ENDINGS = (".png", *_JPEG, *_TIFF)
_MOST_BYTES = 64 * 2**20
_MOST_PIXELS = 8192 * 8192
_STATE_IT = "say the side of a pixel in mm with --prepare.pixel-mm"
# For pictures of a modality that is in HU.
VALUES_OF_A_PICTURE = (
    '--prepare.intensities {modality} "values 0 255" takes 8-bit grey values as they are; columns `scale` and `offset` '
    "of a manifest.csv make them HU"
)
_RESTORE = "restore the file"
_PHOTOMETRIC = 262
# Pillow's modes of one number a pixel, and their types; of colours, with the number of channels.
_NUMBERS = {"1": np.uint8, "L": np.uint8, "I;16": np.uint16, "I;16B": np.uint16, "I": np.int32, "F": np.float32}
_COLOURS = ("RGB", "RGBA", "LA")


@dataclass(frozen=True)
class Pixel:
    """What is said of a picture elsewhere. spacing_mm: between rows and between columns; None: nobody says it. Value =
    grey * scale + offset. `table`: where it can be said besides the settings."""

    spacing_mm: tuple[float, float] | None = None
    scale: float = 1.0
    offset: float = 0.0
    is_label: bool = False
    table: str | None = None

    @property
    def has_values(self) -> bool:
        """Whether grey values have a stated meaning."""
        return (self.scale, self.offset) != (1.0, 0.0)


def is_unsigned(file: Path) -> bool:
    """Whether its format holds no numbers below 0, so that they are no HU."""
    return not file.name.lower().endswith(_TIFF)


def picture_stem(name: str) -> str | None:
    """The name without its ending; None if it is not a picture's, or a hidden file's."""
    ending = next((one for one in ENDINGS if name.lower().endswith(one)), None)
    return None if ending is None or name.startswith(".") else name[: -len(ending)]


def is_picture(file: Path) -> bool:
    """Whether the file's name says one of these formats."""
    return picture_stem(file.name) is not None


def unstated_spacing(where: Path, pixels: Sequence[Pixel]) -> list[Problem]:
    """One problem in place of one for each file, if nothing states the spacing of any picture."""
    if not pixels or any(pixel.spacing_mm is not None for pixel in pixels):
        return []
    return [Problem(str(where), "spacing", f"{len(pixels):,} pictures do not state it", _state_it(pixels[0]))]


def _state_it(pixel: Pixel) -> str:
    return _STATE_IT + ("" if pixel.table is None else f", or in a column `spacing_mm` of {pixel.table}")


def read_geometry(file: Path, pixel: Pixel) -> Geometry:
    """A picture as a volume of one axial plane, W x H x 1, at the origin, from its header. Raises InputProblems."""
    (width, height), dtype, notes = _header(file, pixel.is_label)
    if pixel.spacing_mm is None:
        raise problem(file, "spacing", "a picture does not state it", _state_it(pixel))
    rows, columns = pixel.spacing_mm
    affine = np.diag([-columns, -rows, min(rows, columns), 1.0])
    refuse(problems_in_space(file, affine))
    return Geometry((width, height, 1), affine, notes, StoredAs(np.dtype(dtype)), is_flat=True)


def read_stored(file: Path, geometry: Geometry, pixel: Pixel) -> tuple[np.ndarray, str]:
    """The numbers of the pixels, indexed I, J, K, and the file's sha256. Raises InputProblems, OSError."""
    if file.stat().st_size > _MOST_BYTES:
        raise problem(file, "picture", f"{file.stat().st_size:,} bytes", "write it again, as PNG")
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    if _is_png(file):
        numbers_HW = read_png_ids(file, None, 256) if pixel.is_label else read_png_grey(file)
    else:
        numbers_HW = _decoded(file)
    return numbers_HW.T.reshape(geometry.shape), sha256


def _is_png(file: Path) -> bool:
    return file.suffix.lower() == ".png"


def _header(file: Path, is_label: bool) -> tuple[tuple[int, int], type, tuple[str, ...]]:
    """Width and height, the type of a pixel, and what to say of it."""
    if _is_png(file):
        with file.open("rb") as stream:
            kind = kind_of(stream.read(16))
        if not is_label and kind not in ("PNG", None):
            raise problem(file, "PNG", f"{kind} by its bytes, whatever its name", "give it the ending of its format")
        header = read_png_header(file, None, colours=not is_label)
        return (header.width, header.height), np.uint16 if header.depth == 16 else np.uint8, ()
    if is_label and file.suffix.lower() in _JPEG:
        remedy = "JPEG changes the ids it stores: save the mask, as it was drawn, as PNG"
        raise problem(file, "label", "JPEG", remedy)
    with _opened(file) as picture:
        colours = f"{picture.mode} pixels"
        dtype = _NUMBERS.get(picture.mode)
        if dtype is None and (is_label or picture.mode not in _COLOURS):
            raise problem(file, "picture", colours, "save one grey value, or one label id, a pixel")
        is_lossy = picture.format == "JPEG"
        notes = ("a JPEG: its grey values are not exactly those that were saved; give PNG if there is one",)
        return picture.size, dtype or np.uint8, notes if is_lossy else ()


def _decoded(file: Path) -> np.ndarray:
    """[H, W] of a JPEG or TIFF."""
    with _opened(file) as picture:
        mode = picture.mode
        check_orientation(file, orientation_of(picture))
        numbers = np.asarray(picture)
    if mode in _COLOURS:
        return grey_of(file, numbers, has_alpha=mode != "RGB")
    numbers = numbers.astype(_NUMBERS[mode])
    if numbers.dtype.kind == "f" and not np.isfinite(numbers).all():
        raise problem(file, "picture", "values that are not finite", _RESTORE)
    return numbers


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """Pillow's picture, decoded when it is used. Raises InputProblems: another format, several pages, too large; and
    for damage that the block meets."""
    from PIL import Image

    kind = "JPEG" if file.suffix.lower() in _JPEG else "TIFF"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(file.read_bytes()), formats=[kind]) as picture:
                refuse([*_picture_problems(file, picture), *_turned_grey(file, picture)])
                yield picture
    except InputProblems:
        raise
    except Exception as error:  # Pillow may raise any error on such bytes
        reason = " ".join(str(error).split())[:120].replace(str(file), file.name)
        raise problem(file, kind, f"cannot be read ({reason})", f"{_RESTORE}, or save it as PNG") from error


def _turned_grey(file: Path, picture: Any) -> list[Problem]:
    """A TIFF whose 0 is white (PhotometricInterpretation 0, TIFF 6.0 page 37). Pillow turns 1 and 8 bits alone."""
    if picture.format != "TIFF" or picture.mode in ("1", "L") or picture.tag_v2.get(_PHOTOMETRIC) != 0:
        return []
    remedy = "save it with black as 0 (MinIsBlack)"
    return [Problem(str(file), "PhotometricInterpretation", "0 is white", remedy)]


def _picture_problems(file: Path, picture: Any) -> list[Problem]:
    width, height = picture.size
    pages = getattr(picture, "n_frames", 1)
    if pages != 1:
        remedy = "give one slice a file, or the stack as NIfTI, MetaImage or NRRD"
        return [Problem(str(file), "picture", f"{pages} pages", remedy)]
    if width * height > _MOST_PIXELS:
        value = f"{width:,}x{height:,} pixels"
        return [Problem(str(file), "size", value, f"at most {_MOST_PIXELS:,} are read: make it smaller")]
    return []
