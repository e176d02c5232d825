"""A cascade: `denoiser.low_resolution` and `denoiser.cascade`, from the augmentation to the pipeline's folder."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sampling_support import DIFFUSION, arguments, make_here, sample_and_compare_pipeline

from data_shards.labels import AMOS, WHOLEBODY
from data_shards.problems import InputProblems
from data_shards.store.shards import ShardSet
from segdiff_dist.cli import main
from segdiff_dist.denoising.cascade import LowerStage, ShrunkSpace, augmented, enlarged
from segdiff_dist.denoising.config import DenoiserConfig, DiffusionConfig
from segdiff_dist.denoising.denoiser import Denoiser
from segdiff_dist.denoising.frozen_base import Base
from segdiff_dist.denoising.latent_space import find_space
from segdiff_dist.denoising.sampler_config import SamplerConfig
from segdiff_dist.sampling.job import prepare_job

NET = DenoiserConfig(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, attention_resolutions=())
SMALL = replace(NET, low_resolution=8)
OWN = ["--denoiser.attention-resolutions", "8", "--train.num-images", "64", "--train.checkpoint-every-images", "32"]
OWN += ["--train.log-every-images", "16", "--train.ema-lengths", "0.05", "--denoiser.augmentation-labels"]


def write_stage(folder: Path, config: DenoiserConfig, size: int = 16, seed: int = 0, **trained_with: object) -> Path:
    """An untrained denoiser, in `folder`."""
    torch.manual_seed(seed)
    lower = None if config.cascade is None else LowerStage.open(Path(config.cascade))
    model = Denoiser(config, AMOS, size, lower=lower)
    process = replace(DIFFUSION, **trained_with)  # type: ignore[arg-type]
    model.save(folder, model.state_dict(), {"diffusion": vars(process)})
    return folder


def test_the_augmentation_has_the_variance_of_its_level_and_none_at_level_0(small_shapes: Path, tmp_path: Path) -> None:
    """sin^2(pi s / 2) around cos(pi s / 2) z, at each level s."""
    stage = LowerStage.open(write_stage(tmp_path / "lower", SMALL))
    shards = ShardSet.open(small_shapes)
    image = torch.from_numpy(np.stack([shards.read(row).image_HW for row in range(8)]))
    exact = (image.double() / 127.5 - 1).unfold(1, 2, 2).unfold(2, 2, 2).mean(dim=(3, 4))[:, None]
    position = torch.arange(8)
    low, level = stage.drawn_condition(image, seed=3, position_B=position, level=0.0)
    torch.testing.assert_close(low.double(), exact, rtol=0, atol=1e-6)
    assert level.tolist() == [0.0] * 8

    many = torch.arange(4096)
    for s in (0.1, 0.5, 0.9, 1.0):
        low, _ = stage.drawn_condition(image[:1].expand(4096, -1, -1), 3, many, s)
        rest = low - math.cos(math.pi * s / 2) * exact[:1].float()
        assert rest.var().item() == pytest.approx(math.sin(math.pi * s / 2) ** 2, rel=0.02)
        assert abs(rest.mean().item()) < 0.01
    unit = torch.randn(64, 1, 32, 32)
    assert augmented(unit, torch.rand(64), torch.randn_like(unit)).var().item() == pytest.approx(1, rel=0.03)

    drawn, levels = stage.drawn_condition(image[:1].expand(4096, -1, -1), 3, many)
    torch.testing.assert_close(levels.sort().values, (many + 0.5) / 4096, rtol=0, atol=0.03)
    some = torch.tensor([7, 4000])
    again, their_levels = stage.drawn_condition(image[:1].expand(2, -1, -1), 3, some)
    assert torch.equal(again, drawn[some])
    assert torch.equal(their_levels, levels[some])


def test_shrunk_slices_keep_their_grey_and_small_organs_their_share() -> None:
    space = ShrunkSpace(4)
    grey = torch.full((2, 1, 4, 4), 0.25)
    assert torch.equal(space.decode(grey), torch.full((2, 1, 16, 16), 0.25))
    ramp = torch.arange(8.0).expand(1, 1, 8, 8)
    torch.testing.assert_close(enlarged(ramp, 32)[0, 0, 0, 4:-4], (torch.arange(4, 28) + 0.5) / 4 - 0.5)
    model = Denoiser(SMALL, AMOS, 16)
    assert model.shape == (1, 8, 8)
    mask = torch.zeros(1, 16, 16, dtype=torch.uint8)
    mask[0, 4, 7] = 6
    x, t, c = torch.randn(1, 1, 8, 8), torch.tensor([5]), torch.tensor([0])
    assert model(x, t, mask, c).shape == (1, 1, 8, 8)
    assert not torch.equal(model(x, t, mask, c), model(x, t, torch.zeros_like(mask), c))


def test_super_resolution_reads_the_small_image_and_its_level(tmp_path: Path) -> None:
    write_stage(tmp_path / "lower", SMALL)
    net = replace(NET, cascade=str(tmp_path / "lower"))
    for config in (net, replace(net, net="efficient"), replace(net, conditioning="spade")):
        model = Denoiser(config, AMOS, 16, lower=LowerStage.open(tmp_path / "lower"))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        x, t, mask, c = torch.randn(2, 1, 16, 16), torch.tensor([3, 9]), torch.zeros(2, 16, 16).byte(), torch.arange(2)
        low, level = torch.randn(2, 1, 8, 8), torch.tensor([0.1, 0.7])
        y = model(x, t, mask, c, None, low, level)
        assert y.shape == x.shape
        y.square().sum().backward()
        assert [name for name, one in model.named_parameters() if one.grad is None or not one.grad.any()] == []
        for other in ((low.flip(2), level), (low, level.flip(0))):
            assert (model(x, t, mask, c, None, *other) - y).abs().amax(dim=(1, 2, 3)).min() > 1e-4


@pytest.fixture(scope="module")
def trained(small_shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RUNS/low, RUNS/high: 8 pixels, then 16."""
    runs = tmp_path_factory.mktemp("cascade")
    assert main(["train", *flags(small_shapes, runs / "low"), "--denoiser.low-resolution", "8"]) == 0
    assert main(["train", *flags(small_shapes, runs / "high"), "--denoiser.cascade", str(runs / "low")]) == 0
    return runs


