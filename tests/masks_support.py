"""A mask without any symmetry, and PNG files of it, also such as no library writes."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_shards.labels import AMOS

SIZE, LIVER, BODY = 32, 6, AMOS.body_id


def drawn() -> np.ndarray:
    """uint8 [32, 32]: a body and a liver, without any symmetry."""
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[4:28, 3:29], mask[8:16, 6:14] = BODY, LIVER
    return mask


def save(file: Path, mask: np.ndarray, **how: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save(file, **how)
    return file


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def packed_rows(samples_HW: np.ndarray, depth: int) -> bytes:
    """Rows without a filter, as PNG packs samples of 1 to 16 bits."""
    if not samples_HW.size:
        return b""
    if depth == 16:
        rows = [row.astype(">u2").tobytes() for row in samples_HW]
    else:
        bits = np.unpackbits(samples_HW.astype(np.uint8)[..., None], axis=2)[..., 8 - depth :]
        rows = [np.packbits(row.reshape(-1)).tobytes() for row in bits]
    return b"".join(b"\0" + row for row in rows)


def png(samples_HW: np.ndarray, depth: int = 8, colour: int = 0, interlaced: bool = False, **parts: Any) -> bytes:
    """A PNG by hand. `parts`: pixels, in place of the rows; extra, chunks in front of them; size, in place of the
    samples' own."""
    height, width = parts.get("size", samples_HW.shape)
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, int(interlaced))
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    if interlaced:
        rows = b"".join(packed_rows(samples_HW[r::dr, c::dc], depth) for r, c, dr, dc in passes)
    else:
        rows = packed_rows(samples_HW, depth)
    pixels = zlib.compress(parts.get("pixels", rows))
    extra = parts.get("extra", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def exif(orientation: int) -> bytes:
    return chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01" + struct.pack(">HHI", orientation, 0, 0))


def coloured() -> np.ndarray:
    """uint8 [32, 32, 3]: the mask in colours of one's own."""
    return np.select([(drawn() == LIVER)[..., None], (drawn() == BODY)[..., None]], [(250, 20, 30), (200, 150, 100)], 0)


def with_palette(colours: Sequence[Sequence[int]]) -> Image.Image:
    picture = Image.fromarray(drawn()).convert("P")
    picture.putpalette(np.array(colours, np.uint8).tobytes())
    return picture


def organ_colours() -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(20, 255, (20, 3))
