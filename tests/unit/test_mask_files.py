"""Masks of a folder: which files are masks, what is read of them, and what is refused because nobody drew it."""

from __future__ import annotations

import gzip
import struct
import tracemalloc
import warnings
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from sampling_support import arguments, make_here, write_weights
from tests_support import write_shapes

from data_shards.ingest import volumes
from data_shards.labels import AMOS
from data_shards.problems import InputProblems, Problem
from data_shards.store.shards import ShardSet
from segdiff_dist.cli import main
from segdiff_dist.sampling import mask_folder
from segdiff_dist.sampling.config import SampleConfig
from segdiff_dist.sampling.items import drawn_rows, list_items_of
from segdiff_dist.sampling.job import prepare_job
from segdiff_dist.sampling.mask_files import list_folder
from segdiff_dist.sampling.mask_folder import MaskFolder
from segdiff_dist.sampling.mask_source import MaskArray
from segdiff_dist.sampling.png_masks import palette_is_of_a_table, read_png_ids

SIZE, LIVER, BODY = 32, 6, AMOS.body_id


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes") / "shards", num_patients=1, slices=2, held_out=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("run"))


def drawn() -> np.ndarray:
    """uint8 [32, 32]: a body and a liver, without any symmetry."""
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[4:28, 3:29], mask[8:16, 6:14] = BODY, LIVER
    return mask


def job_of(run: Path, shapes: Path, masks: Path, **changes: Any) -> Any:
    settings = {"masks": masks, "target_modality": "CT", "num": None, "diverse_masks": 0, "cross_modality_masks": 0}
    return prepare_job(*arguments(run, shapes, **settings | {"out": masks.parent / "out"} | changes))


