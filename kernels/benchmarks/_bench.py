"""Shared code of the kernels' benchmarks: each kernel is compared with torch's own operators, over the shapes of the
real UNet.

On a GPU every contender is timed by triton.testing.do_bench (median; it flushes the L2 cache before each call), with
inputs that rotate through more memory than the cache holds. Without a GPU nothing is timed: each contender is called
once at toy size, through Triton's interpreter, and compared with the last.
"""

from __future__ import annotations

import argparse
import itertools
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports a kernel

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
from support.harness import headline, stamp, write

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Channels and sides of the feature maps that the paper's UNet normalises at 256x256, the skip connections joined: its
# 18 different shapes. Counted by benchmarks/step_budget.py's net.
NORM_SHAPES = (
    *((128, 256), (256, 256), (128, 128), (256, 128), (384, 128), (128, 64), (256, 64), (384, 64), (512, 64)),
    *((256, 32), (512, 32), (768, 32), (256, 16), (512, 16), (768, 16), (1024, 16), (512, 8), (1024, 8)),
)
# Bytes of the rotating inputs: an H100 has 50 MB of L2 cache, an H200 60.
_PAST_THE_CACHE = 256 * 2**20
_MOST_COPIES = 8


@dataclass(frozen=True)
class Case:
    """One shape and dtype, and its contenders."""

    name: str
    num_bytes: int
    """The least number of bytes that must pass through memory; gigabytes a second are counted with it."""
    inputs: Callable[[], tuple[Any, ...]]
    """Fresh inputs on DEVICE."""
    contenders: dict[str, Callable[..., Any]]
    """Called with the inputs, each gives the same tensors; ours first, the reference last."""


Cases = Callable[[], Sequence[Case]]


@dataclass(frozen=True)
class Benchmark:
    """A script's cases. A script keeps one as BENCHMARK, where benchmark_of finds it."""

    description: str | None
    real: Cases
    """Cases of real size, to be timed on a GPU."""
    toy: Cases
    """Small cases, to check on a CPU that the contenders agree."""

    def main(self) -> None:
        """The command line of the script: --json FILE, and --quick for the first two cases alone."""
        parser = argparse.ArgumentParser(
            description=self.description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.add_argument("--json", type=Path, metavar="FILE", help="also write what was measured to FILE")
        parser.add_argument("--quick", action="store_true", help="two shapes only, to see that it works")
        args = parser.parse_args()
        results = stamp(args)
        print(headline(results))
        if DEVICE.type == "cuda":
            cases = self.real()[: 2 if args.quick else None]
            results["rows"] = [row for case in cases for row in measure(case)]
            print_table(results["rows"])
        else:
            print("no GPU: nothing is timed; a dry run at toy size, through Triton's interpreter")
            results["rows"], results["agreement"] = [], {}
            for case in self.toy():
                results["agreement"][case.name] = error = disagreement(case)
                print(f"{case.name:<60} contenders differ by {error:.1e} of the largest value at most")
        write(args.json, results)


def benchmark_of(script: Path) -> Benchmark:
    """The BENCHMARK of a script, without running the script."""
    benchmark: Benchmark = runpy.run_path(str(script))["BENCHMARK"]
    return benchmark


def measure(case: Case) -> list[dict[str, Any]]:
    """A row for each contender: case, contender, microseconds (median), gigabytes a second, times the reference; or its
    error if it fails."""
    sets = [case.inputs()]
    held = sum(t.numel() * t.element_size() for t in tree_leaves(sets[0]) if isinstance(t, Tensor))
    copies = max(1, min(_MOST_COPIES, -(-_PAST_THE_CACHE // max(held, 1))))
    sets += [case.inputs() for _ in range(copies - 1)]
    rows: list[dict[str, Any]] = []
    for name, function in case.contenders.items():
        row: dict[str, Any] = {"case": case.name, "contender": name}
        try:
            row["microseconds"] = us = _median_us(function, sets)
            row["gb_per_s"] = case.num_bytes / us / 1e3
        except Exception as error:  # a backend may refuse; the results of the other contenders are still useful
            row["error"] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        rows.append(row)
    for row in rows:
        if "error" not in row and "error" not in rows[-1]:
            row["times_reference"] = rows[-1]["microseconds"] / row["microseconds"]
    return rows


def _median_us(function: Callable[..., Any], sets: Sequence[tuple[Any, ...]]) -> float:
    from triton.testing import do_bench

    turns = itertools.cycle(sets)
    return float(do_bench(lambda: function(*next(turns)), return_mode="median")) * 1e3


def disagreement(case: Case) -> float:
    """The largest difference of any contender from the last, as a share of the largest value."""
    seed = torch.seed()

    def given() -> tuple[Any, ...]:
        torch.manual_seed(seed)  # the same inputs for each, drawn again, since some contenders write into them
        return case.inputs()

    *others, reference = (
        [t.detach().double() for t in tree_leaves(function(*given())) if isinstance(t, Tensor)]
        for function in case.contenders.values()
    )
    largest = 0.0
    for found in others:
        for mine, theirs in zip(found, reference, strict=True):
            largest = max(largest, float((mine - theirs).abs().max()) / (float(theirs.abs().max()) or 1.0))
    return largest


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """One line a row."""
    print(f"{'case':<48} {'contender':<20} {'us':>10} {'GB/s':>10} {'x ref.':>8}")
    for row in rows:
        of_whom = f"{row['case']:<48} {row['contender']:<20}"
        if "error" in row:
            print(f"{of_whom} {row['error']}")
            continue
        times = row.get("times_reference", float("nan"))
        print(f"{of_whom} {row['microseconds']:>10.1f} {row['gb_per_s']:>10.0f} {times:>8.2f}")
