"""PNG files: the format of a file by its bytes, the label ids of a mask, and the grey values of an image. A mask whose
values cannot be the original ids is refused, and so is an image whose pixels are not grey.

The picture library decodes; before it does, every chunk's checksum and the length of the pixels are checked here, so
that no damaged or endless file reaches it.

Dimensions: H rows, W columns, K palette entries.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.ingest.foreign_bytes import foreign
from data_shards.problems import InputProblems, problem

PNG = b"\x89PNG\r\n\x1a\n"
# First bytes of the formats in which masks are saved, and their names. JPEG and WebP change the stored ids.
_KINDS = (
    (PNG, "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"RIFF", "WebP"),
    (b"\x1f\x8b", "gzip"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
)
# Colour types of the PNG specification (ISO/IEC 15948, 11.2.2), and their samples a pixel.
_COLOURS = {0: ("grey", 1), 2: ("RGB", 3), 3: ("palette", 1), 4: ("grey and alpha", 2), 6: ("RGBA", 4)}
_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
# Adam7: first row and column of each pass, and the steps between them.
_PASSES = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
# A mask of 1024x1024 takes a few kilobytes; a colour profile or a thumbnail beside it some hundreds.
_MOST_BYTES = 64 * 2**20
# The largest mask: more than any scanner's matrix, and 64 MB in memory.
_MOST_PIXELS = 8192 * 8192
_ORIENTATION = 0x0112  # of EXIF: 1 is as stored
_WRITE_AGAIN = "write it again"


@dataclass(frozen=True)
class PngHeader:
    """IHDR of a picture. `samples`: of a pixel; masks have one."""

    width: int
    height: int
    depth: int
    is_palette: bool
    is_interlaced: bool
    samples: int = 1

    @property
    def num_bytes(self) -> int:
        """Bytes of the uncompressed pixels: each row has its filter's byte in front."""
        passes = _PASSES if self.is_interlaced else ((0, 0, 1, 1),)
        total = 0
        for row, column, rows, columns in passes:
            height, width = -(-(self.height - row) // rows), -(-(self.width - column) // columns)
            if height > 0 and width > 0:
                total += height * (1 + -(-width * self.depth * self.samples // 8))
        return total


def kind_of(start: bytes) -> str | None:
    """The format of a file by its first bytes; None if it is not known here."""
    return next((name for magic, name in _KINDS if start.startswith(magic)), None)


def read_png_header(file: Path, sizes: Collection[int] | None, *, colours: bool = False) -> PngHeader:
    """The header, from the first bytes alone. Raises InputProblems: another format, whatever the name; several samples
    a pixel, unless `colours` are allowed; another size than one of `sizes` (rows and columns), or with None more pixels
    than any mask has."""
    with file.open("rb") as stream:
        start = stream.read(33)
    kind = kind_of(start)
    if kind != "PNG":
        raise problem(file, "PNG", *(_another_kind(kind) if kind else foreign(start) or _another_kind(None)))
    if len(start) < 33 or start[12:16] != b"IHDR" or zlib.crc32(start[12:29]) != int.from_bytes(start[29:33], "big"):
        raise _damaged(file, "its header is damaged")
    width, height = (int.from_bytes(start[at : at + 4], "big") for at in (16, 20))
    depth, colour, _, _, interlaced = start[24:29]
    if depth not in _DEPTHS.get(colour, ()) or interlaced > 1 or start[26:28] != b"\0\0":
        raise _damaged(file, "its header says what no PNG has")
    name, samples = _COLOURS[colour]
    if samples > 1 and not colours:
        remedy = "a mask has one channel: save it as grey, each pixel a label id (0 is background)"
        raise problem(file, "PNG", f"{name} pixels", remedy)
    if sizes is None:
        if not 0 < width * height <= _MOST_PIXELS:
            value = f"{width:,}x{height:,} pixels"
            raise problem(file, "size", value, f"at most {_MOST_PIXELS:,} are read: make it smaller")
    elif width != height or width not in sizes:
        asked = " or ".join(f"{size}x{size}" for size in sizes)
        remedy = f"make it {asked}, or give NIfTI, which says its spacing and is resampled"
        raise problem(file, "size", f"{width}x{height} pixels", remedy)
    return PngHeader(width, height, depth, name == "palette", bool(interlaced), samples)


def read_png_ids(
    file: Path,
    sizes: Collection[int] | None,
    num_ids: int,
    *,
    any_palette: bool = False,
    flag: str | None = None,
) -> np.ndarray:
    """uint8 [H, W]: the samples as stored, which are the label ids; of a palette, the index.

    `any_palette`: the user has given the meaning of each index, by `flag`; None: there is no such setting. Raises
    InputProblems as read_png_header, and for data that are damaged or longer than declared, several frames, an
    orientation, a palette that may have been made for this picture alone, and ids from `num_ids` on.
    """
    header = read_png_header(file, sizes)
    samples_HW, palette = _checked(file, header)
    if samples_HW.max() >= num_ids:
        value = f"up to {samples_HW.max()}"
        raise problem(file, "label ids", value, f"give whole numbers below {num_ids}")
    if header.is_palette and any_palette:
        _check_indices(file, palette, np.unique(samples_HW).tolist())
    elif header.is_palette:
        _check_palette(file, palette, samples_HW, flag)
    return samples_HW.astype(np.uint8)


def read_png_grey(file: Path) -> np.ndarray:
    """uint8 or uint16 [H, W]: the grey values as stored, those of fewer than 8 bits scaled to 8. Colours whose channels
    are equal everywhere, without transparent pixels, are grey too. Raises InputProblems as of read_png_ids, and for
    colours and palettes."""
    header = read_png_header(file, None, colours=True)
    if header.is_palette:
        raise problem(file, "PNG", "colours of a palette", "save the image as grey, of 8 or 16 bits")
    if header.samples > 1 and header.depth == 16:  # Pillow halves these
        raise problem(file, "PNG", f"{header.samples} x 16 bits a pixel", "save the image as grey, of 8 or 16 bits")
    samples, _ = _checked(file, header, may_be_transparent=False)
    grey_HW = samples if header.samples == 1 else grey_of(file, samples, has_alpha=header.samples in (2, 4))
    if header.depth < 8:  # white is 255, as in the PNG specification (13.12) and every viewer
        grey_HW = grey_HW.astype(np.uint8) * (255 // (2**header.depth - 1))
    return grey_HW.astype(np.uint16 if header.depth == 16 else np.uint8)


def grey_of(file: Path, samples_HWC: np.ndarray, *, has_alpha: bool) -> np.ndarray:
    """[H, W]: the channel, if all are equal and nothing is transparent. Raises InputProblems."""
    colours_HWC = samples_HWC[..., :-1] if has_alpha else samples_HWC
    if (colours_HWC != colours_HWC[..., :1]).any():
        remedy = "save one grey value a pixel: which channel is meant, or how they add, cannot be known"
        raise problem(file, "picture", "colours", remedy)
    if has_alpha and (samples_HWC[..., -1] != np.iinfo(samples_HWC.dtype).max).any():
        raise problem(file, "picture", "transparent pixels", "save it without transparency")
    return np.ascontiguousarray(colours_HWC[..., 0])


def palette_is_of_a_table(palette_K3: np.ndarray, used: Collection[int]) -> bool:
    """Whether a palette's index can be taken for the label id.

    It can if the used colours are grey, each as bright as its index, or Pascal VOC's. It can also if the palette has
    colours that the picture does not show: then it was made for a table of classes. When a program saves a picture with
    few colours, it makes a palette of only these colours, in any order, or a cube of colours; then the index has no
    meaning.
    """
    indices = sorted(used)
    shown = palette_K3[indices]
    if (shown == np.array(indices)[:, None]).all() or (shown == _voc_palette()[indices]).all():
        return True
    colours = {tuple(colour) for colour in palette_K3.tolist()}
    spare = colours - {tuple(colour) for colour in shown.tolist()} - {(0, 0, 0)}  # filled up with black
    levels = [len(np.unique(channel)) for channel in palette_K3.T]
    is_cube = len(colours) > 100 and len(colours) >= 0.9 * np.prod(levels)
    return bool(spare) and not is_cube


def _another_kind(kind: str | None) -> tuple[str, str]:
    """Value and remedy for a file that is not PNG."""
    if kind is None:
        return "not PNG by its bytes", _WRITE_AGAIN
    remedy = "save the mask itself as PNG"
    if kind in ("JPEG", "WebP", "JPEG 2000"):
        remedy = f"{kind} changes the ids it stores: save the mask, as it was drawn, as PNG"
    elif kind == "gzip":
        remedy = "if it is NIfTI, let its name end in .nii.gz"
    return f"{kind} by its bytes, whatever its name", remedy


def _damaged(file: Path, reason: object) -> InputProblems:
    return problem(file, "PNG", f"cannot be read ({' '.join(str(reason).split())[:120]})", _WRITE_AGAIN)


def _chunks(file: Path, content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Name and body of each chunk, up to IEND; refused if a checksum is wrong or the file ends earlier."""
    at = len(PNG)
    while at + 12 <= len(content):
        length, name = int.from_bytes(content[at : at + 4], "big"), content[at + 4 : at + 8]
        body, checksum = content[at + 8 : at + 8 + length], content[at + 8 + length : at + 12 + length]
        if len(checksum) < 4 or zlib.crc32(name + body) != int.from_bytes(checksum, "big"):
            raise _damaged(file, f"chunk {name!r} is damaged")
        yield name, body
        if name == b"IEND":
            return
        at += 12 + length
    raise _damaged(file, "it ends too early")


def _checked(file: Path, header: PngHeader, *, may_be_transparent: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Samples as stored, [H, W] or [H, W, samples], and the palette, of a file that is whole. The ids of a mask are
    ids even where viewers show them as transparent."""
    if file.stat().st_size > _MOST_BYTES:
        value = f"{file.stat().st_size:,} bytes for {header.width}x{header.height} pixels"
        raise problem(file, "PNG", value, _WRITE_AGAIN)
    content = file.read_bytes()
    chunks = list(_chunks(file, content))
    if not may_be_transparent and any(name == b"tRNS" for name, _ in chunks):
        raise problem(file, "picture", "a transparent colour (tRNS)", "save it without transparency")
    _check_pixels(file, header, [body for name, body in chunks if name == b"IDAT"])
    frames = [int.from_bytes(body[:4], "big") for name, body in chunks if name == b"acTL"]
    if frames and frames[0] != 1:
        raise problem(file, "PNG", f"{frames[0]} frames", "which one is meant cannot be known: save it alone")
    return _decoded(file, content, header)


def _check_pixels(file: Path, header: PngHeader, bodies: list[bytes]) -> None:
    """Whether there are as many packed pixels as the header declares. No more than that is unpacked."""
    inflate = zlib.decompressobj()
    packed = b"".join(bodies)
    try:
        pixels = inflate.decompress(packed, header.num_bytes + 1)
    except zlib.error as error:
        raise _damaged(file, error) from error
    if len(pixels) > header.num_bytes:
        raise _damaged(file, f"more pixels than its {header.width}x{header.height}")
    # The last call also reads the checksum after the pixels. Its one byte of room must stay empty.
    try:
        behind = inflate.decompress(inflate.unconsumed_tail, 1)
    except zlib.error as error:
        raise _damaged(file, error) from error
    if len(pixels) < header.num_bytes or behind or not inflate.eof:
        raise _damaged(file, "other pixels than its header declares")


def _decoded(file: Path, content: bytes, header: PngHeader) -> tuple[np.ndarray, np.ndarray]:
    """Samples [H, W] as stored, and the palette uint8 [K, 3]."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as picture:
            samples_HW = np.asarray(picture)
            palette = np.array(picture.getpalette("RGB") or [], np.uint8).reshape(-1, 3)
            orientation = orientation_of(picture)
    except Exception as error:  # Pillow may raise any error on such bytes
        raise _damaged(file, error) from error
    if samples_HW.shape[:2] != (header.height, header.width) or samples_HW.size != (
        header.height * header.width * header.samples
    ):
        raise _damaged(file, "other pixels than its header declares")
    check_orientation(file, orientation)
    if not header.is_palette and header.depth in (2, 4):
        # Pillow stretches these to 0 .. 255; the ids are the stored samples.
        samples_HW = samples_HW // (255 // (2**header.depth - 1))
    return samples_HW, palette


def check_orientation(file: Path, orientation: Any) -> None:
    """Refuse a picture that viewers turn."""
    if orientation not in (None, 1):
        remedy = "viewers turn it, other programs do not: save it upright, without an orientation"
        raise problem(file, "EXIF orientation", orientation, remedy)


def orientation_of(picture: Any) -> Any:
    """The EXIF tag; None if there is no readable EXIF: then no viewer turns the picture."""
    try:
        return picture.getexif().get(_ORIENTATION)
    except Exception:  # broken EXIF may raise any error
        return None


def _check_palette(file: Path, palette_K3: np.ndarray, indices_HW: np.ndarray, flag: str | None) -> None:
    """Refuse a palette in an unknown order. `flag`: what would give the indices' meaning; None: nothing."""
    used = np.unique(indices_HW).tolist()
    _check_indices(file, palette_K3, used)
    if palette_is_of_a_table(palette_K3, used):
        return
    value = f"its palette holds only the picture's own {len(used)} colours, or a cube of colours"
    remedy = "its order may be a program's own: save ids as 8-bit grey"
    remedy += "" if flag is None else f", or say in a {flag} what each index is"
    raise problem(file, "palette", value, remedy)


def _check_indices(file: Path, palette_K3: np.ndarray, used: list[int]) -> None:
    if used[-1] >= len(palette_K3):
        raise _damaged(file, f"colour {used[-1]} of a palette of {len(palette_K3)}")


def _voc_palette() -> np.ndarray:
    """uint8 [256, 3]: the colours of Pascal VOC's classes (its devkit's VOCcolormap), which annotation tools write."""
    ids = np.arange(256)
    palette = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= (((ids >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
    return palette
