"""The figures that say how fast training is: against the paper's net, a clock, and each other."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data_shards.labels import AMOS
from segdiff_dist.denoising.config import DenoiserConfig
from segdiff_dist.denoising.denoiser import Denoiser
from segdiff_dist.training.throughput import FlopCounter, Peak, StepClock, count_flops, peak_flops, progress_line

CPU = torch.device("cpu")


def test_the_papers_net_costs_what_the_design_says() -> None:
    with torch.device("meta"):
        net = Denoiser(DenoiserConfig(), AMOS, 256)
        inputs = (torch.empty(1, 1, 256, 256), torch.empty(1).long(), torch.empty(1, 256, 256).byte())
        class_B = torch.empty(1).long()
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        net(*inputs, class_B)
    flops = count_flops(net, *inputs, class_B)
    assert flops == pytest.approx(1.49e12, rel=0.005)
    assert flops == pytest.approx(3 * forward.get_total_flops(), rel=0.005)  # backward: twice the forward's


def test_a_model_is_counted_as_it_is_used_and_left_as_it_was() -> None:
    config = DenoiserConfig(
        block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, attention_resolutions=(16,)
    )
    net = Denoiser(config, AMOS, 32).prepare_for(CPU)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    counter = FlopCounter(net)
    assert counter.flops_per_image() is None
    inputs = (torch.zeros(4, 1, 32, 32), torch.zeros(4).long(), torch.zeros(4, 32, 32).byte(), torch.zeros(4).long())
    # The CPU's fused attention is not in torch's table of FLOPs.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as real:
        net(*inputs).sum().backward()
    assert counter.flops_per_image() == pytest.approx(real.get_total_flops() / 4, rel=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_checkpointed_activations_count_once() -> None:
    def flops(checkpointing: bool) -> int | None:
        net = Denoiser(DenoiserConfig(block_out_channels=(32, 32), layers_per_block=1), AMOS, 32)
        if checkpointing:
            net.unet.enable_gradient_checkpointing()
        counter = FlopCounter(net)
        net(torch.zeros(1, 1, 32, 32), torch.zeros(1).long(), torch.zeros(1, 32, 32).byte(), torch.zeros(1).long())
        return counter.flops_per_image()

    assert flops(True) == flops(False) is not None


def test_the_clock_separates_work_from_waiting_and_pauses() -> None:
    net = nn.Linear(64, 64, bias=False)
    counter = FlopCounter(net)
    net(torch.zeros(8, 64))
    clock = StepClock(100, CPU, counter, Peak(1e9, "measured"))
    waited_s, step_s = [], []
    for _ in range(4):
        start = time.perf_counter()
        with clock.waiting():
            time.sleep(0.03)
        waited_s.append(time.perf_counter() - start)
        time.sleep(0.07)
        clock.step()
        step_s.append(time.perf_counter() - start)
        with clock.paused():
            time.sleep(0.1)
    rates = clock.rates(140)
    assert rates["images_per_s"] == pytest.approx(40 / sum(step_s), rel=0.05)
    assert rates["data_wait_fraction"] == pytest.approx(sum(waited_s) / sum(step_s), rel=0.05)
    assert rates["step_s_p50"] == pytest.approx(np.median(step_s), rel=0.05)
    assert rates["step_s_p50"] <= rates["step_s_p95"] <= max(step_s) * 1.05
    # 2 * 64 * 64 for the product, and as much for the weight's gradient; the input needs none.
    assert rates["mfu"] == pytest.approx(rates["images_per_s"] * 4 * 64 * 64 / 1e9)
    assert 0.05 < rates["host_memory_gib"] < 100
    again = clock.rates(140)
    assert again["images_per_s"] == 0
    assert "step_s_p50" not in again


def test_an_unknown_device_is_measured() -> None:
    peak = peak_flops(CPU, "fp32")
    assert peak.source == "measured"
    assert 1e9 < peak.flops < 1e14


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_stays_below_its_data_sheet() -> None:
    from segdiff_dist.training.throughput import measured_flops

    device = torch.device("cuda", 0)
    peak = peak_flops(device, "bf16")
    assert peak.source == "data sheet", torch.cuda.get_device_name(device)
    assert 0.4 * peak.flops < measured_flops(device, torch.bfloat16) < 1.05 * peak.flops


def test_the_progress_line() -> None:
    row = {"loss": 0.12345, "mfu": 0.412, "data_wait_fraction": 0.0031, "gpu_memory_peak_gib": 31.24}
    assert progress_line(row) == "loss 0.1235, MFU 41%, data wait 0.3%, 31.2 GiB"
    assert progress_line({**row, "skipped_steps": 2.0}).endswith("2 steps skipped")
