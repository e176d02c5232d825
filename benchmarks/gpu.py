"""All measurements that need a GPU, in one command and in less than ten minutes.

    python benchmarks/gpu.py --json benchmarks/results/gpu-h200.json

Ceilings first (a copy, a matrix product), then the norms' one-pass kernel alone, the kernels' parity with torch, the
training engine at 8 to 64 images at once with and without a CUDA graph (support/gpu_engine.py), whole training steps of
batch 32 beside those of others (support/gpu_training.py), determinism, the norms over the shapes of the real UNet, the
backends of attention, the other kernels, sampling in small batches, training steps of batch 64, and at last the loops
that torch.compile builds. No part takes more than four minutes, and `--parts NAME ...` runs some alone; gpu_pending.sh
has them in calls of that length, and ends what hangs. If a part fails or no time is left for it, that is recorded and
the rest goes on, in a new process if the device was lost. `--dry-run` does all of it at toy size on a CPU, through
Triton's interpreter; its times mean nothing.
"""

from __future__ import annotations

import os
import sys

import torch

if "--dry-run" in sys.argv or not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports a kernel

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from support.gpu_engine import determinism, engine_steps
from support.gpu_kernels import ceilings, kernels, norms, one_pass, parity, unet_parity, upsampling
from support.gpu_sampling import attention, sampling
from support.gpu_session import REAL, TOY, Session, TargetCheck
from support.gpu_training import training_steps
from support.harness import headline, stamp

from segdiff_kernels import tiles

# By name, the function and the least seconds that it needs; the most useful parts first.
Parts = dict[str, tuple[Callable[[Session], Any], float]]


def parts_of(batches: tuple[int, ...]) -> Parts:
    """All parts, in the order in which they run."""
    first, *others = batches
    return {
        "ceilings": (ceilings, 0.0),
        "one_pass": (one_pass, 15.0),
        "parity": (parity, 60.0),
        "unet_parity": (unet_parity, 45.0),
        "engine": (engine_steps, 60.0),
        f"training_{first}": (partial(training_steps, batch=first), 120.0),
        "determinism": (determinism, 40.0),
        "norms": (norms, 60.0),
        "upsampling": (upsampling, 15.0),
        "attention": (attention, 20.0),
        "kernels": (kernels, 90.0),
        "sampling": (sampling, 90.0),
        **{f"training_{n}": (partial(training_steps, batch=n), 120.0) for n in others},
        # torch.compile takes minutes: last, and alone.
        f"compiled_{first}": (partial(training_steps, batch=first, compiled=True), 150.0),
    }


def go_on_afresh(session: Session, names: list[str]) -> None:
    """Become a new process, for the parts after names[0], in which the device stopped answering. If one training loop
    was the cause, that part runs again without it."""
    print(f"\nthe device does not answer any more since {session.lost_to or names[0]}; going on afresh", flush=True)
    failed, *left = names
    if session.lost_to is not None:
        session.record["parts"][f"{failed}, {session.lost_to}"] = session.record["parts"].pop(failed)
        session.save()
        left = names
    if left:
        os.execv(sys.executable, [sys.executable, __file__, *afresh(session, left)])


def afresh(session: Session, names: list[str]) -> list[str]:
    """The command line that goes on with these parts."""
    args = session.args
    loops = args.loops if session.lost_to is None else args.loops.replace(session.lost_to[0], "")
    kept = ["--quick"] * args.quick + (["--json", str(args.json)] if args.json else [])
    kept += ["--three-launches"] * args.three_launches
    minutes = f"{max(session.left_s(), 0) / 60:.2f}"
    return [*kept, "--resume", "--budget-minutes", minutes, "--loops", loops, "--parts", *names]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write what was measured to FILE")
    parser.add_argument("--dry-run", action="store_true", help="at toy size on the CPU, to see that it works")
    parser.add_argument("--budget-minutes", type=float, default=9.0, help="begin no part that would take longer")
    parser.add_argument("--parts", nargs="+", metavar="PART", help="these alone; by default all")
    parser.add_argument("--loops", default="abcdefg", help="of the training loops these alone, by their letters")
    parser.add_argument("--resume", action="store_true", help="keep the parts that FILE holds")
    parser.add_argument("--quick", action="store_true", help="one batch, one round, nothing compiled")
    three_launches = "the norms without the one-pass kernels, should they hang or be wrong"
    parser.add_argument("--three-launches", action="store_true", help=three_launches)
    args = parser.parse_args(arguments)
    if args.three_launches:
        tiles.PART_BYTES = 0
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
    if args.resume and args.json is not None:
        before = json.loads(args.json.read_text())
        session.record["parts"] = before["parts"]
        session.target_checks = [
            TargetCheck(v["name"], v["value"], v["target"], v["is_limit"]) for v in before["target_checks"]
        ]
    print(headline(session.record))
    names = list(args.parts or parts)
    for number, name in enumerate(names):
        session.part(name, *parts[name])
        if not session.device_works():
            go_on_afresh(session, names[number:])
    print(f"\n{60 * args.budget_minutes - session.left_s():.0f} s in all")
    for check in session.target_checks:
        print(check)
    failed = [name for name, part in session.record["parts"].items() if "error" in part]
    if failed:
        print(f"failed: {', '.join(failed)}")
    session.save(quiet=False)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
