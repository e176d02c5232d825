"""Shared by the parts of benchmarks/gpu.py: their scale, their time budget, and the results file.

If a part fails, its error is recorded and the next one begins. The results file is written again after every part, so
that its measurements are kept if the machine is lost.
"""

from __future__ import annotations

import argparse
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from segdiff_dist.denoising.config import DenoiserConfig
from support.harness import write

# A part fits into one call of a machine that is lent for minutes.
LONGEST_PART_S = 225.0


@dataclass(frozen=True)
class Scale:
    """The sizes of all parts."""

    net: DenoiserConfig
    size: int
    batches: tuple[int, ...]
    """Batches of the training steps; targets are for the first."""
    rounds: int
    steps: int
    """Timed in each turn."""
    sampling_batches: tuple[int, ...]
    sampling_steps: int
    copy_bytes: int
    gemm_side: int
    compiler: str | None
    """torch.compile's backend; None leaves out what is compiled."""
    attention_sizes: tuple[int, ...]
    """Sides of the images whose attention is timed."""
    engine_batches: tuple[int, ...]
    """Images at once under the training engine; the last is its step."""
    norm_shapes: tuple[tuple[int, int], ...] | None = None
    """Channels and side; None for the UNet's 18."""


REAL = Scale(
    net=DenoiserConfig(),
    size=256,
    batches=(32, 64),
    rounds=5,
    steps=4,
    sampling_batches=(1, 4, 16),
    sampling_steps=20,
    copy_bytes=2**30,
    gemm_side=8192,
    compiler="inductor",
    attention_sizes=(256, 512),
    engine_batches=(8, 16, 32, 64),
)
TOY = Scale(
    # One level: each call of a kernel costs the interpreter a tenth of a second.
    net=DenoiserConfig(block_out_channels=(8,), layers_per_block=1, attention_resolutions=(), norm_num_groups=4),
    size=8,
    batches=(2,),
    rounds=1,
    steps=1,
    sampling_batches=(1,),
    sampling_steps=1,
    copy_bytes=2**22,
    gemm_side=128,
    compiler="aot_eager",
    attention_sizes=(16,),
    engine_batches=(1, 2),
    norm_shapes=((16, 8),),
)


@dataclass(frozen=True)
class TargetCheck:
    """A figure that has a target."""

    name: str
    value: float
    target: float
    is_limit: bool = False
    """Whether it must stay below the target."""

    @property
    def reached(self) -> bool:
        return self.value <= self.target if self.is_limit else self.value >= self.target

    def __str__(self) -> str:
        bound = "at most" if self.is_limit else "at least"
        return f"{self.name}: {self.value:.2f}, {bound} {self.target:g}: {'reached' if self.reached else 'NOT reached'}"


@dataclass
class Session:
    """One run of the benchmark."""

    args: argparse.Namespace
    scale: Scale
    device: torch.device
    record: dict[str, Any]
    """The contents of the results file: the stamp, then `parts` by name and `target_checks`."""
    start: float = field(default_factory=time.monotonic)
    target_checks: list[TargetCheck] = field(default_factory=list)
    now: str | None = None
    """The part that runs."""
    lost_to: str | None = None
    """The training loop that the device stopped answering in."""

    def left_s(self) -> float:
        """Seconds of the budget that are left."""
        return 60.0 * self.args.budget_minutes - (time.monotonic() - self.start)

    def part(self, name: str, run: Callable[[Session], Any], least_s: float = 0.0) -> None:
        """Run a part and keep what it returns; skipped if fewer than `least_s` seconds are left."""
        parts = self.record.setdefault("parts", {})
        if self.left_s() < least_s:
            parts[name] = {"skipped": f"{self.left_s():.0f} s were left, {least_s:.0f} s are needed"}
            print(f"\n{name}: skipped, {parts[name]['skipped']}", flush=True)
            self.save()
            return
        print(f"\n{name}", flush=True)
        began, self.now = time.monotonic(), name
        try:
            with _at_most(LONGEST_PART_S):
                parts[name] = {"found": run(self)}
        except Exception as error:  # for any error, the results of the other parts are still useful
            parts[name] = {"so_far": parts.get(name, {}).get("so_far"), "error": describe(error)}
            traceback.print_exc()
        parts[name]["seconds"] = round(time.monotonic() - began, 1)
        self.save()

    def keep(self, found: Any) -> None:
        """The results of the running part so far, in case it does not end."""
        assert self.now is not None
        self.record["parts"][self.now] = {"so_far": found}
        self.save()

    def save(self, *, quiet: bool = True) -> None:
        """Bring the results file up to date."""
        self.record["target_checks"] = [vars(check) | {"reached": check.reached} for check in self.target_checks]
        write(self.args.json, self.record, quiet=quiet)

    def check_target(self, name: str, value: float, target: float, *, is_limit: bool = False) -> None:
        """Compare a figure with its target; figures of a dry run mean nothing and are left out."""
        if not self.args.dry_run:
            self.target_checks.append(TargetCheck(name, value, target, is_limit))
            print(f"  {self.target_checks[-1]}", flush=True)

    def device_works(self) -> bool:
        """Whether the device still answers; after an illegal access nothing does in this process. Frees its cache."""
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize(self.device)
                torch.cuda.empty_cache()
            except RuntimeError:
                return False
        return True

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Callable[[], Any], repeats: int) -> float:
        """Seconds of one call, over `repeats` consecutive calls, on a GPU after one that does not count."""
        if self.device.type == "cuda":
            call()
            self.synchronize()
        began = time.perf_counter()
        for _ in range(repeats):
            call()
        self.synchronize()
        return (time.perf_counter() - began) / repeats


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in code that takes longer, as soon as Python runs again, which happens often enough in a
    compiler."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def describe(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
