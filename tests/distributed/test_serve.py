"""`segdiff serve`: the same images as `segdiff paint`, whatever else is asked for; overload, death, and bad input."""

from __future__ import annotations

import asyncio
import base64
import gzip
import io
import json
import socket
import struct
import time
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import requests
from PIL import Image
from serve_support import LIVER, TOKEN, Client, model_process, organs, png, service, small_pipeline

import segdiff_dist
from segdiff_dist.cli import main
from segdiff_dist.serving.accept import kind_of
from segdiff_dist.serving.config import ServeConfig
from segdiff_dist.serving.messages import ServiceError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray Serve's own

QUEUE = 8
VOXELS = 10_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_pipeline(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[Client]:
    config = ServeConfig(
        models=(f"small={folder}",),
        queue=QUEUE,
        threads=1,
        device="cpu",
        voxels=VOXELS,
        body_mb=0.2,
        body_s=4,
        steps=400,
    )
    with service(config) as found:
        yield found


def nifti(voxels: np.ndarray) -> bytes:
    return gzip.compress(nib.Nifti1Image(voxels, np.diag([2.0, 2.0, 2.0, 1.0])).to_bytes())


def with_nan_affine(content: bytes) -> bytes:
    """The rows of the affine are at bytes 280 to 327 (nifti1.h)."""
    whole = gzip.decompress(content)
    return whole[:280] + struct.pack("<12f", *[np.nan] * 12) + whole[328:]


def test_images_are_those_of_paint(client: Client, folder: Path) -> None:
    """Of several seeds and modalities at the same time, which go through the network together."""
    wanted = [{"seed": seed, "modality": modality} for seed in (7, 2**40) for modality in ("CT", "MR")]
    model = segdiff_dist.open_model(folder, device="cpu")
    for answer, own in zip(client.paint_many(nifti(organs()[..., None]), wanted), wanted, strict=True):
        assert answer.status_code == 200, answer.text
        made = nib.Nifti1Image.from_bytes(gzip.decompress(answer.content))
        alone = segdiff_dist.paint(organs()[..., None], model, affine=np.diag([2.0, 2.0, 2.0, 1.0]), **own)
        np.testing.assert_array_equal(np.asarray(made.dataobj), alone.values)
        np.testing.assert_allclose(made.affine, np.diag([2.0, 2.0, 2.0, 1.0]))
    assert client.metric("segdiff_slices_total") >= 4
    picture = np.asarray(Image.open(io.BytesIO(client.paint(png(organs()), "image/png", seed=7).content)))
    np.testing.assert_array_equal(picture, segdiff_dist.paint(organs(), model, seed=7).pixels)


def test_models_labels_examples_and_masks(client: Client) -> None:
    [model] = client.get("/models").json()["models"]
    assert (model["name"], model["default"], model["size"], model["modalities"]) == ("small", True, 32, ["CT", "MR"])
    assert client.get("/labels?model=small").json() == model["labels"]
    assert str(Path.home()) not in json.dumps(model)
    for one in client.get("/examples").json():
        content = client.get(one["url"]).content
        assert (np.asarray(nib.Nifti1Image.from_bytes(gzip.decompress(content)).dataobj) == LIVER).any() or one
    read = client.paint(content, path="/masks", accept="application/json")
    assert read.status_code == 422, "the volume has more voxels than are taken"
    read = client.paint(png(organs()), path="/masks", accept="application/json").json()
    mask = nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(read["mask"])))
    assert mask.get_data_dtype() == np.uint8
    assert sorted(read["shape"]) == [1, 32, 32]
    assert (np.asarray(mask.dataobj) == LIVER).sum() == (organs() == LIVER).sum()
    assert "/tmp" not in json.dumps(read)


def test_dicom_json_and_events(client: Client) -> None:
    volume = nifti(np.stack([organs(), organs()], axis=2))
    with zipfile.ZipFile(io.BytesIO(client.paint(volume, "application/dicom+zip").content)) as archive:
        assert archive.namelist() == ["images/0001.dcm", "images/0002.dcm", "masks/mask.dcm"]
    answer = client.paint(volume, "application/json", seed=3).json()
    assert (answer["seed"], answer["model"], answer["modality"], answer["hu"]) == (3, "small", "CT", True)
    events = [
        line for line in client.paint(volume, "text/event-stream", seed=3).iter_lines(decode_unicode=True) if line
    ]
    kinds = [line.removeprefix("event: ") for line in events[::2]]
    values = [json.loads(line.removeprefix("data: ")) for line in events[1::2]]
    assert (kinds[0], kinds[-1]) == ("queued", "image")
    steps = [value["step"] for kind, value in zip(kinds, values, strict=True) if kind == "progress"]
    assert steps == sorted(steps)
    assert steps[-1] == values[-2]["steps"]
    assert values[-1]["image"] == answer["image"]