def flags(shapes: Path, run: Path) -> list[str]:
    return ["--config", "smoke", "--data", str(shapes), "--run", str(run), "--tracking.no-enabled", *OWN]


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


def test_super_resolution_trains_and_goes_on_where_it_stopped(
    trained: Path, small_shapes: Path, tmp_path: Path
) -> None:
    """Also without the folder of the lower stage, of which the run has a copy."""
    run = Path(shutil.copytree(trained / "high", tmp_path / "high"))
    assert losses(run)[-1] < losses(run)[0]
    shutil.rmtree(run / "checkpoints" / f"{64:012d}")
    gone = str(trained / "low")
    (trained / "low").rename(trained / "elsewhere")
    try:
        assert main(["train", *flags(small_shapes, run), "--denoiser.cascade", gone]) == 0
    finally:
        (trained / "elsewhere").rename(gone)
    assert losses(run) == losses(trained / "high")
    for file in ("diffusion_pytorch_model.safetensors", "low_resolution/diffusion_pytorch_model.safetensors"):
        name = f"weights/ema_0.05/{file}"
        assert (run / name).read_bytes() == (trained / "high" / name).read_bytes()


def test_one_command_samples_both_and_the_pipeline_gives_the_same(
    trained: Path, small_shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained / "high/weights/ema_0.05", tmp_path / "weights/ema")
    run, weights = tmp_path, tmp_path / "weights/ema/low_resolution"
    sample = ["sample", *flags(small_shapes, trained / "high")[:6], "--sample.num-workers", "1"]
    assert main([*sample, "--dry-run"]) == 0
    assert "3 passes through each of 2 nets each" in capsys.readouterr().out
    sample_and_compare_pipeline(weights.parent, small_shapes, num=2)
    plain, noisy = (
        make_here(run, small_shapes, num=2, out=run / name, sampler=replace(QUICK, augmentation=s))
        for name, s in (("plain", 0.0), ("noisy", 1.0))
    )
    assert (np.asarray(plain.image[:]) != np.asarray(noisy.image[:])).any(axis=(1, 2)).all()
    write_stage(weights, SMALL, seed=5)
    with pytest.raises(InputProblems, match="not the one that the denoiser was trained with"):
        Denoiser.load(weights.parent)


