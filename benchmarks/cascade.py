"""A cascade beside one net at equal compute: a low-resolution denoiser and super-resolution, or one denoiser.

    one       a net on slices as they are
    low       the same net on slices of half the side
    high      the same net, which enlarges the images of `low`; measured at several levels of the augmentation

All have the same width, depth, optimiser, learning rate and batch. `low` and `high` see so many images that both
together take the FLOPs of `one`, which are counted; --share is the part of `low`. `segdiff sample` and `segdiff
evaluate` measure images of masks of patients that none has seen. A comparison is stored in a folder (--out) and
continues where it was stopped; --budget-minutes stops it in time.
"""

from __future__ import annotations

import argparse
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from support.harness import run_script
from support.recipes_runs import NEVER, QUICK, Scale, make_data
from support.small_runs import flops_of, shared_settings, stage, stopped, write_table

from segdiff_dist.config import merge

SCALE = Scale(side=64, segmenter_images=4_800, patients=(20, 2, 5), slice_stride=6)
NETS = ("one", "low", "high")


def main() -> int:
    args = parse()
    out = args.out.absolute()
    deadline = NEVER if args.budget_minutes is None else time.time() + 60 * args.budget_minutes
    scale = replace(QUICK, patients=(10, 1, 1)) if args.quick else replace(SCALE, side=args.side)
    if not make_data(out, None, scale, 1, deadline):
        return stopped()
    for name in NETS:
        settings = settings_of(name, args, out, scale)
        print(f"{name}: train, {settings['train']['num_images']:,} images", flush=True)
        if not stage("train", name, settings, out, deadline):
            return stopped()
    arms = ["one", *(f"high-{level:g}" for level in args.levels)]
    for name in arms:
        net, _, level = name.partition("-")
        settings = settings_of(net, args, out, scale)
        if level:  # a run folder of its own, with the same weights
            shutil.copytree(out / net / "weights", out / name / "weights", dirs_exist_ok=True)
            settings |= {"run": str(out / name)}
            settings["sample"]["sampler"]["augmentation"] = float(level)
        print(f"{name}: sample and evaluate", flush=True)
        for work in ("sample", "evaluate"):
            done = work == "evaluate" and (out / name / "evaluation" / "summary.json").is_file()
            if not done and not stage(work, name, settings, out, deadline):
                return stopped()
    of_net = {name: flops_of(settings_of(name, args, out, scale)) for name in NETS}
    flops = {name: of_net["one"] if name == "one" else of_net["low"] + of_net["high"] for name in arms}
    more = {"side": scale.side, "patients": scale.patients, "images": {name: args.images[name] for name in NETS}}
    write_table(args, {name: out / name for name in arms}, flops, args.json or out / "cascade.json", more)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/cascade"), help="the comparison's folder")
    parser.add_argument("--side", type=int, default=64, help="of the slices, in pixels; low has the half")
    parser.add_argument("--one-images", type=int, default=4_800, help="of the training of one net")
    parser.add_argument("--share", type=float, default=0.4, help="of the cascade's FLOPs: the low-resolution net's")
    parser.add_argument("--levels", nargs="+", type=float, default=[0, 0.1, 0.3], help="of the augmentation")
    parser.add_argument("--masks", type=int, default=40, help="sampled of each")
    parser.add_argument("--seed", type=int, default=0, help="of trainings and sampling")
    parser.add_argument("--budget-minutes", type=float, help="stop after so many minutes; the same command goes on")
    parser.add_argument("--quick", action="store_true", help="a tiny one, to see that it works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write what was measured")
    args = parser.parse_args()
    args.images = {}
    return args


def settings_of(name: str, args: argparse.Namespace, out: Path, scale: Scale) -> dict[str, Any]:
    """The config file of a net. The images of `low` and `high` follow from the FLOPs of one image of each."""
    own = {"low": {"low_resolution": scale.side // 2}, "high": {"cascade": str(out / "low")}}.get(name, {})
    settings = {"data": str(out / "shards"), "run": str(out / name), "denoiser": own, "train": {"num_images": 1}}
    settings = merge(shared_settings(args, out), settings)
    if name not in args.images:
        args.images[name] = args.one_images
        if name != "one":
            part = args.share if name == "low" else 1 - args.share
            one = settings_of("one", args, out, scale)
            batch = settings["train"]["global_batch_size"]
            args.images[name] = round(part * flops_of(one) / flops_of(settings) / batch) * batch
    return merge(settings, {"train": {"num_images": args.images[name]}})


if __name__ == "__main__":
    run_script(main)
