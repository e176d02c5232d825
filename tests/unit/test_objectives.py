"""EDM's and rectified flow's processes: against the papers' formulas, and against cases with a known answer."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data_shards.problems import InputProblems
from data_shards.records import Batch
from data_shards.store.shards import ShardSet
from segdiff_dist.config import as_dict, to_yaml
from segdiff_dist.denoising.config import DiffusionConfig
from segdiff_dist.denoising.process import SigmaProcess, make_process
from segdiff_dist.denoising.schedule import as_trained
from segdiff_dist.denoising.sigma_data import measure_sigma_data, with_sigma_data
from segdiff_dist.experiment import Experiment, refuse_another_config
from segdiff_dist.pixels import to_model_range
from segdiff_kernels import philox

EDM = DiffusionConfig(objective="edm", sigma_data=0.4, lognormal=(-0.4, 1.4))
FLOW = DiffusionConfig(objective="flow", lognormal=(0.0, 1.0))
SIGMAS = (0.002, 0.05, 0.4, 3.0, 80.0, 700.0)


def levels(*sigmas: float) -> Tensor:
    return torch.tensor([math.log(sigma) for sigma in sigmas], dtype=torch.float64)


def process_of(config: DiffusionConfig) -> SigmaProcess:
    made = make_process(config)
    assert isinstance(made, SigmaProcess)
    return made


def batch_of(image_BHW: Tensor, first: int = 0) -> Batch:
    zero_B = torch.zeros(len(image_BHW), dtype=torch.int64)
    position_B = torch.arange(first, first + len(image_BHW))
    return Batch(image_BHW, torch.zeros_like(image_BHW), zero_B, zero_B, position_B)


def test_edm_is_table_1_of_its_paper() -> None:
    form, s = process_of(EDM).form(levels(*SIGMAS)), 0.4
    for i, sigma in enumerate(SIGMAS):
        c_skip, c_out = s**2 / (sigma**2 + s**2), sigma * s / math.sqrt(sigma**2 + s**2)
        c_in = 1 / math.sqrt(sigma**2 + s**2)
        assert float(form.signal[i]) == pytest.approx(c_in)
        assert float(form.spread[i]) == pytest.approx(c_in * sigma)
        # D(x) = c_skip x + c_out F(c_in x), and F is trained towards (x_0 - c_skip (x_0 + sigma noise)) / c_out.
        assert float(form.x0_from_x[i]) == pytest.approx(c_skip / c_in)
        assert float(form.x0_from_prediction[i]) == pytest.approx(c_out)
        assert float(form.target_from_x0[i]) == pytest.approx((1 - c_skip) / c_out)
        assert float(form.target_from_noise[i]) == pytest.approx(-c_skip * sigma / c_out)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_edm_has_inputs_and_targets_of_unit_variance(sigma: float) -> None:
    process = process_of(EDM)
    noise_BCHW = philox.normal(3, 0, torch.arange(4), (1, 128, 128))
    x_0_BCHW = 0.4 * philox.normal(4, 0, torch.arange(4), (1, 128, 128))
    x_BCHW, target_BCHW, _ = process.with_noise(x_0_BCHW, noise_BCHW, levels(sigma).float().expand(4))
    assert float(x_BCHW.var()) == pytest.approx(1.0, abs=0.02)
    assert float(target_BCHW.var()) == pytest.approx(1.0, abs=0.02)


def test_flow_is_a_straight_line_with_one_velocity() -> None:
    process = process_of(FLOW)
    x_0_BCHW, noise_BCHW = torch.rand(3, 1, 8, 8) * 2 - 1, torch.randn(3, 1, 8, 8)
    t_B = torch.tensor([0.1, 0.5, 0.95])
    x_BCHW, velocity_BCHW, _ = process.with_noise(x_0_BCHW, noise_BCHW, torch.logit(t_B))
    t_B111 = t_B[:, None, None, None]
    torch.testing.assert_close(x_BCHW, (1 - t_B111) * x_0_BCHW + t_B111 * noise_BCHW)
    torch.testing.assert_close(velocity_BCHW, noise_BCHW - x_0_BCHW)
    torch.testing.assert_close(process.time(torch.logit(t_B)), 1000 * t_B)


@pytest.mark.parametrize("config", [EDM, FLOW])
@pytest.mark.parametrize("sigma", SIGMAS)
def test_x_0_is_found_back_from_its_target(config: DiffusionConfig, sigma: float) -> None:
    process = process_of(config)
    x_0_BCHW, noise_BCHW = torch.rand(2, 1, 8, 8).double() * 2 - 1, torch.randn(2, 1, 8, 8).double()
    form = process.form(levels(sigma))
    x_BCHW = form.signal * x_0_BCHW + form.spread * noise_BCHW
    target_BCHW = form.target_from_x0 * x_0_BCHW + form.target_from_noise * noise_BCHW
    found_BCHW = form.x0_from_x * x_BCHW + form.x0_from_prediction * target_BCHW
    torch.testing.assert_close(found_BCHW, x_0_BCHW, rtol=0, atol=1e-9)
    # From the variance-preserving form that samplers walk.
    a = 1 / (1 + sigma**2)
    x_t_BCHW = math.sqrt(a) * x_0_BCHW + math.sqrt(1 - a) * noise_BCHW
    torch.testing.assert_close(process.scale_at(a) * x_t_BCHW, x_BCHW, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(process.x_0_at(target_BCHW, x_t_BCHW, a), x_0_BCHW, rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", [EDM, FLOW, replace(EDM, snr_shift=0.5)])
def test_levels_are_log_normal_and_drawn_by_position(config: DiffusionConfig) -> None:
    process = process_of(config)
    image_BHW = torch.randint(0, 256, (64, 4, 4), dtype=torch.uint8)
    together = process.noised(batch_of(image_BHW), 7, use_kernels=False)
    apart = [process.noised(batch_of(image_BHW[i : i + 16], i), 7, use_kernels=False) for i in range(0, 64, 16)]
    for field in ("x_BCHW", "target_BCHW", "level_B"):
        assert torch.equal(getattr(together, field), torch.cat([getattr(part, field) for part in apart]))
    assert not torch.equal(process.noised(batch_of(image_BHW), 8, use_kernels=False).level_B, together.level_B)
    many_B = process.noised(batch_of(torch.zeros(20_000, 1, 1, dtype=torch.uint8)), 7, use_kernels=False).level_B
    mean, std = config.lognormal
    assert float(many_B.mean()) == pytest.approx(mean - math.log(config.snr_shift), abs=0.04)
    assert float(many_B.std()) == pytest.approx(std, rel=0.02)
    assert float(many_B.sub(many_B.mean()).div(many_B.std()).pow(4).mean()) == pytest.approx(3.0, abs=0.15)


@pytest.mark.parametrize("config", [EDM, FLOW])
def test_what_is_drawn_is_what_with_noise_makes(config: DiffusionConfig) -> None:
    process, image_BHW = process_of(config), torch.randint(0, 256, (8, 6, 6), dtype=torch.uint8)
    drawn = process.noised(batch_of(image_BHW, 100), 5, use_kernels=False)
    noise_BCHW = philox.normal(5, philox.STREAM_NOISE, torch.arange(100, 108), (1, 6, 6))
    made = process.with_noise(to_model_range(image_BHW), noise_BCHW, drawn.level_B)
    torch.testing.assert_close(made.x_BCHW, drawn.x_BCHW)
    torch.testing.assert_close(made.target_BCHW, drawn.target_BCHW)


@pytest.mark.parametrize("config", [EDM, FLOW])
def test_weights_count_the_error_of_x_0(config: DiffusionConfig) -> None:
    """min_snr on the network's error is min(SNR, gamma) on the error of the x_0 that it means."""
    sigma_B = torch.tensor([0.05, 0.5, 2.0, 50.0], dtype=torch.float64)
    process = process_of(replace(config, loss_weighting="min_snr", min_snr_gamma=5.0))
    per_x_0_B = process.form(sigma_B.log()).x0_from_prediction.square()
    expected_B = (1 / sigma_B**2).clamp(max=5.0) * per_x_0_B
    torch.testing.assert_close(process.weight(sigma_B.log()), expected_B.float())
    assert torch.equal(process_of(config).weight(sigma_B.log()), torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("config", [EDM, FLOW])
def test_errors_are_reported_by_quarters_of_what_is_drawn(config: DiffusionConfig) -> None:
    process = process_of(config)
    level_B = process.spread_levels((np.arange(400) + 0.5) / 400)
    sums = process.sums(torch.arange(400.0), level_B)
    assert [int(count) for _, count in sums.values()] == [100] * 4
    assert float(sum(total for total, _ in sums.values())) == 400 * 399 / 2
    assert next(iter(sums)).startswith("loss_sigma_0_")
    assert list(sums)[-1].endswith("_inf")


def test_sigma_data_is_that_of_the_training_slices(shapes: Path) -> None:
    shards = ShardSet.open(shapes)
    rows = shards.select(split="train")
    pixels = np.concatenate([shards.read(int(row)).image_HW.ravel() for row in rows]) / 127.5 - 1.0
    assert measure_sigma_data(shards, rows) == pytest.approx(float(pixels.std()), rel=1e-3)
    measured = with_sigma_data(DiffusionConfig(objective="edm"), shards, rows)
    assert measured.sigma_data == measure_sigma_data(shards, rows)
    assert with_sigma_data(EDM, shards, rows) is EDM
    assert with_sigma_data(FLOW, shards, rows) is FLOW


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"objective": "edm", "prediction_type": "v"}, "prediction_type"),
        ({"objective": "flow", "prediction_type": "x0"}, "prediction_type"),
        ({"objective": "edm", "zero_terminal_snr": True}, "zero_terminal_snr"),
        ({"objective": "flow", "beta_schedule": "cosine"}, "beta_schedule"),
        ({"objective": "edm", "timestep_sampling": "lognormal"}, "timestep_sampling"),
        ({"objective": "edm", "loss_weighting": "edm"}, "loss_weighting"),
        ({"loss_weighting": "edm"}, "loss_weighting"),
        ({"prediction_type": "v", "zero_terminal_snr": True, "loss_weighting": "min_snr"}, "loss_weighting"),
        ({"objective": "edm", "sigma_data": 0.0}, "sigma_data"),
        ({"objective": "flow", "sigma_data": 0.5}, "sigma_data"),
        ({"sigma_data": 0.5}, "sigma_data"),
    ],
)
def test_what_does_not_go_together_is_refused(given: dict[str, Any], field: str) -> None:
    assert f"diffusion.{field}" in [found.field for found in DiffusionConfig(**given).problems()]


