"""Pixels to bytes and back, without loss: the contents of one member of a tar, or of one chunk of a Zarr array.

    raw        a NumPy 1.0 file                      .npy
    zstd       the same, as one zstd frame           .npy.zst
    png        8 or 16 bits of grey                  .png
    jpeg2000   reversible 5/3 wavelet, 8 or 16 bits  .jp2

Dimensions: H rows, W columns.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, get_args

import google_crc32c
import numpy as np

from data_shards.choices import Codec

# CRC-32C (Castagnoli) of contiguous memory, in place and in hardware: 2.5 microseconds for 64 KiB.
crc32c: Callable[[bytes | memoryview | np.ndarray], int] = google_crc32c.value
CODECS = get_args(Codec)
EXTENSIONS = {"raw": "npy", "zstd": "npy.zst", "png": "png", "jpeg2000": "jp2"}
PICTURES = ("png", "jpeg2000")
_PICTURE_FORMATS = {"png": "PNG", "jpeg2000": "JPEG2000"}
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
# First bytes of a NumPy file (format 1.0: two bytes for the length of its header).
_MOST_HEADER_BYTES = 10 + 65_535
# zstd's own default: a tenth of the time of level 9 for a few per cent more bytes.
ZSTD_LEVEL = 3


def encode(pixels_HW: np.ndarray, codec: str) -> bytes:
    """The bytes of one tar member for uint8 or uint16 pixels."""
    assert pixels_HW.dtype in (np.uint8, np.uint16)
    assert pixels_HW.ndim == 2
    stream = io.BytesIO()
    if codec in PICTURES:
        from PIL import Image

        options = {"format": "PNG"} if codec == "png" else {"format": "JPEG2000", "irreversible": False}
        Image.fromarray(pixels_HW).save(stream, **options)
        return stream.getvalue()
    np.lib.format.write_array(stream, np.ascontiguousarray(pixels_HW), version=(1, 0), allow_pickle=False)
    return stream.getvalue() if codec == "raw" else _zstd().encode(stream.getvalue())


def decode_into(payload: np.ndarray | bytes, codec: str, out_HW: np.ndarray) -> None:
    """Decode `payload` into `out_HW` (C-contiguous, uint8 or uint16).

    raw: the pixels alone, without the file's header. zstd: a frame that ends with the pixels, header or not. Raises
    ValueError if the payload is not an image of that shape and depth.
    """
    if codec == "raw":
        stored = np.frombuffer(payload, np.uint8)
    elif codec == "zstd":
        stored = np.frombuffer(unzstd(payload, out_HW.nbytes + _MOST_HEADER_BYTES), np.uint8)[-out_HW.nbytes :]
    else:
        _decode_picture(payload, codec, out_HW)
        return
    if stored.size != out_HW.nbytes:
        raise ValueError(f"{stored.size} bytes of pixels, {out_HW.nbytes} expected")
    out_HW.reshape(-1).view(np.uint8)[:] = stored


def _decode_picture(payload: np.ndarray | bytes, codec: str, out_HW: np.ndarray) -> None:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(bytes(payload)), formats=[_PICTURE_FORMATS[codec]]) as picture:
            if picture.size != out_HW.shape[::-1]:  # before decoding: a few bytes can expand to gigabytes
                raise ValueError(f"it holds {picture.height} x {picture.width} pixels, not {out_HW.shape}")
            pixels = np.asarray(picture)
    except (OSError, SyntaxError, ArithmeticError, LookupError, Image.DecompressionBombError) as error:
        raise ValueError(f"not a picture ({error})") from error
    if pixels.shape != out_HW.shape or pixels.dtype != out_HW.dtype:
        raise ValueError(f"it holds {pixels.dtype} {pixels.shape}, not {out_HW.dtype} {out_HW.shape}")
    out_HW[:] = pixels


def unzstd(payload: np.ndarray | bytes, most_bytes: int) -> bytes:
    """The contents of a zstd frame, at most `most_bytes`. Raises ValueError if there are more bytes, or the frame is
    incomplete."""
    held = _zstd_content_bytes(bytes(payload[:18]))
    try:
        if held is None:  # the writer streamed it, so its length is not known: unpack until it ends or is too long
            import pyarrow as pa

            with pa.CompressedInputStream(pa.BufferReader(bytes(payload)), "zstd") as stream:
                content: bytes = stream.read(most_bytes + 1)
            held = len(content)
        elif held <= most_bytes:
            content = bytes(_zstd().decode(payload))
    except (RuntimeError, OSError, ValueError) as error:
        raise ValueError(f"not a whole zstd frame ({error})") from error
    if held > most_bytes:
        raise ValueError(f"a zstd frame of {held:,} bytes or more, {most_bytes:,} expected at most")
    return content


def _zstd_content_bytes(start: bytes) -> int | None:
    """The unpacked size that a frame states; None if it states none. RFC 8878, section 3.1.1.1."""
    if len(start) < 6 or start[:4] != _ZSTD_MAGIC:
        raise ValueError("not a whole zstd frame (it does not begin like one)")
    descriptor = start[4]
    is_single_segment, size_flag = bool(descriptor & 0x20), descriptor >> 6
    num_bytes = {0: int(is_single_segment), 1: 2, 2: 4, 3: 8}[size_flag]
    if num_bytes == 0:
        return None
    begin = 5 + (not is_single_segment) + (0, 1, 2, 4)[descriptor & 3]
    return int.from_bytes(start[begin : begin + num_bytes], "little") + (256 if size_flag == 1 else 0)


def _zstd() -> Any:
    from numcodecs.zstd import Zstd

    # The frame's own checksum lets any reader, ours or not, find a flipped byte.
    return Zstd(level=ZSTD_LEVEL, checksum=True)
