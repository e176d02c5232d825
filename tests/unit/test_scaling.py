"""The arithmetic of scaling, against cases that can be done by hand, and the page that shows its tables."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from data_shards.labels import AMOS
from segdiff_dist.denoising.config import DenoiserConfig
from segdiff_dist.denoising.denoiser import Denoiser
from segdiff_dist.planning import scaling
from segdiff_dist.planning.scaling import (
    ETHERNET,
    INFINIBAND,
    NetworkCosts,
    ParallelPlan,
    images_per_s,
    most_ranks,
    state_bytes,
    wire_s,
)

NETWORK = NetworkCosts()
PAGE = Path(__file__).parents[2] / "docs" / "scale.md"


def test_the_page_shows_what_is_computed() -> None:
    page = PAGE.read_text()
    for table in scaling.tables():
        assert table in page, f"docs/scale.md: run `python -m segdiff_dist.planning.scaling` and put in:\n{table}"


def test_the_default_network_has_that_many_parameters() -> None:
    with torch.device("meta"):
        model = Denoiser(DenoiserConfig(), AMOS, 256)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(NETWORK.parameters, rel=0.001)


def test_ranks_divide_the_global_batch() -> None:
    assert [most_ranks(64, 16, ranks) for ranks in (1, 2, 3, 4, 8)] == [1, 2, 2, 4, 4]
    assert most_ranks(3 * 256, 16, 56) == 48
    assert most_ranks(2048, 16, 504) == 128
    assert most_ranks(10, 4, 8) == 0
    assert most_ranks(8, 1, 0) == 0


def test_a_ring_is_as_slow_as_its_slowest_link() -> None:
    assert wire_s(INFINIBAND, 1, 1e9) == 0
    assert wire_s(INFINIBAND, 8, 360e9) == pytest.approx(7 / 8)
    assert wire_s(INFINIBAND, 16, 320e9) == pytest.approx(15 / 16)
    assert wire_s(ETHERNET, 16, 2.5e9) == pytest.approx(15 / 16)


def test_one_gpu_does_what_one_was_measured_to_do() -> None:
    """An H100's figures, micro-batches as graphs, go in and come out; 64 images under the engine did not go in."""
    for images, measured_ms in ((8, 41.92), (32, 143.63)):
        plan = ParallelPlan(1, images, images)
        assert 1e3 * scaling.micro_batch_s(NETWORK, INFINIBAND, plan) == pytest.approx(measured_ms, abs=0.02)
    assert 1e3 * scaling.step_s(NETWORK, INFINIBAND, ParallelPlan(1, 64, 64)) == pytest.approx(284.26, rel=0.02)
    launched = ParallelPlan(1, 64, 16, cuda_graph=False)
    assert images_per_s(NETWORK, INFINIBAND, launched) == pytest.approx(73.7, rel=0.01)
    update_s = scaling.step_s(NETWORK, INFINIBAND, launched) - 4 * INFINIBAND.host_s
    assert update_s == pytest.approx(113.67e6 * 52 / 2.991e12 + 60 * 3.1e-6)


def test_what_zero_cannot_replay_is_as_slow_as_its_host() -> None:
    rates = [images_per_s(NETWORK, INFINIBAND, ParallelPlan(1, 64, 16, stage)) for stage in range(4)]
    assert rates[0] == pytest.approx(rates[1], rel=0.01)
    assert max(rates[2:]) < 0.4 * rates[1]


def test_gradients_travel_once_a_step_or_once_a_micro_batch() -> None:
    plan = ParallelPlan(16, 1024, 16)
    sizes = [
        (scaling.bytes_reduced(NETWORK, replace(plan, zero_stage=stage)) / NETWORK.parameters,
         scaling.bytes_gathered(NETWORK, replace(plan, zero_stage=stage)) / NETWORK.parameters)
        for stage in range(4)
    ]  # fmt: skip
    assert sizes == [(8, 0), (2, 2), (8, 2), (8, 16)]


@pytest.mark.parametrize("machine", [INFINIBAND, ETHERNET])
@pytest.mark.parametrize("stage", range(4))
def test_more_gpus_are_faster_and_never_more_efficient(machine: scaling.Machine, stage: int) -> None:
    rates = [
        images_per_s(NETWORK, machine, ParallelPlan(gpus, 16 * gpus, 16, stage)) / gpus
        for gpus in (1, 2, 8, 16, 64, 512)
    ]
    # ZeRO shares the optimiser's pass, 1 % of a step of 16 images; the network only costs.
    assert all(later <= earlier * 1.03 for earlier, later in pairwise(rates))


def test_overlap_and_accumulation_hide_a_slow_network() -> None:
    plan = ParallelPlan(32, 512, 16)
    rates = [
        images_per_s(NETWORK, ETHERNET, p)
        for p in (plan, replace(plan, overlap=1.0), replace(plan, global_batch_size=8192))
    ]
    assert rates[0] < rates[1] < rates[2]


def test_a_stage_holds_no_more_than_the_one_before() -> None:
    for gpus in (2, 8, 64):
        sizes = [state_bytes(NETWORK, stage, gpus) for stage in (1, 2, 3)]
        assert sizes == sorted(sizes, reverse=True)
    # fp32 weights, gradients, two moments and two averages.
    assert state_bytes(NETWORK, 0, 64) == NETWORK.parameters * 24


def test_cost_is_price_over_rate() -> None:
    assert scaling.dollars_per_million_images(rate=1000.0, gpus=8, dollars_per_gpu_hour=4.5) == pytest.approx(10.0)