def test_weights_know_their_process() -> None:
    """Sampling needs what was measured in training, and takes it from the weights; what contradicts them is found."""
    trained = asdict(EDM)
    process, differ = as_trained(DiffusionConfig(objective="edm", lognormal=(-0.4, 1.4)), trained)
    assert (process.sigma_data, differ) == (0.4, {})
    process, differ = as_trained(DiffusionConfig(prediction_type="v"), trained)
    assert process.process == EDM.process
    assert process.problems() == []
    assert differ["objective"] == ("edm", "ddpm")
    process, differ = as_trained(EDM, {"prediction_type": "v", "zero_terminal_snr": True})  # of an older version
    assert process.process == DiffusionConfig(prediction_type="v", zero_terminal_snr=True).process
    assert differ["objective"] == ("ddpm", "edm")
    assert as_trained(DiffusionConfig(), {}) == (DiffusionConfig(), {})


def test_a_training_goes_on_under_its_own_objective(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    before = Experiment(run=tmp_path, diffusion=DiffusionConfig(objective="edm"))
    (tmp_path / "config.yaml").write_text(to_yaml(as_dict(before)))
    refuse_another_config(before, tmp_path / "checkpoints", ("diffusion",))
    for other in (DiffusionConfig(), DiffusionConfig(objective="flow"), DiffusionConfig(objective="edm", sigma_data=1)):
        now = Experiment(run=tmp_path, diffusion=other)
        with pytest.raises(InputProblems, match=r"diffusion\.(objective|sigma_data).*use another run folder"):
            refuse_another_config(now, tmp_path / "checkpoints", ("diffusion",))