def header_of_png(side: int) -> bytes:
    """A PNG that declares side x side pixels, and holds a few bytes."""
    body = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    packed = zlib.compress(bytes(2**20))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", body) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


SCRIPT = "<script>alert(1)</script>"
ELSEWHERE = b"NRRD0004\ntype: uint8\ndimension: 2\nsizes: 4 4\nencoding: raw\ndata file: /etc/passwd\n\n"
BAD: dict[str, tuple[bytes, dict[str, Any], int, str]] = {
    "not a mask": (b"MZ" + bytes(99), {}, 400, "send one PNG"),
    "empty": (b"", {}, 400, "empty"),
    "truncated": (png(organs())[:-20], {}, 400, "cannot be read"),
    "truncated volume": (nifti(organs()[..., None])[:60], {}, 400, ""),
    "two gigapixels": (header_of_png(46_341), {}, 422, "at most"),
    "more voxels than are taken": (header_of_png(200), {}, 422, "at most 10,000"),
    "a bomb": (header_of_png(32), {}, 400, "more pixels than"),
    "all background": (png(np.zeros((32, 32), np.uint8)), {}, 422, "all background"),
    "a NaN affine": (with_nan_affine(nifti(organs()[..., None])), {}, 400, ""),
    "another file in the header": (ELSEWHERE, {}, 400, "names another file"),
    "unknown labels": (png(np.full((32, 32), 99, np.uint8)), {}, 422, "99"),
    "a script as a label": (png(organs()), {"labels": json.dumps({LIVER: SCRIPT})}, 422, SCRIPT),
    "labels that are a path": (png(organs()), {"labels": "/etc/passwd"}, 422, "labels"),
    "another modality": (png(organs()), {"modality": "PET"}, 422, "CT, MR"),
    "too many steps": (png(organs()), {"steps": 401}, 422, "at most 400"),
    "a field twice": (png(organs()), {"seed": [1, 2]}, 422, "seed: given more than once"),
    "a label twice": (png(organs()), {"labels": '{"1": "liver", "1": "spleen"}'}, 422, "labels"),
    "a field of another name": (png(organs()), {"modalty": "CT"}, 422, "modalty"),
    "a seed below 0": (png(organs()), {"seed": -1}, 422, "seed: -1: give 0 or more"),
    "a seed that is no number": (png(organs()), {"seed": "x"}, 422, "seed: x: give a whole number"),
    "an endless spacing": (png(organs()), {"spacing": "inf"}, 422, "spacing: inf: give a finite number"),
    "a spacing of 0": (png(organs()), {"spacing": 0}, 422, "spacing: 0: give more than 0"),
    "another axis": (png(organs()), {"axis": "up"}, 422, "axis: up: give 'axial', 'coronal' or 'sagittal'"),
    "a long name": (png(organs()), {"modality": "x" * 65}, 422, "give at most 64 characters"),
    "a path as a model": (png(organs()), {"model": "../../etc"}, 404, "small"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_a_clear_answer(client: Client, name: str) -> None:
    mask, fields, status, words = BAD[name]
    answer = client.paint(mask, **fields)
    detail = answer.json()["detail"]
    assert (answer.status_code, answer.headers["Content-Type"]) == (status, "application/json"), detail
    assert words in detail
    assert "/tmp" not in detail
    assert "--" not in detail, "fields of the form, not flags"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize(
    ("accepted", "kind"),
    [
        ("", "nifti"),
        ("*/*", "nifti"),
        ("IMAGE/*", "png"),
        ("image/png;q=0.1, application/json;q=0.9", "json"),
        ("image/png; q=0, application/json", "json"),
        ("*/*, image/png", "png"),
        ("application/x-nifti;q=0, application/gzip;q=0, application/octet-stream;q=0, */*", "png"),
        ("text/html, application/xml;q=0.9, */*;q=0.8", "nifti"),
        ("*/*;q=0", None),
        ("image/png;q=0", None),
        ("text/*", None),
    ],
)
def test_accept_is_what_the_client_likes_most(accepted: str, kind: str | None) -> None:
    if kind is not None:
        assert kind_of(accepted) == kind
        return
    with pytest.raises(ServiceError, match="Accept"):
        kind_of(accepted)


def test_what_a_request_must_be(client: Client) -> None:
    assert client.paint(bytes(300_000)).status_code == 413
    form = {"Content-Type": "multipart/form-data; boundary=b"}
    head = b'--b\r\nContent-Disposition: form-data; name="mask"; filename="m"\r\n\r\n'
    pieces = iter([head, *[bytes(10_000)] * 30])
    in_pieces = requests.post(f"{client.url}/paint", data=pieces, headers=client.headers | form)
    assert in_pieces.status_code == 413, "without a length"
    assert client.paint(png(organs()), "text/html").status_code == 406
    assert client.paint(nifti(np.stack([organs()] * 2, axis=2)), "image/png").status_code == 406
    assert client.get("/paint").status_code == 405
    head = requests.head(f"{client.url}/models", headers=client.headers)
    assert (head.status_code, head.content) == (200, b"")
    as_json = requests.post(f"{client.url}/paint", json={"mask": 1}, headers=client.headers)
    assert as_json.status_code == 415
    assert "multipart/form-data" in as_json.json()["detail"]
    without = requests.post(f"{client.url}/paint", files={"seed": (None, "1")}, headers=client.headers)
    assert (without.status_code, without.json()["detail"]) == (422, "mask: (not given): send it")
    for token in ("", "Bearer wrong", f"Basic {TOKEN}"):
        refused = requests.get(f"{client.url}/models", headers={"Authorization": token})
        assert (refused.status_code, refused.headers["WWW-Authenticate"]) == (401, "Bearer")
    foreign = requests.post(f"{client.url}/paint", headers=client.headers | {"Origin": "http://evil.example"})
    assert foreign.status_code == 403
    page = requests.get(f"{client.url}/docs")
    assert "other_labels" in page.text
    assert "://" not in page.text.replace("http://www.w3.org", ""), "nothing of another host"
    assert "/paint" in requests.get(f"{client.url}/openapi.json").json()["paths"]


FORM = {"Content-Type": "multipart/form-data; boundary=b"}
MASK = b'--b\r\nContent-Disposition: form-data; name="mask"; filename="m"\r\n\r\n' + png(organs())
END = b"\r\n--b--\r\n"


def test_a_body_that_is_cut_off_or_does_not_end(client: Client) -> None:
    def sent(body: Any) -> requests.Response:
        return requests.post(f"{client.url}/paint", data=body, headers=client.headers | FORM, timeout=60)

    cut = sent(MASK)
    assert (cut.status_code, cut.json()["detail"][:20]) == (400, "body: cut off after ")
    assert sent(MASK + END + b"text that nobody reads").status_code == 200

    def slowly() -> Iterator[bytes]:
        yield MASK
        time.sleep(5)
        yield END

    began = time.monotonic()
    late = sent(slowly())
    assert (late.status_code, late.headers["Connection"]) == (408, "close"), late.text
    assert "4 s" in late.json()["detail"]
    assert time.monotonic() - began < 30


def test_overload_is_refused_at_once_and_ends(client: Client) -> None:
    answers = client.paint_many(png(organs()), [{"steps": 60, "seed": seed} for seed in range(QUEUE + 6)])
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 429}
    assert statuses.count(200) >= QUEUE
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert 1 <= int(refused.headers["Retry-After"]) <= 120
    assert client.paint(png(organs())).status_code == 200


def test_a_client_that_leaves_ends_its_work(client: Client) -> None:
    before = client.metric("segdiff_cancelled_total")
    leaving = client.paint(png(organs()), "text/event-stream", steps=400)
    assert next(leaving.iter_lines()) == b"event: queued"
    leaving.close()
    client.wait_for("segdiff_cancelled_total", before + 1)
    client.wait_for("segdiff_active_requests", 0)


def test_a_request_that_is_cancelled_leaves_no_task(folder: Path) -> None:
    from segdiff_dist.serving.messages import MaskUpload, PaintRequest
    from segdiff_dist.serving.served_model import ServedModel

    model = ServedModel("small", str(folder), ServeConfig(device="cpu", steps=400), threads=1)

    async def leave() -> set[asyncio.Task[Any]]:
        events = model.paint(PaintRequest(MaskUpload(png(organs())), steps=400))
        assert (await anext(events)).kind == "queued"
        waiting = asyncio.create_task(anext(events))
        await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.wait([waiting])
        await asyncio.sleep(0.01)
        return asyncio.all_tasks() - {asyncio.current_task()}

    left = asyncio.run(leave())
    model.close()
    assert not left


def test_a_killed_process_loses_no_request(client: Client) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        many = pool.submit(client.paint_many, png(organs()), [{"steps": 200, "seed": n} for n in range(QUEUE - 1)])
        client.wait_for("segdiff_active_requests", QUEUE - 1)
        model_process().kill()
        assert [answer.status_code for answer in many.result()] == [200] * (QUEUE - 1)
    assert client.metric("segdiff_retried_total") >= 1


def test_the_command_refuses_before_it_starts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["serve", "--models", "a=starter", "b=starter", "--dry-run"]) == 0
    assert "models: a, b" in capsys.readouterr().out
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = str(busy.getsockname()[1])
        for arguments, words in (
            (["--host", "0.0.0.0"], "SEGDIFF_TOKEN"),
            (["--models", str(tmp_path)], "neither a run folder nor a pipeline"),
            (["--models", "a b=starter"], "NAME=MODEL"),
            (["--max-replicas", "1", "--min-replicas", "2"], "--max-replicas"),
            (["--port", port], "cannot be used"),
        ):
            assert main(["serve", *arguments]) == 2
            assert words in capsys.readouterr().err
