"""`train.cuda_graph`: a replayed micro-batch is the eager one, bit for bit, and what cannot be replayed stays eager.

A graph's behaviour is that of graph_support.Recording: operators again, on the same memory, without Python.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from graph_support import Recording
from torch.utils._python_dispatch import TorchDispatchMode
from training_support import CPU, logged, run_training

from data_shards.problems import InputProblems
from data_shards.records import Batch
from segdiff_dist.cli import main
from segdiff_dist.denoising.task import DenoiserTask
from segdiff_dist.training import captured
from segdiff_dist.training.captured import MicroStep
from segdiff_dist.training.config import TrainConfig
from segdiff_dist.training.flat_gradients import FlatGradients

SHORT: dict[str, Any] = {"num_images": 32, "checkpoint_every_images": 16, "log_every_images": 8}
Recorded = list[Recording]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """The recordings that are made in a test."""
    made: Recorded = []

    def recorder_for(_: torch.device) -> Recording:
        made.append(Recording())
        return made[-1]

    monkeypatch.setattr(captured, "recorder_for", recorder_for)
    return made


def weights(run: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted((run / "weights").glob("*/*.safetensors"))]


def test_the_command_replays_the_run_that_it_makes_eagerly(
    shapes: Path,
    tmp_path: Path,
    recorded: Recorded,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Four micro-batches a step, validation with averages in between, and a step whose loss is NaN."""
    loss = DenoiserTask.loss

    def spoilt(self: DenoiserTask, forward: Any, batch: Batch) -> Any:
        found, metrics = loss(self, forward, batch)
        return torch.where((batch.position_B == 20).any(), float("nan"), found), metrics

    monkeypatch.setattr(DenoiserTask, "loss", spoilt)
    net = {"block_out_channels": [8], "layers_per_block": 1, "norm_num_groups": 8, "attention_resolutions": []}
    settings = {
        "denoiser": {**net, "net": "unet"},
        "train": {**SHORT, "global_batch_size": 8, "micro_batch_size": 2, "precision": "fp32", "warmup_images": 32},
        "validation": {"num_images": 2, "num_pictures": 0, "num_steps": 1},
        "tracking": {"enabled": False},
    }
    for choice in ("off", "on"):
        settings["train"] |= {"cuda_graph": choice}
        (tmp_path / "config.yaml").write_text(json.dumps(settings))
        given = ["train", "--config", str(tmp_path / "config.yaml"), "--data", str(shapes)]
        assert main([*given, "--run", str(tmp_path / choice)]) == 0
    # One to compare, and every micro-batch; one to compare, and the third and fourth update.
    assert [one.replays for one in recorded if one.replays] == [1 + 32 // 2, 1 + 2]
    assert logged(tmp_path / "on") == logged(tmp_path / "off")
    assert [row[-1] for row in logged(tmp_path / "on")] == [0, 0, 1, 1]
    assert weights(tmp_path / "on") == weights(tmp_path / "off")
    assert capsys.readouterr().err.count("a micro-batch of 2 images is one CUDA graph") == 1


def test_an_eager_run_goes_on_from_a_recording(shapes: Path, tmp_path: Path, recorded: Recorded) -> None:
    setting = {**SHORT, "precision": "bf16", "zero_stage": 0, "micro_batch_size": 8}
    eager = run_training(shapes, tmp_path / "eager", cuda_graph="off", **setting)
    shutil.copytree(tmp_path / "eager", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / f"{32:012d}")
    assert run_training(shapes, tmp_path / "cut", cuda_graph="on", **setting) == eager
    assert [one.replays for one in recorded[-2:]] == [1 + 16 // 8, 1]
    assert weights(tmp_path / "cut") == weights(tmp_path / "eager")


def batch_of(images: int, side: int = 2) -> Batch:
    number_B = torch.arange(images)
    pixels_BHW = torch.arange(images * side**2).to(torch.uint8).reshape(images, side, side)
    return Batch(pixels_BHW, pixels_BHW, number_B, number_B, number_B)


class Adding:
    """A micro-batch that adds its pixels up, and how often Python did it."""

    def __init__(self, choice: Any = "auto") -> None:
        self.total, self.calls = torch.zeros(1), 0
        self.step = MicroStep(self.run, lambda: [self.total], TrainConfig(cuda_graph=choice), CPU)

    def run(self, batch: Batch) -> None:
        self.calls += 1
        self.total += batch.image_BHW.float().sum()

    def prepared(self, *batches: Batch) -> list[Batch]:
        return list(self.step.prepare(iter(batches), "train"))


def test_a_batch_of_another_size_runs_eagerly(recorded: Recorded) -> None:
    adding, batches = Adding(), [batch_of(3), batch_of(2), batch_of(3)]
    given = adding.prepared(*batches)
    assert [len(batch.position_B) for batch in given] == [3, 2, 3]
    before = adding.calls
    for batch in given:
        adding.step(batch)
    assert float(adding.total) == sum(float(batch.image_BHW.float().sum()) for batch in batches)
    assert adding.calls == before + 1
    deeper = Batch(given[0].image_BHW.to(torch.uint16), *list(vars(given[0]).values())[1:])
    adding.step(deeper)
    assert adding.calls == before + 2


class Forgetful(Recording):
    """Leaves the last operator out."""

    def replay(self) -> None:
        del self.operators[-1:]
        super().replay()


class Failing(Recording):
    """Cannot record, for this reason."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def capture(self, function: Callable[[], None]) -> None:
        raise self.error


@pytest.mark.parametrize(
    ("recording", "why"),
    [
        (Forgetful(), "bit for bit"),
        (Failing(torch.OutOfMemoryError("no")), "memory"),
        (Failing(RuntimeError("operation not permitted\nmore")), "recorded: RuntimeError: operation not permitted;"),
    ],
    ids=lambda given: type(given).__name__,
)
def test_what_cannot_be_replayed_stays_eager_or_is_refused(
    monkeypatch: pytest.MonkeyPatch, recording: Recording, why: str
) -> None:
    monkeypatch.setattr(captured, "recorder_for", lambda _: recording)
    adding = Adding("auto")
    (batch,) = adding.prepared(batch_of(3))
    assert float(adding.total) == 0
    adding.step(batch)
    assert float(adding.total) == 66
    adding = Adding("on")
    with pytest.raises(InputProblems, match=why) as refused:
        adding.prepared(batch_of(3))
    assert refused.value.problems[0].field == "train.cuda_graph"


def test_the_gradients_of_two_losses_add_up_in_place_and_those_of_a_loss_at_once() -> None:
    net = torch.nn.Sequential(*(torch.nn.Conv2d(2, 2, 3) for _ in range(2))).to(memory_format=torch.channels_last)
    parameters = [*net.parameters(), torch.nn.Parameter(torch.ones(3))]  # the last is not in the loss
    ends = [0, *itertools.accumulate(p.numel() for p in parameters)]
    gradients = FlatGradients([list(zip(parameters, ends, strict=False))], [ends[-1]])
    x_NCHW = torch.randn(2, 2, 5, 5)
    for factor in (1.0, 2.0):
        with Additions() as additions:
            gradients.add(factor * net(x_NCHW).square().mean())
        assert additions.found == ["aten::_foreach_add_"]
    added = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
    net.zero_grad()
    (3.0 * net(x_NCHW).square().mean()).backward()
    for one, parameter in zip(added, parameters, strict=True):
        torch.testing.assert_close(one, torch.zeros(3) if parameter is parameters[-1] else parameter.grad)


class Additions(TorchDispatchMode):
    """The additions to tensors in place."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in ("aten::add_", "aten::_foreach_add_"):
            self.found.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_replays_what_it_runs() -> None:
    """Gradients of three batches, replayed, are those that Python adds up, to the last bit."""
    device = torch.device("cuda", 0)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.GroupNorm(2, 8), torch.nn.SiLU()).to(device)
    batches = [Batch(*(v.to(device) for v in vars(batch_of(4, side=8)).values() if v is not None)) for _ in range(3)]
    for number, batch in enumerate(batches):
        batch.image_BHW.add_(number)
    totals = []
    for choice in ("off", "on"):
        parameters = list(net.parameters())
        sizes = [0, *itertools.accumulate(p.numel() for p in parameters)]
        gradients = FlatGradients([list(zip(parameters, sizes, strict=False))], [sizes[-1]])

        def run(batch: Batch, gradients: FlatGradients = gradients) -> None:
            gradients.add(net(batch.image_BHW[:, None].float()).square().mean())

        sums, config = partial(getattr, gradients, "flats"), TrainConfig(cuda_graph=choice)  # type: ignore[arg-type]
        step = MicroStep(run, sums, config, device)
        for batch in step.prepare(iter(batches), "train"):
            step(batch)
        assert step.is_recorded is (choice == "on")
        totals.append(gradients.flats[0])
    assert torch.equal(*totals)


def test_on_is_refused_where_it_cannot_be(shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--data", str(shapes), "--run", str(tmp_path / "run"), "--config", "smoke"]
    assert main(["train", *given, "--train.cuda-graph", "on", "--train.device", "cpu"]) == 2
    assert "a CUDA graph needs a GPU, and this is cpu" in capsys.readouterr().err
    for changed in ({"zero_stage": 2}, {"zero_stage": 1, "offload": "optimizer"}):
        (found,) = TrainConfig(cuda_graph="on", **changed).problems("train")
        assert (found.field, "zero_stage 0 or 1" in found.remedy) == ("train.cuda_graph", True)


def test_without_a_gpu_nothing_is_recorded_and_nothing_said(capsys: pytest.CaptureFixture[str]) -> None:
    adding = Adding("auto")
    assert len(adding.prepared(batch_of(3))) == 1
    assert (adding.calls, capsys.readouterr().err) == (0, "")