QUICK = SamplerConfig(num_steps=2, timestep_spacing="trailing")


def test_a_cascade_of_three_stages(small_shapes: Path, tmp_path: Path) -> None:
    low = write_stage(tmp_path / "low", replace(NET, low_resolution=4))
    mid = write_stage(tmp_path / "mid", replace(SMALL, cascade=str(low)))
    write_stage(tmp_path / "weights/ema", replace(NET, cascade=str(mid)))
    made = [make_here(tmp_path, small_shapes, num=1, out=tmp_path / name) for name in ("once", "again")]
    np.testing.assert_array_equal(made[0].image[:], made[1].image[:])
    (tmp_path / "weights/ema/low_resolution/low_resolution/segdiff.json").unlink()
    with pytest.raises(InputProblems, match="not found"):
        Denoiser.load(tmp_path / "weights/ema")


def prepare(run: Path, shapes: Path, **settings: float) -> None:
    """What `segdiff sample` checks."""
    sampler = replace(QUICK, **settings)  # type: ignore[arg-type]
    prepare_job(*arguments(run, shapes, weights="ema_0.05", sampler=sampler))


def test_what_cannot_work_is_refused_before_work(
    trained: Path, shapes: Path, small_shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(shards: Path, *arguments: str) -> str:
        assert main(["train", *flags(shards, tmp_path / "run"), *arguments, "--dry-run"]) == 2
        return capsys.readouterr().err

    low = str(trained / "low")
    assert "trained at 16 pixels, not 32" in refused(shapes, "--denoiser.cascade", low)
    assert "train it first" in refused(small_shapes, "--denoiser.cascade", str(tmp_path / "none"))
    assert "give a divisor of the slices' side (16)" in refused(small_shapes, "--denoiser.low-resolution", "6")
    assert "its images have 16 pixels, and these 16" in refused(
        small_shapes, "--denoiser.cascade", str(trained / "high")
    )
    latent = ["--denoiser.space", "latent", "--denoiser.autoencoder", low]
    assert "a cascade works on pixels" in refused(small_shapes, "--denoiser.cascade", low, *latent)

    fields = {
        one.field
        for bad in (replace(SMALL, mask_encoding="scalar_255"), replace(SMALL, conditioning="controlnet"))
        for one in bad.space_problems()
    }
    assert fields == {"denoiser.mask_encoding", "denoiser.conditioning"}
    with pytest.raises(InputProblems, match="not shrunk slices"):
        find_space(SMALL, DiffusionConfig(dice_weight=0.1), 16, ("CT", "MR"))
    base = Base.below(replace(NET, cascade=low), tmp_path)
    assert base is not None

    def found(config: DenoiserConfig, seen: str = "MR", diffusion: DiffusionConfig = DIFFUSION) -> str:
        return str(base.problems_below(config, diffusion, ShardSet.open(small_shapes), 16, [seen]))

    assert found(NET) == "[]"
    assert "soft_masks" in found(replace(NET, soft_masks=True))
    assert "the slices are PET" in found(NET, seen="PET")
    assert "its images have 8 pixels, and these 8" in found(SMALL)
    assert "objective ddpm, not flow" in found(NET, diffusion=DiffusionConfig(objective="flow"))
    foreign = replace(base, net=replace(base.net, label_table=WHOLEBODY))
    assert "label table" in str(foreign.problems_below(NET, DIFFUSION, ShardSet.open(small_shapes), 16, ["MR"]))

    for net, settings, message in (
        ("high", {"guidance": 2.0}, r"the lower stage \(8 pixels\) was trained without diffusion.mask_dropout"),
        ("high", {"num_steps": 2000}, "lower stage, 8 pixels: sample.sampler.num_steps"),
        ("low", {"augmentation": 0.5}, "only a cascade's super-resolution has it"),
    ):
        with pytest.raises(InputProblems, match=message):
            prepare(trained / net, small_shapes, **settings)
