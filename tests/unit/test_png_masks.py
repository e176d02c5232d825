"""PNG masks: ids are the samples as stored; palettes; what is refused because nobody drew it."""

from __future__ import annotations

import struct
import tracemalloc
import warnings
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from masks_support import SIZE, chunk, coloured, drawn, exif, organ_colours, packed_rows, png, save, with_palette
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from data_shards.ingest.png_files import palette_is_of_a_table, read_png_ids
from data_shards.problems import InputProblems


def read(tmp_path: Path, content: bytes, **how: Any) -> np.ndarray:
    (tmp_path / "a.png").write_bytes(content)
    return read_png_ids(tmp_path / "a.png", (SIZE,), 256, **how)


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_the_id_is_the_sample_as_stored(tmp_path: Path, depth: int, interlaced: bool) -> None:
    """Pillow stretches 2 and 4 bits to 0 .. 255."""
    rng = np.random.default_rng(depth)
    ids = rng.integers(0, min(2**depth, 256), (SIZE, SIZE))
    np.testing.assert_array_equal(read(tmp_path, png(ids, depth, interlaced=interlaced)), ids)


def test_a_transparent_colour_changes_no_id(tmp_path: Path) -> None:
    content = png(drawn(), extra=chunk(b"tRNS", b"\0\0"))
    np.testing.assert_array_equal(read(tmp_path, content), drawn())


def animated(frames: int) -> bytes:
    return chunk(b"acTL", struct.pack(">II", frames, 0))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (png(drawn(), extra=exif(6)), "EXIF orientation: 6; viewers turn it"),
        (png(drawn(), extra=animated(3)), "3 frames; which one"),
        (png(drawn().astype(int) * 257, 16), "up to 4112; give whole numbers below 256"),
        (png(drawn(), size=(SIZE, SIZE + 1)), "33x32 pixels"),
        (png(drawn(), size=(60_000, 60_000)), "60000x60000 pixels"),
        (png(drawn(), size=(2**31 - 1, 2**31 - 1)), "2147483647x2147483647 pixels"),
        (png(drawn(), pixels=packed_rows(drawn(), 8)[:-1]), "other pixels than its header"),
        (png(drawn(), pixels=packed_rows(drawn(), 8) + b"\0"), "more pixels than its 32x32"),
        (png(drawn(), pixels=bytes(10**8)), "more pixels than its 32x32"),
        (png(drawn(), 3), "its header says what no PNG has"),
        (png(drawn(), 8, 2), "RGB pixels"),
        (png(drawn(), 8, 6), "RGBA pixels"),
        (png(drawn(), 8, 4), "grey and alpha pixels"),
        (png(drawn(), 8, 3), "palette of 0"),
        (png(drawn())[:-12], "it ends too early"),
        (png(drawn())[:20], "its header is damaged"),
        (png(drawn()).replace(b"IDAT", b"IDAt"), "is damaged"),
        (b"", "an empty file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_nobody_drew_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    tracemalloc.start()
    with pytest.raises(InputProblems, match=words):
        read(tmp_path, content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 2**20


def test_orientations_that_turn_nothing_are_read(tmp_path: Path) -> None:
    for extra in (exif(1), chunk(b"eXIf", b"broken"), animated(1)):
        np.testing.assert_array_equal(read(tmp_path, png(drawn(), extra=extra)), drawn())


def test_an_orientation_in_a_profile_is_seen_as_well(tmp_path: Path) -> None:
    about = PngInfo()
    about.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="3"/>')
    file = save(tmp_path / "a.png", drawn(), pnginfo=about)
    with pytest.raises(InputProblems, match="EXIF orientation: 3"):
        read_png_ids(file, (SIZE,), 256)


def test_bombs_beside_the_pixels_cost_nothing(tmp_path: Path) -> None:
    """A text of 100 MB and a colour profile of as much, packed."""
    bomb = zlib.compress(bytes(10**8), 9)
    for extra in (chunk(b"zTXt", b"x\0\0" + bomb), chunk(b"iCCP", b"x\0\0" + bomb)):
        tracemalloc.start()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with suppress(InputProblems):  # Pillow refuses what is beside the pixels
                np.testing.assert_array_equal(read(tmp_path, png(drawn(), extra=extra)), drawn())
        assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
        tracemalloc.stop()


GREY = np.repeat(np.arange(256)[:, None], 3, axis=1)


@pytest.mark.parametrize(
    "make",
    [lambda: with_palette(GREY), lambda: with_palette(organ_colours()), lambda: Image.fromarray(drawn()).convert("P")],
)
def test_a_palette_of_a_table_has_ids_for_indices(tmp_path: Path, make: Callable[[], Image.Image]) -> None:
    make().save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_png_ids(tmp_path / "a.png", (SIZE,), 256), drawn())


def test_colours_of_pascal_voc_are_ids() -> None:
    voc = np.array([[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128]])
    assert palette_is_of_a_table(voc, [0, 1, 2, 3, 4])
    assert not palette_is_of_a_table(voc[::-1], [0, 1, 2, 3, 4])


@pytest.mark.parametrize(
    "make",
    [
        lambda: Image.fromarray(drawn()).quantize(8),
        lambda: Image.fromarray(drawn()).convert("RGB").quantize(256),
        lambda: Image.fromarray(coloured().astype(np.uint8)).quantize(3),
        lambda: Image.fromarray(coloured().astype(np.uint8)).quantize(256, method=Image.Quantize.MAXCOVERAGE),
        lambda: Image.fromarray(coloured().astype(np.uint8)).quantize(8, method=Image.Quantize.FASTOCTREE),
        lambda: Image.fromarray(coloured().astype(np.uint8)).convert("P", palette=Image.Palette.ADAPTIVE),
        lambda: Image.fromarray(coloured().astype(np.uint8)).convert("P"),
    ],
)
def test_a_palette_of_a_quantiser_is_refused(tmp_path: Path, make: Callable[[], Image.Image]) -> None:
    """Its order is the program's: 0, 6 and 16 became 2, 1 and 0."""
    make().save(tmp_path / "a.png")
    assert not np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), drawn())
    with pytest.raises(InputProblems, match=r"palette: .*8-bit grey.*label-map"):
        read_png_ids(tmp_path / "a.png", (SIZE,), 256, flag="--sample.label-map")
