"""`denoiser.space: latent`: the scale and the cache of latents, and a denoiser from training to the pipeline folder."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sampling_support import sample_and_compare_pipeline

from data_shards.feed.config import LoaderConfig
from data_shards.feed.loader import Loader
from data_shards.feed.order import Sequential, sequential_positions
from data_shards.labels import AMOS
from data_shards.problems import InputProblems
from data_shards.records import Batch
from data_shards.store.shards import ShardSet
from segdiff_dist.autoencoding.autoencoder import save_autoencoder
from segdiff_dist.autoencoding.config import AutoencoderConfig
from segdiff_dist.autoencoding.network import make_autoencoder
from segdiff_dist.cli import main
from segdiff_dist.denoising.config import DenoiserConfig, DiffusionConfig
from segdiff_dist.denoising.denoiser import Denoiser
from segdiff_dist.denoising.latent_space import LatentSpace, find_space
from segdiff_dist.denoising.latents import latents_of, run_space
from segdiff_dist.denoising.sigma_data import with_sigma_data

CONFIG = AutoencoderConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, latent_channels=3)
NET = DenoiserConfig(
    block_out_channels=(16, 32),
    layers_per_block=1,
    norm_num_groups=8,
    attention_resolutions=(),
    space="latent",
    autoencoder="set by a test",
)


def untrained(run: Path, size: int, seed: int = 0) -> Path:
    """An autoencoder whose latents mean nothing, but are the same every time."""
    torch.manual_seed(seed)
    net = make_autoencoder(CONFIG)
    save_autoencoder(run / "autoencoder/weights", net.state_dict(), CONFIG, size, ("CT", "MR"), {})
    return run


def batches(shards: ShardSet, rows: np.ndarray, extra: np.ndarray | None = None) -> list[Batch]:
    positions = sequential_positions(len(rows), 8)
    plain = LoaderConfig()
    return list(Loader(shards, Sequential(rows), positions, plain, batch_size=8, seed=0, extra_NX=extra))


def test_latents_are_scaled_to_unit_variance_and_cached_ones_are_those_of_the_slices(
    small_shapes: Path, tmp_path: Path
) -> None:
    run, shards = untrained(tmp_path, 16), ShardSet.open(small_shapes)
    rows = shards.select(split="train")
    cached = latents_of(LatentSpace.open(run), shards, rows, LoaderConfig(), run)
    assert cached is not None
    assert cached.shape == (len(shards), 3, 8, 8)
    space = run_space(replace(NET, autoencoder=str(run)), run / "weights")
    assert space is not None
    from_cache = [space.x_0(batch) for batch in batches(shards, rows, cached)]
    fresh = [space.x_0(batch) for batch in batches(shards, rows)]
    every = torch.cat(from_cache)
    torch.testing.assert_close(every.mean(dim=(0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-3)
    torch.testing.assert_close(every.std(dim=(0, 2, 3)), torch.ones(3), rtol=1e-3, atol=0)
    torch.testing.assert_close(every, torch.cat(fresh), rtol=1e-4, atol=1e-4)
    for one, other, batch in zip(from_cache, fresh, batches(shards, rows), strict=True):
        torch.testing.assert_close(space.decode(one), space.decode(other), rtol=1e-4, atol=1e-4)
        plain = space.autoencoder.decode(space.autoencoder.encode(batch.image_BHW))
        torch.testing.assert_close(space.decode(one), plain, rtol=1e-3, atol=1e-3)

    flipped = latents_of(LatentSpace.open(run), shards, rows, LoaderConfig(flip=True), untrained(tmp_path / "b", 16))
    assert flipped is None, "a flipped slice has other latents"
    scales = [json.loads((r / "latents/latents.json").read_text()) for r in (run, tmp_path / "b")]
    assert scales[0] == scales[1]


def test_a_small_organ_keeps_its_share_of_a_latent_position(tmp_path: Path) -> None:
    space = LatentSpace.open(untrained(tmp_path, 16))
    model = Denoiser(NET, AMOS, 16, latent=space)
    assert (model.shape, model.unet.config.in_channels) == ((3, 8, 8), 3 + AMOS.num_classes)
    mask = torch.zeros(1, 16, 16, dtype=torch.uint8)
    mask[0, 4, 7] = 6
    shares = space.pooled(model.mask_encoder(mask, torch.float32))
    assert shares[0, 6].nonzero().tolist() == [[2, 3]]
    assert shares[0, :, 2, 3].tolist() == [0.75, *[0.0] * 5, 0.25, *[0.0] * (AMOS.num_classes - 7)]
    x, t, c = torch.randn(1, 3, 8, 8), torch.tensor([5]), torch.tensor([0])
    assert model(x, t, mask, c).shape == (1, 3, 8, 8)
    assert not torch.equal(model(x, t, mask, c), model(x, t, torch.zeros_like(mask), c))


@pytest.fixture(scope="module")
def trained(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = untrained(tmp_path_factory.mktemp("latent"), 32)
    assert main(["train", *flags(shapes, run)]) == 0
    return run


def flags(shapes: Path, run: Path) -> list[str]:
    own = ["--denoiser.space", "latent", "--denoiser.autoencoder", str(run), "--loader.no-flip"]
    return ["--config", "smoke", "--data", str(shapes), "--run", str(run), "--tracking.no-enabled", *own]


def test_it_trains_and_goes_on_where_it_stopped(trained: Path, shapes: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert len(list((run / "pictures").iterdir())) > 0
    shutil.rmtree(run / "checkpoints" / f"{128:012d}")
    shutil.rmtree(run / "latents")
    again = [flag if flag != str(trained) else str(run) for flag in flags(shapes, trained)]
    assert main(["train", *again]) == 0
    assert [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()] == [
        line["loss"] for line in lines
    ]
    file = "weights/ema_0.05/diffusion_pytorch_model.safetensors"
    assert (run / file).read_bytes() == (trained / file).read_bytes()


def test_the_weights_and_the_pipeline_carry_the_autoencoder(trained: Path, shapes: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    weights = Path(shutil.copytree(trained / "weights/ema_0.05", tmp_path / "weights/ema"))
    described = json.loads((weights / "segdiff.json").read_text())
    sample_and_compare_pipeline(weights, shapes, num=2)
    vae = AutoencoderKL.from_pretrained(tmp_path / "pipeline", subfolder="vae")
    assert list(vae.config.latents_std) == described["latent"]["std"]
    save_autoencoder(weights / "autoencoder", make_autoencoder(CONFIG).state_dict(), CONFIG, 32, ("CT", "MR"), {})
    with pytest.raises(InputProblems, match="not the one that the denoiser was trained with"):
        Denoiser.load(weights)


def test_what_cannot_work_is_refused_before_work(
    trained: Path, shapes: Path, small_shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: str) -> str:
        assert main(["train", *arguments, "--dry-run"]) == 2
        return capsys.readouterr().err

    run = Path(shutil.copytree(trained, tmp_path / "run"))
    untrained(run, 32, seed=1)
    mine = [flag if flag != str(trained) else str(run) for flag in flags(shapes, trained)]
    assert "made by another autoencoder" in refused(*mine)
    assert "trained on 32 pixels, the slices have 16" in refused(*flags(small_shapes, run))
    assert "segdiff train-autoencoder" in refused(*flags(shapes, tmp_path / "none"))
    fields = {
        one.field
        for bad in (
            replace(NET, autoencoder=None),
            replace(NET, mask_encoding="scalar_255", net="efficient"),
            replace(NET, space="pixel"),
        )
        for one in bad.space_problems()
    }
    assert fields == {"denoiser.autoencoder", "denoiser.mask_encoding", "denoiser.net"}
    whole = DiffusionConfig(objective="edm")
    shards = ShardSet.open(small_shapes)
    assert with_sigma_data(whole, shards, shards.select(split="train"), on_latents=True).sigma_data == 1.0
    with pytest.raises(InputProblems, match="reads images, not latents"):
        find_space(replace(NET, autoencoder=str(run)), DiffusionConfig(dice_weight=0.1), 32, ("CT", "MR"))
