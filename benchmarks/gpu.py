"""Everything that has to be measured on a GPU, in one command and under ten minutes.

    python benchmarks/gpu.py --json benchmarks/results/gpu-h100.json

Ceilings first (a copy, a matrix product), then the kernels' parity with torch, the norms and the other kernels over
the shapes of the real UNet, whole training steps of batch 32 and 64 beside those of others (_gpu_training.py),
sampling in small batches and the backends of attention. A part that fails or for which no time is left says so, and
the rest goes on. `--dry-run` does all of it at toy size on a CPU, through Triton's interpreter, and times nothing that
means anything.
"""

from __future__ import annotations

import os
import sys

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports a kernel

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from _gpu_kernels import ceilings, kernels, norms, parity, unet_parity
from _gpu_sampling import attention, sampling
from _gpu_session import REAL, TOY, Session
from _gpu_training import training_steps
from _results import headline, stamp, write

# By name what runs, and the seconds that it needs at least; in the order of what is worth most.
Parts = dict[str, tuple[Callable[[Session], Any], float]]


def parts_of(batches: tuple[int, ...]) -> Parts:
    """All parts, in the order in which they run."""
    first, *others = batches
    return {
        "ceilings": (ceilings, 0.0),
        "parity": (parity, 20.0),
        "unet_parity": (unet_parity, 10.0),
        f"training_{first}": (partial(training_steps, batch=first), 60.0),
        "norms": (norms, 20.0),
        **{f"training_{batch}": (partial(training_steps, batch=batch), 90.0) for batch in others},
        "sampling": (sampling, 40.0),
        "attention": (attention, 10.0),
        "kernels": (kernels, 20.0),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write what was measured to FILE")
    parser.add_argument("--dry-run", action="store_true", help="at toy size on the CPU, to see that it works")
    parser.add_argument("--budget-minutes", type=float, default=10.0, help="begin no part that would take longer")
    parser.add_argument("--parts", nargs="+", metavar="PART", help="these alone; by default all")
    parser.add_argument("--loops", default="abcdefg", help="of the training loops these alone, by their letters")
    parser.add_argument("--quick", action="store_true", help="one batch, one round, nothing compiled")
    args = parser.parse_args(arguments)
    if not args.dry_run and not torch.cuda.is_available():
        print("no GPU here: nothing to measure; --dry-run tries everything at toy size")
        return 0
    scale = TOY if args.dry_run else REAL
    if args.quick:
        scale = replace(scale, rounds=1, batches=scale.batches[:1], compiler=None)
    parts = parts_of(scale.batches)
    unknown = set(args.parts or ()) - set(parts)
    if unknown:
        parser.error(f"--parts: {', '.join(sorted(unknown))}: not among {', '.join(parts)}")
    device = torch.device("cpu" if args.dry_run else "cuda")
    session = Session(args, scale, device, {**stamp(args), "dry_run": args.dry_run, "parts": {}})
    print(headline(session.told))
    for name in args.parts or parts:
        session.part(name, *parts[name])
    print(f"\n{60 * args.budget_minutes - session.left_s():.0f} s in all")
    for verdict in session.verdicts:
        print(verdict)
    failed = [name for name, told in session.told["parts"].items() if "error" in told]
    if failed:
        print(f"failed: {', '.join(failed)}")
    session.told["verdicts"] = [vars(v) | {"reached": v.reached} for v in session.verdicts]
    write(args, session.told)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
