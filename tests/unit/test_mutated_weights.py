"""Checkpoints and weights with flipped bits, other values and other shapes: refused with file and remedy, or passed
over; never a traceback, and never memory for more than the files hold."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_shards.labels import AMOS
from data_shards.problems import InputProblems
from segdiff_dist.denoising.config import DenoiserConfig
from segdiff_dist.denoising.denoiser import Denoiser
from segdiff_dist.segmentation.config import SegmenterConfig
from segdiff_dist.segmentation.network import SegmenterNet
from segdiff_dist.segmentation.segmenter import Segmenter, save_segmenter
from segdiff_dist.training import checkpoint, sharded_state
from segdiff_dist.training.sharded_state import Extent, SavedState, StateShard
from segdiff_dist.weight_files import DIGESTS

SMALL = DenoiserConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4)
VALUES: list[Any] = [None, -1, 0, 10**9, 1.5, "x", [], {}, [[1]], True]


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """A few bits flipped, a piece cut out, or the end cut off."""
    changed, kind = bytearray(content), rng.integers(3)
    at = int(rng.integers(len(changed)))
    if kind == 0:
        for _ in range(int(rng.integers(1, 4))):
            changed[int(rng.integers(len(changed)))] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        del changed[at : at + int(rng.integers(1, 64))]
    else:
        del changed[at:]
    return bytes(changed)


def other_values(values: Any, rng: np.random.Generator) -> Any:
    """One place of plain values left out or with another value."""
    copy = json.loads(json.dumps(values))
    where, at = copy, None
    while isinstance(where, dict | list) and where:
        keys = list(where) if isinstance(where, dict) else list(range(len(where)))
        parent, at = where, keys[int(rng.integers(len(keys)))]
        where = parent[at]
        if rng.random() < 0.4:
            break
    if rng.random() < 0.3 and isinstance(parent, dict):
        del parent[at]
    else:
        parent[at] = VALUES[int(rng.integers(len(VALUES)))]
    return copy


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "ema_0.05"
    model = Denoiser(SMALL, AMOS, 16)
    model.save(folder, model.state_dict())
    return folder


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, config = tmp_path_factory.mktemp("segmenter") / "weights", SegmenterConfig(channels=(8, 16))
    save_segmenter(folder, SegmenterNet(config, AMOS.num_classes).state_dict(), config, AMOS)
    return folder


@pytest.mark.parametrize("digests", [True, False], ids=["with digests", "of before"])
@pytest.mark.parametrize("kind", ["denoiser", "segmenter"])
def test_weights_are_refused_in_words(
    kind: str, digests: bool, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("segdiff_dist.weight_files.PAUSE_S", 0.0)
    whole = request.getfixturevalue(kind)
    load: Callable[[Path], object] = Denoiser.load if kind == "denoiser" else Segmenter.load
    rng, refused = np.random.default_rng(0), 0
    names = [f.name for f in sorted(whole.iterdir()) if f.name != DIGESTS]
    for number in range(90):
        folder = tmp_path / "copy"
        shutil.copytree(whole, folder, dirs_exist_ok=True)
        if not digests:
            (folder / DIGESTS).unlink()
        file = folder / names[number % len(names)]
        content = file.read_bytes()
        if file.suffix == ".json" and number % 2:
            file.write_text(json.dumps(other_values(json.loads(content), rng)))
        else:
            file.write_bytes(mutated(content, rng))
        try:
            load(folder)
        except InputProblems as error:
            refused += 1
            for problem in error.problems:
                assert problem.remedy
    assert refused == 90 if digests else refused > 20


def test_fifteen_flipped_bits_are_seen(denoiser: Path, tmp_path: Path) -> None:
    shutil.copytree(denoiser, tmp_path / "copy")
    file = tmp_path / "copy" / "diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    for at in np.random.default_rng(1).integers(len(content) // 2, len(content), 15):
        content[at] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputProblems, match="its bytes are not those that were written"):
        Denoiser.load(tmp_path / "copy")


def test_another_size_than_the_weights_takes_no_memory(
    denoiser: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(denoiser, tmp_path / "copy")
    (tmp_path / "copy" / DIGESTS).unlink()
    about = json.loads((denoiser / "segdiff.json").read_text())
    about["denoiser"]["block_out_channels"] = [8192, 16384]
    (tmp_path / "copy" / "segdiff.json").write_text(json.dumps(about))
    devices = []
    build = Denoiser.__init__

    def seen(self: Denoiser, *arguments: Any, **named: Any) -> None:
        build(self, *arguments, **named)
        devices.append(next(self.parameters()).device.type)

    monkeypatch.setattr(Denoiser, "__init__", seen)
    with pytest.raises(InputProblems, match=r"is 7x32 in the file and 7x32768 in the description"):
        Denoiser.load(tmp_path / "copy")
    assert devices == ["meta"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """checkpoints/ with two complete ones."""
    checkpoints = tmp_path_factory.mktemp("run") / "checkpoints"
    for images in (8, 16):
        write_checkpoint(checkpoints, images)
    return checkpoints


def write_checkpoint(checkpoints: Path, images: int) -> Path:
    folder = checkpoints / checkpoint.checkpoint_name(images)
    folder.mkdir(parents=True)
    extents = (Extent("a", 0, 6, 0, 0), Extent("b", 0, 2, 0, 6))
    shards = {"online": [torch.arange(8.0)], "ema_0.05": [torch.ones(8)]}
    sharded_state.write(folder, 0, StateShard({"a": (2, 3), "b": (2,)}, extents, shards, {"step": 1.0}))
    (folder / "config.yaml").write_text("train: {lr: 0.1}\n")
    state = {"images_seen": images, "ranks": 1, "best_score": None, "best_images_seen": images, "guard": [0.0] * 5}
    state |= {"shards_digest": "x", "window": {"loss": [float("nan"), 1.0]}, "sound": True}
    (folder / checkpoint.STATE).write_text(json.dumps(state))
    checksum = checkpoint.crc32c((folder / checkpoint.STATE).read_bytes())
    (folder / checkpoint.MARKER).write_text(f"{checksum}\n")
    return folder


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(written: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(120):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(written, tmp_path / "copy")
        newest = tmp_path / "copy" / f"{16:012d}"
        file = newest / ["rank_00000.safetensors", "rank_00000.json", "state.json"][number % 3]
        file.write_bytes(mutated(file.read_bytes(), rng))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = checkpoint.newest_usable(tmp_path / "copy")
        assert found is not None
        if file.suffix != ".json" or file.name == "state.json":
            assert found.name == f"{8:012d}"
        checkpoint.read_state(found)
        SavedState(found, 1).full("online")


def test_forged_checkpoints_are_refused_in_words(written: Path, tmp_path: Path) -> None:
    """Whoever forges one makes the checksums fit."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    rng, folder, refused = np.random.default_rng(0), tmp_path / f"{16:012d}", 0
    file = written / f"{16:012d}" / "rank_00000.safetensors"
    with safe_open(file, "pt") as opened:
        layout = json.loads(opened.metadata()["layout"])
    state = json.loads((file.parent / checkpoint.STATE).read_text())
    tensors = load_file(file)
    for _ in range(120):
        shutil.copytree(file.parent, folder, dirs_exist_ok=True)
        (folder / checkpoint.MARKER).write_text("")
        save_file(tensors, folder / file.name, metadata={"layout": json.dumps(other_values(layout, rng))})
        (folder / checkpoint.STATE).write_text(json.dumps(other_values(state, rng)))
        for read in (lambda: checkpoint.read_state(folder), lambda: SavedState(folder, 1).full("online")):
            try:
                read()
            except InputProblems:
                refused += 1
    assert refused > 60


def test_copies_beside_checkpoints_are_left_alone(written: Path, tmp_path: Path) -> None:
    shutil.copytree(written, tmp_path / "checkpoints")
    for name in ("000000000016.bak", "000000000099 (copy)", "12", "notes"):
        shutil.copytree(written / f"{8:012d}", tmp_path / "checkpoints" / name)
    assert checkpoint.newest_usable(tmp_path / "checkpoints") == tmp_path / "checkpoints" / f"{16:012d}"
    checkpoint.prune(tmp_path / "checkpoints", keep=1)
    left = {folder.name for folder in (tmp_path / "checkpoints").iterdir()}
    assert left == {f"{16:012d}", "000000000016.bak", "000000000099 (copy)", "12", "notes"}


def test_the_same_state_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = (write_checkpoint(tmp_path / name, 8) for name in "ab")
    for file in first.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes()