def save(file: Path, mask: np.ndarray, **how: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save(file, **how)
    return file


# --- which files are masks ---


def test_copies_and_forks_that_nobody_drew_are_passed_over(run: Path, shapes: Path, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    save(masks / "case01.png", drawn())
    stale = drawn()
    stale[8:16, 6:14] = 1
    save(masks / ".ipynb_checkpoints" / "case01-checkpoint.png", stale)
    save(masks / "deep" / ".hidden" / "further" / "x.png", stale)
    save(masks / "@eaDir" / "thumb.png", np.zeros((4, 4, 3), np.uint8))
    for name in (
        "._case01.png",
        "__MACOSX/._case01.png",
        "__MACOSX/case01.png",
        "Thumbs.db",
        "desktop.ini",
        ".DS_Store",
    ):
        (masks / name).parent.mkdir(exist_ok=True)
        (masks / name).write_bytes(b"\x00\x05\x16\x07" + bytes(200))
    with pytest.warns(
        UserWarning, match=r"9 hidden or system files passed over \(\.DS_Store, \._case01\.png, .*\.\.\.\)"
    ):
        job = job_of(run, shapes, masks)
    assert job.items["case_id"].to_pylist() == ["case01"]
    np.testing.assert_array_equal(job.masks_MHW[0], drawn())


def test_a_folder_below_a_hidden_one_is_read(run: Path, shapes: Path, tmp_path: Path) -> None:
    save(tmp_path / ".cache" / "masks" / "a.png", drawn())
    assert len(job_of(run, shapes, tmp_path / ".cache" / "masks").items) == 1


def test_what_is_passed_over_is_counted_where_there_is_no_mask(run: Path, shapes: Path, tmp_path: Path) -> None:
    save(tmp_path / "masks" / ".x" / "a.png", drawn())
    save(tmp_path / "masks" / "b.jpg", drawn(), format="PNG")
    save(tmp_path / "masks" / "c.jpg", drawn(), format="JPEG")
    words = r"2 other files passed over \(\.jpg\).*1 hidden .* \(\.x\); b\.jpg is PNG by its bytes: .*end in \.png"
    with pytest.raises(InputProblems, match=words):
        job_of(run, shapes, tmp_path / "masks")


@pytest.mark.parametrize(
    ("name", "form", "words"),
    [
        ("a.png", "JPEG", "JPEG by its bytes, whatever its name; JPEG changes the ids"),
        ("a.PNG", "WEBP", "WebP by its bytes"),
        ("a.png", "GIF", "GIF by its bytes, whatever its name; save the mask itself as PNG"),
        ("a.png", "TIFF", "TIFF by its bytes"),
        ("a.png", "BMP", "BMP by its bytes"),
        ("a.nii.gz", "PNG", r"PNG by its bytes, whatever its name; let its name end in \.png"),
        ("a.nii", "JPEG", "JPEG by its bytes"),
    ],
)
def test_a_file_is_what_its_bytes_are(
    run: Path, shapes: Path, tmp_path: Path, name: str, form: str, words: str
) -> None:
    save(tmp_path / "masks" / name, drawn(), format=form)
    with pytest.raises(InputProblems, match=words):
        job_of(run, shapes, tmp_path / "masks")


def test_a_volume_called_png_is_named_as_one(run: Path, shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "a.png").write_bytes(gzip.compress(b"x"))
    with pytest.raises(InputProblems, match=r"gzip by its bytes.*end in \.nii\.gz"):
        job_of(run, shapes, tmp_path / "masks")


# --- what a PNG holds ---


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


def exif(orientation: int) -> bytes:
    return chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01" + struct.pack(">HHI", orientation, 0, 0))


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
        (b"", "not PNG by its bytes"),
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


# --- palettes ---


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
        read_png_ids(tmp_path / "a.png", (SIZE,), 256)


def test_a_label_map_says_what_each_index_is(run: Path, shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    Image.fromarray(coloured().astype(np.uint8)).quantize(3, method=Image.Quantize.MEDIANCUT).save(
        tmp_path / "masks" / "a.png"
    )
    stored = np.asarray(Image.open(tmp_path / "masks" / "a.png"))
    meaning = {int(stored[drawn() == i][0]): int(i) for i in np.unique(drawn())}
    (tmp_path / "map.yaml").write_text("".join(f"{index}: {meant}\n" for index, meant in meaning.items()))
    job = job_of(run, shapes, tmp_path / "masks", label_map=tmp_path / "map.yaml")
    np.testing.assert_array_equal(job.masks_MHW[0], drawn())


# --- damaged files ---


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """Bits flipped, bytes overwritten, cut short, or stretched."""
    spoilt = bytearray(content)
    kind = rng.integers(0, 5)
    near = min(len(spoilt), 400) if rng.random() < 0.7 else len(spoilt)  # headers are at the front
    if kind == 0:
        for at in rng.integers(0, near, rng.integers(1, 4)):
            spoilt[at] ^= 1 << rng.integers(0, 8)
    elif kind == 1:
        at = int(rng.integers(0, near))
        spoilt[at : at + 4] = rng.choice([b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff", b"\x00\x00\x80\x7f"])
    elif kind == 2:
        del spoilt[int(rng.integers(0, len(spoilt))) :]
    elif kind == 3:
        at = int(rng.integers(0, near))
        spoilt[at:at] = rng.bytes(int(rng.integers(1, 200)))
    else:
        at = int(rng.integers(0, near))
        spoilt[at : at + 8] = rng.bytes(8)
    return bytes(spoilt)


def originals(tmp_path: Path) -> dict[str, bytes]:
    volume = np.repeat(drawn()[..., None], 6, axis=2)
    files = {name: tmp_path / name for name in ("a.nii", "b.nii.gz", "c.nii.gz", "d.png", "e.png", "f.png")}
    nib.save(nib.Nifti1Image(volume, np.diag([3.0, 3.0, 5.0, 1.0])), files["a.nii"])
    nib.save(nib.Nifti1Image(volume.astype(np.float32), np.diag([3.0, 3.0, 5.0, 1.0])), files["b.nii.gz"])
    nib.save(nib.Nifti2Image(drawn(), np.diag([3.0, 3.0, 5.0, 1.0])), files["c.nii.gz"])
    save(files["d.png"], drawn())
    with_palette(organ_colours()).save(files["e.png"])
    files["f.png"].write_bytes(png(drawn(), 8, extra=exif(1) + chunk(b"zTXt", b"x\0\0" + zlib.compress(b"words"))))
    return {name: file.read_bytes() for name, file in files.items()}


def test_mutated_masks_end_in_a_message(shapes: Path, tmp_path: Path) -> None:
    """A file is read, or refused by name with what to do; nothing else, and without much memory."""
    shards, rng = ShardSet.open(shapes), np.random.default_rng(17)
    (tmp_path / "masks").mkdir()
    config = SampleConfig(masks=tmp_path / "masks", target_modality="CT")
    refused = dict.fromkeys(contents := originals(tmp_path), 0)
    for name, content in contents.items():
        file = tmp_path / "masks" / name
        for _ in range(80):
            spoilt = mutated(content, rng)
            if name.endswith(".gz") and rng.random() < 0.5:  # inside of what is packed
                spoilt = gzip.compress(mutated(gzip.decompress(content), rng))
            file.write_bytes(spoilt)
            found: Sequence[Problem] = ()
            tracemalloc.start()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    folder = MaskFolder(tmp_path / "masks", shards, SIZE, config)
                    folder.read(np.arange(min(len(folder), 4)))
                except InputProblems as error:
                    found = error.problems
            assert all(one.where == str(file) and one.remedy for one in found)
            refused[name] += bool(found)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 96 * 2**20
        file.unlink()
    assert all(refused[name] > 60 for name in refused if name.endswith(".png")), refused
    assert all(refused.values()), refused


# --- list first, then read what is drawn ---


def write_volumes(folder: Path, num: int) -> None:
    folder.mkdir()
    for number in range(num):
        volume = np.repeat(np.roll(drawn(), number, axis=0)[..., None], 8 + number, axis=2)
        nib.save(nib.Nifti1Image(volume, np.diag([3.0, 3.0, 2.0, 1.0])), folder / f"v{number:02d}.nii.gz")
    save(folder / "w.png", drawn())


def test_only_what_is_drawn_is_read(run: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_volumes(tmp_path / "masks", 12)
    every = job_of(run, shapes, tmp_path / "masks")
    opened: list[Path] = []
    read_labels = volumes.read_labels

    def counted(path: Path, *arguments: Any, **settings: Any) -> Any:
        opened.append(path)
        return read_labels(path, *arguments, **settings)

    monkeypatch.setattr(volumes, "read_labels", counted)
    monkeypatch.setattr(
        mask_folder, "read_png_ids", lambda file, *_, **__: opened.append(file) or np.zeros((SIZE, SIZE), np.uint8)
    )
    job = job_of(run, shapes, tmp_path / "masks", num=3)
    files = {str(item["case_id"]) for item in job.items.to_pylist()}
    assert {path.name.split(".")[0] for path in opened} == files
    assert len(opened) == len(files) <= 3
    assert job.masks_MHW.shape == (3, SIZE, SIZE)

    # The list is that of all masks, as it always was; each item's mask is the same as with all of them read.
    whole = {row["key"]: row["row"] for row in every.items.to_pylist()}
    by_row = dict(zip(drawn_rows(job.items).tolist(), job.masks_MHW, strict=True))
    for item in job.items.to_pylist():
        assert whole[item["key"]] == item["row"]
        np.testing.assert_array_equal(by_row[item["row"]], every.masks_MHW[item["row"]])


def test_memory_grows_with_what_is_drawn(shapes: Path, tmp_path: Path) -> None:
    """40 volumes of 4 MB and 64 slices each, of which two slices are drawn."""
    (tmp_path / "masks").mkdir()
    volume = np.repeat(np.kron(drawn(), np.ones((8, 8), np.uint8))[..., None], 64, axis=2)
    for number in range(40):
        nib.save(nib.Nifti1Image(volume, np.diag([2.0, 2.0, 2.0, 1.0])), tmp_path / "masks" / f"{number}.nii.gz")
    shards = ShardSet.open(shapes)
    tracemalloc.start()
    folder = MaskFolder(tmp_path / "masks", shards, SIZE, SampleConfig(masks=tmp_path / "masks", num=2))
    items = list_items_of(folder.rows, np.arange(len(folder)), SampleConfig(num=2, target_modality="CT"))
    folder.read(drawn_rows(items))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(folder) > 1000
    assert peak < 4 * volume.nbytes


def test_masks_of_jobs_that_kept_every_mask_are_found(run: Path, shapes: Path, tmp_path: Path) -> None:
    """Before, masks.zarr held all masks of the folder, and an item's row counted in it."""
    import zarr

    write_volumes(tmp_path / "masks", 3)
    every, few = (job_of(run, shapes, tmp_path / "masks", num=num) for num in (None, 3))
    for name, masks in (("old", every.masks_MHW), ("new", few.masks_MHW)):
        zarr.create_array(tmp_path / name, data=masks, chunks=(1, SIZE, SIZE), shards=masks.shape)
    for item in few.items.to_pylist():
        found = [MaskArray.open(tmp_path / name, AMOS, few.items).read_mask(item["row"]) for name in ("old", "new")]
        np.testing.assert_array_equal(*found)
        np.testing.assert_array_equal(found[0], every.masks_MHW[item["row"]])


def test_a_job_goes_on_with_what_was_drawn(run: Path, shapes: Path, tmp_path: Path) -> None:
    write_volumes(tmp_path / "masks", 3)
    settings: dict[str, Any] = {"masks": tmp_path / "masks", "target_modality": "CT", "num": 6, "diverse_masks": 0}
    settings |= {"cross_modality_masks": 0, "out": tmp_path / "out"}
    store = make_here(run, shapes, **settings)
    images, masks = np.asarray(store.image[:]), np.asarray(store.mask[:])
    store.unmark(0)
    (tmp_path / "out" / "masks.zarr" / "c" / "0" / "0" / "0").unlink()  # damaged as well: made again
    with pytest.warns(UserWarning, match="made again"):
        again = make_here(run, shapes, **settings)
    np.testing.assert_array_equal(images, again.image[:])
    np.testing.assert_array_equal(masks, again.mask[:])


# --- what is said ---


def test_the_classes_are_printed_before_sampling(
    run: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "masks" / "a.png", drawn())
    save(tmp_path / "masks" / "b.png", np.where(drawn() == LIVER, BODY, drawn()))
    job = job_of(run, shapes, tmp_path / "masks")
    words = "classes in the 2 masks: 0 background in 2, 6 liver in 1, 16 body in 2"
    assert job.classes == words
    flags = ["--run", str(run), "--data", str(shapes), "--masks", str(tmp_path / "masks"), "--out", str(tmp_path / "o")]
    flags += ["--sample.target-modality", "CT", "--sample.weights", "ema", "--dry-run"]
    (run / "weights" / "ema_0.05").exists() or (run / "weights" / "ema_0.05").symlink_to(run / "weights" / "ema")
    assert main(["sample", *flags]) == 0
    assert f"# {words}" in capsys.readouterr().out
    make_here(run, shapes, masks=tmp_path / "masks", target_modality="CT", out=tmp_path / "done", num=None)
    begun = job_of(run, shapes, tmp_path / "masks", out=tmp_path / "done", diverse_masks=2, cross_modality_masks=2)
    assert begun.store is not None
    assert begun.classes == words, "of a job that has begun, from the masks it keeps"


def test_two_files_of_one_name_are_refused(run: Path, shapes: Path, tmp_path: Path) -> None:
    for name in ("a/b.png", "a_b.png"):
        save(tmp_path / "masks" / name, drawn())
    with pytest.raises(InputProblems, match="two masks are called a_b-axial-0000"):
        job_of(run, shapes, tmp_path / "masks")
    assert list_folder(tmp_path / "masks").hidden == ()
