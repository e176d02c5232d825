"""Validation while training: the same number for the same weights on any number of ranks, and pictures to look at."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests_support import flip_mask_bytes, write_shapes

from data_shards.feed.config import LoaderConfig
from data_shards.store.shards import ShardSet
from segdiff_dist.denoising.config import DenoiserConfig, DiffusionConfig, ValidationConfig
from segdiff_dist.denoising.denoiser import Denoiser
from segdiff_dist.denoising.sample_grid import SampleGrids
from segdiff_dist.denoising.sampler_config import SamplerConfig
from segdiff_dist.denoising.validation import DenoiserValidation, HeldOutSlices, choose_pictures, picture_sharpness
from segdiff_dist.spectra import BAND_NAMES

CPU = torch.device("cpu")
NET = DenoiserConfig(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, attention_resolutions=(16,))
DIFFUSION = DiffusionConfig(prediction_type="v", zero_terminal_snr=True)
CONFIG = ValidationConfig(num_images=22, num_pictures=5, num_steps=3, batch_size=4)
WORKER = """
import json, os, sys
from pathlib import Path
import torch
import torch.distributed as dist
sys.path[:0] = {folders!r}
import test_validation
dist.init_process_group("gloo")
validation, forward, calls = test_validation.make(Path({shapes!r}), Path({folder!r}))
metrics = validation(forward, 640)
(Path({folder!r}) / f"{{os.environ['RANK']}}.json").write_text(json.dumps([metrics, len(calls)]))
dist.destroy_process_group()
"""


def make(shapes: Path, folder: Path, config: ValidationConfig = CONFIG, **options: Any) -> tuple[Any, Any, list[int]]:
    """A validation, the forward of a fixed net, and the sizes of the batches it has been given."""
    shards = ShardSet.open(shapes)
    torch.manual_seed(0)
    net = Denoiser(NET, shards.label_table, shards.size).eval()
    calls: list[int] = []

    def forward(*args: Any) -> torch.Tensor:
        calls.append(len(args[0]))
        return net(*args)

    rows = options.pop("rows", shards.select(split="val"))
    loader = LoaderConfig(num_threads=1, flip=True, rotate_degrees=30, on_corrupt=options.pop("on_corrupt", "raise"))
    sampler, diffusion = options.pop("sampler", SamplerConfig()), options.pop("diffusion", DIFFUSION)
    draw = SampleGrids(folder / "pictures", shards.label_table, options.pop("tracker", None))
    slices = HeldOutSlices(shards, rows, loader, **options)
    validation = DenoiserValidation(slices, diffusion, sampler, config, CPU, draw)
    return validation, forward, calls


def on_ranks(num: int, shapes: Path, folder: Path) -> Iterator[tuple[dict[str, float], int]]:
    import json
    import socket

    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    program = WORKER.format(folders=folders, shapes=str(shapes), folder=str(folder))
    common = {"WORLD_SIZE": str(num), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    common |= {"SEGDIFF_LEAN_IMPORTS": "1"}  # as in a command's processes
    workers = [
        subprocess.Popen([sys.executable, "-c", program], env={**os.environ, **common, "RANK": str(rank)})
        for rank in range(num)
    ]
    assert [worker.wait(timeout=120) for worker in workers] == [0] * num
    for rank in range(num):
        metrics, calls = json.loads((folder / f"{rank}.json").read_text())
        yield metrics, calls


def test_the_same_weights_give_the_same_number_on_any_number_of_ranks(shapes: Path, tmp_path: Path) -> None:
    validation, forward, _ = make(shapes, tmp_path / "one")
    alone = validation(forward, 640)
    assert {"val_loss", *(f"val_loss_t_{t}_{t + 250}" for t in (0, 250, 500, 750))} < set(alone)
    assert {"val_sharpness", *(f"val_sharpness_{band}" for band in BAND_NAMES), "val_texture"} < set(alone)
    assert validation(forward, 1280) == alone
    assert make(shapes, tmp_path / "again")[0](forward, 0) == alone
    # 22 slices in batches of 4 and 5 pictures: uneven shares.
    first, second = on_ranks(2, shapes, tmp_path / "two")
    assert first == second  # the same numbers, and as many calls of forward
    losses = [name for name in alone if name.startswith("val_loss")]
    assert [first[0][name] for name in losses] == pytest.approx([alone[name] for name in losses], rel=1e-6)
    # Some CPUs round batches of fewer than four otherwise, which moves single pixels of an image by a grey value.
    assert first[0] == pytest.approx(alone, rel=1e-3)
    pictures = [Image.open(tmp_path / run / "pictures" / "samples_000000000640.png") for run in ("one", "two")]
    one, two = (np.asarray(picture.convert("RGB"), dtype=int) for picture in pictures)
    assert np.abs(one - two).max() <= 1


def test_every_slice_counts_once(shapes: Path, tmp_path: Path) -> None:
    config = ValidationConfig(num_images=24, num_pictures=0, batch_size=5)  # as many as the split has
    validation, _, _ = make(shapes, tmp_path, config, diffusion=DiffusionConfig(prediction_type="x0"))
    shards = ShardSet.open(shapes)
    images = np.stack([shards.read(int(row)).image_HW for row in shards.select(split="val")])
    # Predicting 0 for x_0 errs by x_0 itself, whatever the noise.
    expected = np.square(images / 127.5 - 1.0).mean()
    assert validation(lambda x_t, *_: torch.zeros_like(x_t), 0)["val_loss"] == pytest.approx(expected, rel=1e-6)


def test_the_loss_falls_with_better_predictions(shapes: Path, tmp_path: Path) -> None:
    validation, forward, _ = make(shapes, tmp_path, ValidationConfig(num_images=24, num_pictures=0))
    nothing = validation(lambda x_t, *_: torch.zeros_like(x_t), 0)["val_loss"]
    assert nothing == pytest.approx(1.0, abs=0.5)  # the variance of v
    assert validation(forward, 0)["val_loss"] != nothing


def test_pictures_show_both_modalities_and_other_patients(shapes: Path, tmp_path: Path) -> None:
    shards = ShardSet.open(shapes)
    rows = shards.select(split="val")
    chosen = [shards.meta(row) for row in choose_pictures(shards, rows, 6)]
    assert [meta.modality for meta in chosen] == ["CT", "MR"] * 3
    assert len({meta.case_id for meta in chosen[:4]}) == 4
    assert len(choose_pictures(shards, rows, 1000)) == len(set(choose_pictures(shards, rows, 1000))) == len(rows)


def test_the_grid_is_drawn_and_tracked(shapes: Path, tmp_path: Path) -> None:
    from PIL import Image

    tracked = []

    class Log:
        def log_artifact(self, path: Path, folder: str) -> None:
            tracked.append((path.name, folder))

    validation, forward, calls = make(shapes, tmp_path, tracker=Log(), sampler=SamplerConfig(guidance=2.0))
    validation(forward, 12_800)
    assert tracked == [("samples_000000012800.png", "pictures")]
    # 22 images in batches of 4; then 5 pictures in batches of 4, twice as large for guidance, 3 steps each.
    assert calls == [4] * 6 + [8] * 3 + [2] * 3
    with Image.open(tmp_path / "pictures" / "samples_000000012800.png") as picture:
        assert picture.width > 5 * 128


def test_blurred_pictures_have_less_power_in_the_fine_bands(shapes: Path) -> None:
    shards = ShardSet.open(shapes)
    records = [shards.read(row) for row in choose_pictures(shards, shards.select(split="val"), 6)]
    real = np.stack([record.image_uint8() for record in records])
    same = picture_sharpness(records, real, shards.label_table)
    assert set(same.values()) == {1.0}
    soft = sum(np.roll(real.astype(float), shift, axis) for axis in (1, 2) for shift in (-1, 0, 1)) / 6
    blurred = picture_sharpness(records, soft.round().astype(np.uint8), shards.label_table)
    assert blurred["val_sharpness_75_100"] < 0.3 < 0.8 < blurred["val_sharpness_3_12"]
    assert blurred["val_sharpness"] < 0.8
    assert blurred["val_texture"] < 0.8
    # Masks without organs have no texture, and no other value replaces it.
    without = [replace(record, mask_HW=np.zeros_like(record.mask_HW)) for record in records]
    assert "val_texture" not in picture_sharpness(without, real, shards.label_table)


def test_without_a_validation_split_nothing_is_measured(shapes: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no validation slice"):
        validation, forward, calls = make(shapes, tmp_path, rows=np.empty(0, dtype=np.int64))
    assert validation(forward, 0) == {}
    assert calls == []
    assert not list(tmp_path.iterdir())


def test_bad_settings_are_named() -> None:
    found = ValidationConfig(num_images=0, num_pictures=-1, num_steps=0, batch_size=0).problems(DiffusionConfig())
    assert [p.field for p in found] == [
        f"validation.{name}" for name in ("num_images", "num_pictures", "num_steps", "batch_size")
    ]
    [found_one] = ValidationConfig(num_steps=30).problems(DiffusionConfig(num_train_timesteps=25))
    assert "knows 25 timesteps" in str(found_one)


@pytest.mark.filterwarnings("ignore:skipped:RuntimeWarning")
def test_a_damaged_slice_is_left_out_where_the_loader_is_to_skip_it(tmp_path: Path) -> None:
    shards = ShardSet.open(write_shapes(tmp_path / "set"))
    rows = shards.select(split="val")
    [picture] = choose_pictures(shards, rows, 1)
    flip_mask_bytes(shards, [picture])
    with pytest.raises(ValueError, match=f"sample {shards.key(picture)}"):
        make(tmp_path / "set", tmp_path)
    with pytest.warns(RuntimeWarning, match=f"no sample grid of it.*{shards.key(picture)}"):
        validation, forward, _ = make(tmp_path / "set", tmp_path, on_corrupt="skip")
    assert np.isfinite(validation(forward, 64)["val_loss"])
    assert len(list((tmp_path / "pictures").iterdir())) == 1
