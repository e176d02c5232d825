"""Masks of a folder: which files are masks, what is read of them, and what is said of them."""

from __future__ import annotations

import gzip
import tracemalloc
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from masks_support import BODY, LIVER, SIZE, chunk, coloured, drawn, exif, organ_colours, png, save, with_palette
from PIL import Image
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


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes") / "shards", num_patients=1, slices=2, held_out=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("run"))


def job_of(run: Path, shapes: Path, masks: Path, **changes: Any) -> Any:
    settings = {"masks": masks, "target_modality": "CT", "num": None, "diverse_masks": 0, "cross_modality_masks": 0}
    return prepare_job(*arguments(run, shapes, **settings | {"out": masks.parent / "out"} | changes))


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
    with pytest.warns(UserWarning, match=r"9 hidden or system files skipped \(\.DS_Store, \._case01\.png, .*\.\.\.\)"):
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
    words = r"2 other files skipped \(\.jpg\).*1 hidden .* \(\.x\); b\.jpg is PNG by its bytes: .*end in \.png"
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
