"""The engines, each tried for real on the smallest work: `python -m segdiff_dist.trials NAME` does one trial.

`segdiff doctor` starts them in processes of their own, so that one that hangs or crashes is a line of the report.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

MOST_S = 120.0
"""Seconds that a trial may take: with cold caches an engine takes up to half a minute."""


@dataclass(frozen=True)
class Trial:
    """A trial: what it does, for a person; and what helps if it fails."""

    name: str
    run: Callable[[], None]
    does: str
    remedy: str


@dataclass(frozen=True)
class Outcome:
    """How a trial ended. `failure`: one line; empty if it worked."""

    seconds: float
    failure: str = ""


def attempt(name: str, most_s: float) -> Outcome:
    """Do a trial in a process of its own. It is ended after `most_s` seconds, with the processes that it started."""
    command = [sys.executable, "-m", "segdiff_dist.trials", name]
    began = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            code = process.wait(most_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
        seconds = time.monotonic() - began
        if code == 0:
            return Outcome(seconds)
        if code is None:
            return Outcome(seconds, f"did not end within {most_s:.0f} s")
        said.seek(0)
        lines = [line.strip() for line in said.read().splitlines() if line.strip()]
    ended = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    return Outcome(seconds, lines[-1][:200] if lines else ended)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a trial. Ray's own processes leave the group; they end when their driver is gone."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def try_ray() -> None:
    """One task on one of Ray's workers."""
    from data_shards.fan_out import TaskFailure, fan_out
    from data_shards.ray_session import THIS_MACHINE

    [done] = fan_out(_make_doubler, [21], num_workers=1, address=THIS_MACHINE, patience_s=60.0)
    if isinstance(done.result, TaskFailure) or done.result != 42:
        raise RuntimeError(f"a task of Ray gave {done.result}")


def _make_doubler() -> Callable[[int], int]:
    return lambda number: 2 * number


def try_dali() -> None:
    """Build and run the smallest pipeline on the CPU backend, which the GPU's needs too."""
    import numpy as np
    from nvidia.dali import fn, pipeline_def
    from nvidia.dali.types import Constant

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def crop() -> object:
        return fn.crop(Constant(np.zeros((4, 4, 1), np.uint8), device="cpu"), crop=(2, 2))

    pipeline = crop()
    pipeline.build()
    (output,) = pipeline.run()
    if output.at(0).shape != (2, 2, 1):
        raise RuntimeError("DALI's crop returned another shape than it was asked for")


def try_deepspeed() -> None:
    """One update of a net of two parameters, on the GPU if there is one."""
    import torch

    from segdiff_dist.ranks.distributed import pick_device
    from segdiff_dist.training.config import TrainConfig
    from segdiff_dist.training.engine import Engine

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    device = pick_device("auto")
    net = torch.nn.Linear(1, 1)
    with torch.no_grad():
        net.weight.fill_(0.5)
        net.bias.fill_(0.25)
    engine = Engine(net.to(device), TrainConfig(global_batch_size=2, warmup_images=0), 2, device)
    ones_B1 = torch.ones(2, 1, device=device, dtype=next(engine.module.parameters()).dtype)
    before = [parameter.detach().float().clone() for parameter in engine.module.parameters()]
    engine.set_lr(0.1)
    engine.backward(engine(ones_B1).float().square().mean())
    skipped = float(engine.step())
    after = [parameter.detach().float() for parameter in engine.module.parameters()]
    if skipped or any(bool((one == other).all()) for one, other in zip(before, after, strict=True)):
        raise RuntimeError("DeepSpeed's step changed no weight")
    engine.close()
    torch.distributed.destroy_process_group()


def try_mlflow() -> None:
    """A metric through the queue into a store in a temporary folder."""
    from segdiff_dist.tracking.config import TrackingConfig
    from segdiff_dist.tracking.tracker import Tracker

    os.environ.pop("MLFLOW_TRACKING_URI", None)
    with tempfile.TemporaryDirectory(prefix="segdiff-doctor-") as folder:
        config = TrackingConfig(shared_store=False, system_metrics=False, flush_timeout_s=90.0)
        with Tracker(Path(folder), config, "doctor") as tracker:
            tracker.log_metrics({"doctor": 1.0})
        if tracker.run_id is None:
            raise RuntimeError("MLflow's store did not take a metric")


def try_triton() -> None:
    """Compile and launch a kernel on the GPU."""
    import torch

    from segdiff_kernels.ema_update import EmaUpdate

    average, weight = torch.zeros(64, device="cuda"), torch.ones(64, device="cuda")
    EmaUpdate([[average]], [weight])([0.75])
    if not torch.allclose(average, torch.full_like(average, 0.25)):
        raise RuntimeError("a kernel that was compiled here computes something else")


_AGAIN = "pip install --force-reinstall --no-deps -c constraints.txt"
TRIALS = (
    Trial(
        "Ray",
        try_ray,
        "one task on a worker",
        f"a shorter TMPDIR (its sockets' paths are limited to 107 bytes), more room in /dev/shm, or {_AGAIN} ray",
    ),
    Trial("DALI", try_dali, "one pipeline", f"{_AGAIN} nvidia-dali-cuda130"),
    Trial(
        "DeepSpeed",
        try_deepspeed,
        "one step of two parameters",
        f"unset stale variables of a launcher (RANK, WORLD_SIZE), or {_AGAIN} deepspeed",
    ),
    Trial(
        "MLflow",
        try_mlflow,
        "one metric into a store",
        f"a TMPDIR on a local disk, tracking off (--tracking.no-enabled), or {_AGAIN} mlflow",
    ),
    Trial(
        "Triton",
        try_triton,
        "one kernel compiled and launched",
        "a C compiler (gcc) on PATH, a TRITON_CACHE_DIR that can be written, or --denoiser.kernels torch",
    ),
)


def main(name: str) -> None:
    """Do the trial of this name. An error is one line."""
    trial = next(trial for trial in TRIALS if trial.name == name)
    try:
        trial.run()
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


if __name__ == "__main__":
    main(sys.argv[1])
