"""`segdiff paint` and `segdiff_dist.paint`: an image in the mask's place, from any kind of mask, by any model."""

from __future__ import annotations

import json
import re
import shutil
import ssl
import struct
import subprocess
import threading
import zlib
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from PIL import Image
from sampling_support import QUICK, write_weights

import segdiff_dist
from data_shards.labels import AMOS
from data_shards.problems import InputProblems
from segdiff_dist.cli import main
from segdiff_dist.denoising.config import DiffusionConfig
from segdiff_dist.export.job import check_model
from segdiff_dist.painting.api import Model
from segdiff_dist.painting.job import out_problems
from segdiff_dist.painting.masks import open_mask
from segdiff_dist.painting.model_source import model_folder
from segdiff_dist.pipeline import CardParts, Extras, SegGuidedPipeline

LIVER, SPLEEN, BODY = (AMOS.names.index(name) for name in ("liver", "spleen", "body"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of 32 pixels, untrained, in bf16."""
    run = write_weights(tmp_path_factory.mktemp("run"), mask_dropout=0.1)
    extras = Extras(
        preprocessing={"size": 32, "spacing_mm": 2.0},
        field_mm=64.0,
        precision="bf16",
        card=CardParts(about="Of a test."),
    )
    check_model(run / "weights" / "ema", run / "pipeline", DiffusionConfig(), QUICK["sampler"], extras).write()
    return run / "pipeline"


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return segdiff_dist.open_model(folder, device="cpu")


@pytest.fixture
def organs() -> np.ndarray:
    mask_HW = np.full((32, 32), 0, np.uint8)
    mask_HW[4:28, 3:29] = BODY
    mask_HW[10:20, 6:14] = LIVER
    mask_HW[12:17, 20:26] = SPLEEN
    return mask_HW


def png(file: Path, mask_HW: np.ndarray) -> Path:
    Image.fromarray(mask_HW).save(file)
    return file


def test_a_picture_of_the_models_size_is_what_the_pipeline_makes(
    folder: Path, organs: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, file = tmp_path / "image.png", png(tmp_path / "mask.png", organs)
    arguments = ["paint", "-i", str(file), "-o", str(out), "--model", str(folder), "--modality", "MR", "--seed", "7"]
    assert main([*arguments, "--precision", "fp32", "--dry-run"]) == 0
    planned = capsys.readouterr().out
    assert "images: 1" in planned
    assert re.search(r"time: \d+ s", planned)
    assert not out.exists()
    assert main([*arguments, "--precision", "fp32"]) == 0
    assert "synthetic MR" in capsys.readouterr().out
    image = SegGuidedPipeline.from_pretrained(folder, device="cpu")(organs, modality="MR", seed=7)
    np.testing.assert_array_equal(np.asarray(Image.open(out)), np.asarray(image))
    assert main(arguments) == 2
    assert "exists already" in capsys.readouterr().err


def test_an_image_has_the_size_of_its_mask(model: Model, organs: np.ndarray) -> None:
    large = np.pad(organs.repeat(3, axis=0).repeat(2, axis=1), ((0, 5), (0, 0)))
    made = segdiff_dist.paint(large, model)
    assert made.image.size == (64, 101)
    assert made.values.shape == made.pixels.shape == (101, 64)
    np.testing.assert_array_equal(made.values, np.rint(made.values))
    assert made.values.min() >= -256
    assert made.values.max() <= 256


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd"])
def test_a_volume_is_painted_where_it_is(folder: Path, model: Model, tmp_path: Path, ending: str) -> None:
    """Stored upside down, with classes that a file beside it names in another order and in other words."""
    stored = np.zeros((20, 24, 3), np.int16)
    stored[3:12, 5:20, :2], stored[13:18, 8:15] = 1, 2
    affine = np.diag([-3.0, 3.0, -4.0, 1.0])
    affine[:3, 3] = (10, -20, 30)
    file, out = tmp_path / "labelsTr" / "case.nii.gz", tmp_path / f"ct{ending}"
    file.parent.mkdir()
    nib.save(nib.Nifti1Image(stored, affine), file)
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "Spleen": 1, "right-kidney": 2}}))
    made = segdiff_dist.paint(file, model, modality="CT")
    assert made.num_slices == 3
    assert made.values.shape == stored.shape
    names = np.array(AMOS.names)[np.unique(made.labels.voxels_IJK)]
    assert set(names) == {"background", "spleen", "kidney_right", "body"}, "an outline is drawn where there is none"
    made.save(out)
    if ending == ".nii.gz":
        read = nib.load(out)
        np.testing.assert_allclose(read.affine, affine)
        np.testing.assert_array_equal(np.asarray(read.dataobj), made.values)
    else:
        import SimpleITK

        read = SimpleITK.ReadImage(str(out))
        np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(read).T, made.values)
        np.testing.assert_allclose(read.GetOrigin(), (-10, 20, 30))


def test_a_volume_of_one_plane_keeps_its_thickness(model: Model, organs: np.ndarray, tmp_path: Path) -> None:
    """nnU-Net's 999 stands for none: then a pixel's width is written."""
    for thickness, written in ((5.0, 5.0), (999.0, 2.0)):
        file, out = tmp_path / f"{thickness:g}.nii.gz", tmp_path / f"of_{thickness:g}.nii.gz"
        nib.save(nib.Nifti1Image(organs[..., None], np.diag([2.0, 2.0, thickness, 1.0])), file)
        segdiff_dist.paint(file, model).save(out)
        np.testing.assert_allclose(nib.load(out).affine, np.diag([2.0, 2.0, written, 1.0]))
    nib.save(nib.Nifti1Image(organs, np.diag([2.0, 2.0, 5.0, 1.0])), tmp_path / "flat.nii")
    segdiff_dist.paint(tmp_path / "flat.nii", model).save(tmp_path / "of_flat.nii")
    written = nib.load(tmp_path / "of_flat.nii")
    assert written.shape == organs.shape
    np.testing.assert_allclose(written.affine, np.diag([2.0, 2.0, 5.0, 1.0]))
    nib.save(nib.Nifti1Image(np.full((1, 1, 1), LIVER, np.uint8), np.diag([2.0, 2.0, 5.0, 1.0])), tmp_path / "1.nii")
    segdiff_dist.paint(tmp_path / "1.nii", model).save(tmp_path / "of_1.nii")
    np.testing.assert_allclose(nib.load(tmp_path / "of_1.nii").affine, np.diag([2.0, 2.0, 5.0, 1.0]))


def test_a_side_that_is_a_guess_is_said(model: Model, organs: np.ndarray, tmp_path: Path) -> None:
    """A header with neither qform nor sform."""
    image = nib.Nifti1Image(organs[..., None], None)
    image.header.set_zooms((2.0, 2.0, 2.0))
    nib.save(image, tmp_path / "mask.nii")
    assert any(
        "which side is left is a guess" in note for note in segdiff_dist.paint(tmp_path / "mask.nii", model).notes
    )


def test_a_mask_of_true_and_false_is_one_of_ids(model: Model, organs: np.ndarray) -> None:
    options = {"labels": {0: "background", 1: "liver"}}
    made = [segdiff_dist.paint(mask, model, **options).values for mask in (organs > 0, (organs > 0).astype(np.uint8))]
    np.testing.assert_array_equal(*made)


def test_dicom_out_and_in_again(model: Model, organs: np.ndarray, tmp_path: Path) -> None:
    """The SEG that is written beside a series names its segments, and is a mask itself."""
    file = tmp_path / "mask.nii"
    nib.save(nib.Nifti1Image(np.stack([organs] * 2, axis=2), np.diag([2.0, 2.0, 3.0, 1.0])), file)
    first = segdiff_dist.paint(file, model)
    first.save(tmp_path / "series")
    again = segdiff_dist.paint(tmp_path / "series" / "masks" / "mask.dcm", model)
    np.testing.assert_array_equal(again.labels.voxels_IJK, first.labels.voxels_IJK)
    np.testing.assert_array_equal(again.values_IJK, first.values_IJK)
    np.testing.assert_allclose(again.labels.affine, first.labels.affine, atol=1e-4)
    damaged = pydicom.dcmread(tmp_path / "series" / "masks" / "mask.dcm")
    damaged.PixelData = damaged.PixelData[:10]
    damaged.save_as(tmp_path / "damaged.dcm")
    with pytest.raises(InputProblems, match="DICOM: its frames cannot be read"):
        segdiff_dist.paint(tmp_path / "damaged.dcm", model)


def test_a_small_field_is_painted_at_its_scale(model: Model, organs: np.ndarray) -> None:
    """A mask of 32 mm is the middle of the model's 64 mm, not stretched to them; a picture without mm is stretched."""
    small = organs[::2, ::2]
    placed = segdiff_dist.paint(small[..., None], model, affine=np.diag([2.0, 2.0, 2.0, 1.0]))
    assert placed.values.shape == (16, 16, 1)
    whole = np.zeros((32, 32, 1), np.uint8)
    whole[8:24, 8:24, 0] = small
    around = segdiff_dist.paint(whole, model, affine=np.diag([2.0, 2.0, 2.0, 1.0]))
    np.testing.assert_array_equal(placed.values, around.values[8:24, 8:24])
    picture = segdiff_dist.paint(small, model, spacing_mm=2.0)
    large = segdiff_dist.paint(np.pad(small, 8), model, spacing_mm=2.0)
    np.testing.assert_array_equal(picture.values, large.values[8:24, 8:24])
    assert not np.array_equal(picture.values, segdiff_dist.paint(small, model).values), "which fills the square"


def test_labels_by_name(model: Model, organs: np.ndarray, tmp_path: Path) -> None:
    renamed = np.select([organs == LIVER, organs == SPLEEN, organs == BODY], [1, 2, 3]).astype(np.uint8)
    expected = segdiff_dist.paint(organs, model).values
    table = {1: "Liver", 2: "SPLEEN", 3: "body"}
    np.testing.assert_array_equal(segdiff_dist.paint(renamed, model, labels=table).values, expected)
    file = tmp_path / "table.yaml"
    file.write_text("name: own\nnames: [hepar, spleen, body]\nlabel_map: {hepar: liver}\n")
    np.testing.assert_array_equal(segdiff_dist.paint(renamed, model, labels=file).values, expected)
    with pytest.raises(InputProblems, match="2 tumour"):
        segdiff_dist.paint(renamed, model, labels={1: "liver", 2: "tumour", 3: "body"})
    (tmp_path / "dataset.json").write_text('{"labels": {"background": 0, "organs": [1, 2], "spleen": 2}}')
    with pytest.raises(InputProblems, match=r"regions \(organs\).*--labels FILE"):
        segdiff_dist.paint(renamed, model, labels=tmp_path / "dataset.json")
    options = segdiff_dist.PaintOptions(other_labels="body")
    made = segdiff_dist.paint(renamed, model, labels={1: "liver", 2: "tumour", 3: "body"}, options=options)
    assert set(np.unique(made.labels.voxels_IJK)) == {0, LIVER, BODY}


def test_slicer_names_its_segments(model: Model, tmp_path: Path) -> None:
    import SimpleITK

    image = SimpleITK.GetImageFromArray(np.tile(np.uint8([[0, 5], [9, 9]]), (1, 8, 8)))
    for key, value in (("0_Name", "liver"), ("0_LabelValue", "9"), ("1_Name", "spleen"), ("1_LabelValue", "5")):
        image.SetMetaData(f"Segment{key}", value)
    SimpleITK.WriteImage(image, str(tmp_path / "a.seg.nrrd"))
    made = segdiff_dist.paint(tmp_path / "a.seg.nrrd", model, options=segdiff_dist.PaintOptions(outline="none"))
    assert set(np.unique(made.labels.voxels_IJK)) == {0, LIVER, SPLEEN}


def bomb(file: Path, side: int) -> Path:
    """A PNG of side x side pixels, whose packed rows are a megabyte of zeros for each kilobyte."""
    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(10**7), 9)
    chunks = [(b"IHDR", head), (b"IDAT", rows), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return file


def test_what_is_refused(model: Model, organs: np.ndarray, tmp_path: Path) -> None:
    """Each before an image is made, with the field, the value and what to do."""

    def refused(match: str, mask: object, **options: object) -> None:
        with pytest.raises(InputProblems, match=match):
            segdiff_dist.paint(mask, model, **options)

    volume = np.zeros((4, 4, 4), np.uint8)
    volume[1:3] = 99
    nib.save(nib.Nifti1Image(volume, np.eye(4)), tmp_path / "unknown.nii.gz")
    nib.save(nib.Nifti1Image(volume, np.eye(4)), tmp_path / "nan.nii")
    content = bytearray((tmp_path / "nan.nii").read_bytes())
    content[280:296] = struct.pack("<4f", *[float("nan")] * 4)  # srow_x
    (tmp_path / "nan.nii").write_bytes(content)
    refused("99.*--labels", tmp_path / "unknown.nii.gz")
    refused("voxel axes must span space", tmp_path / "nan.nii")
    refused("degrees off a right angle", volume, affine=np.diag([1.0, 1, 1, 1]) + 0.5 * np.eye(4, k=1) * [0, 1, 0, 0])
    refused("RGB pixels.*save it as grey.*0 is background", Image.fromarray(np.stack([organs] * 3, axis=-1)))
    refused("the mask has 99;.*1 spleen, 2 kidney_right", np.full((8, 8), 99, np.uint8))
    refused("--seed: 1.5", organs, seed=1.5)
    refused("--seed: 7", organs, seed="7")
    refused("labels: 5", organs, labels=5)
    refused("--spacing", organs, spacing_mm="2")
    for name in ("axis", "other_labels", "outline", "noise"):
        refused("--" + name.replace("_", "-") + ": no", organs, options=segdiff_dist.PaintOptions(**{name: "no"}))
    refused("all background", np.zeros((8, 8), np.uint8))
    refused("2,000,000,000|44,721x44,721", bomb(tmp_path / "giga.png", 44_721))
    refused("other pixels|more pixels", bomb(tmp_path / "bomb.png", 1000))
    refused("label ids", organs.astype(float))
    refused("spacing.*leave it out", organs[..., None], spacing_mm=2.0)
    refused("from 0.01 to", organs, spacing_mm=float("nan"))
    refused("affine", np.ones((4, 4, 4), np.uint8), affine=np.full((4, 4), np.nan))
    refused("the model knows CT, MR", organs, modality="PET")
    refused("none of 1 lung", organs, labels={0: "background", 1: "lung"})
    refused("not found", tmp_path / "missing.png")
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8\xff")
    refused("the ending .jpg", tmp_path / "photo.jpg")
    with pytest.raises(InputProblems, match="a PNG for a mask of 3 dimensions"):
        segdiff_dist.paint(np.full((4, 4, 4), LIVER, np.uint8), model).save(tmp_path / "volume.png")
    for steps, guidance, named in (
        (0, None, "command line: --steps: 0; .* at least 1$"),
        (None, -1.0, "--guidance: -1"),
    ):
        with pytest.raises(InputProblems, match=named):
            model.with_sampler(steps, guidance)
    [problem] = out_problems(tmp_path / "new.jpg", open_mask(organs, grid_mm=1.0), model, "CT")
    assert problem.remedy.startswith("let it end in .png, .nii.gz")


def test_models_from_elsewhere(
    folder: Path, organs: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By any URL of fsspec's, once; by digest; and a message where there is no connection."""
    import fsspec

    monkeypatch.setenv("SEGDIFF_CACHE", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    memory.put(f"{folder}/", "/models/small/", recursive=True)
    here = segdiff_dist.open_model(folder.as_uri())
    there = segdiff_dist.open_model("memory://models/small", digest=here.digest)
    assert there.digest == here.digest
    memory.rm("/models", recursive=True)
    kept = segdiff_dist.open_model("memory://models/small")
    np.testing.assert_array_equal(segdiff_dist.paint(organs, kept).values, segdiff_dist.paint(organs, here).values)
    with pytest.raises(InputProblems, match="its weights are"):
        segdiff_dist.open_model(folder, digest="0" * 64)
    with pytest.raises(InputProblems, match=r"no segdiff\.json there"):
        segdiff_dist.open_model("memory://nothing/here")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputProblems, match="as a Hugging Face name it needs a connection"):
        segdiff_dist.open_model("nobody/nothing")


def test_nets_beside_the_first_are_fetched_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ControlNet's weights, an autoencoder, and the stages of a cascade; no file that could be code."""
    import fsspec

    monkeypatch.setenv("SEGDIFF_CACHE", str(tmp_path / "cache"))
    described = {"segdiff.json": {}, "unet/segdiff.json": {"latent": {}, "cascade": {}}, "vae/segdiff.json": {}}
    lower = "unet/low_resolution"
    described |= {f"{lower}/segdiff.json": {"cascade": {}}, f"{lower}/low_resolution/segdiff.json": {}}
    contents = {name: json.dumps(one).encode() for name, one in described.items()}
    for net in ("unet", "vae", lower, f"{lower}/low_resolution"):
        contents |= {f"{net}/{name}": b"1" for name in ("config.json", "diffusion_pytorch_model.safetensors")}
    contents |= {"unet/control.safetensors": b"2", "vae/digests.json": b"{}"}
    memory = fsspec.filesystem("memory")
    memory.pipe({f"/models/large/{name}": content for name, content in (contents | {"unet/a.py": b"3"}).items()})
    there = model_folder("memory://models/large")
    memory.rm("/models", recursive=True)
    found = {str(file.relative_to(there)): file.read_bytes() for file in there.rglob("*") if file.is_file()}
    assert found == contents


def test_a_model_behind_http(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a server that cannot send parts of files; afterwards without it; a server that is away is said."""
    monkeypatch.setenv("SEGDIFF_CACHE", str(tmp_path / "cache"))
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        there = model_folder(f"{url}/{folder.name}")
        with pytest.raises(InputProblems, match=r"no segdiff\.json there"):
            model_folder(f"{url}/nothing")
        server.shutdown()
        thread.join()
    assert (there / "unet" / "digests.json").read_bytes() == (folder / "unet" / "digests.json").read_bytes()
    assert model_folder(f"{url}/{folder.name}") == there
    with pytest.raises(InputProblems, match=r"cannot be fetched.*check the address and the connection"):
        model_folder(f"{url}/another")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl on this machine")
def test_a_server_with_a_certificate_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The refusal names the remedy, which acts on a process that starts with it."""
    monkeypatch.setenv("SEGDIFF_CACHE", str(tmp_path / "cache"))
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    made = ["-x509", "-nodes", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-subj", "/CN=localhost"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(["openssl", "req", *made, *files], check=True, capture_output=True)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    with ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as server:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        with pytest.raises(InputProblems, match=r"CERTIFICATE_VERIFY_FAILED.*export SSL_CERT_FILE"):
            model_folder(f"https://localhost:{server.server_port}/model")
        server.shutdown()
        thread.join()


def test_the_first_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the README begins: an example mask, and the model of the package, whose images show the organs' HU."""
    mask, out = tmp_path / "example.png", tmp_path / "example_ct.png"
    assert main(["paint", "--example", "-i", str(mask)]) == 0
    assert f"next: segdiff paint -i {mask} -o {out}" in capsys.readouterr().out
    assert main(["paint", "-i", str(mask), "-o", str(out)]) == 0
    assert "synthetic CT" in capsys.readouterr().out
    ids_HW, hu_HW = np.asarray(Image.open(mask)), np.asarray(Image.open(out)) * (512 / 255) - 256
    assert hu_HW.shape == (256, 256)
    mean_of = {name: hu_HW[ids_HW == AMOS.names.index(name)].mean() for name in ("aorta", "kidney_left", "body")}
    # The phantom draws blood at 168 HU and kidneys at 190 to 208; most of the body is fat, at -102.
    assert mean_of["aorta"] > 80
    assert mean_of["kidney_left"] > 100
    assert mean_of["body"] < 20
    assert hu_HW[ids_HW == 0].mean() < -230


def test_a_run_folder_is_a_model(folder: Path, organs: np.ndarray) -> None:
    with pytest.warns(UserWarning, match="how its slices were cut is not known"):
        model = segdiff_dist.open_model(folder.parent / "weights" / "ema", device="cpu")
    assert segdiff_dist.paint(organs, model).image.size == (32, 32)
