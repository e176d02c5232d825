"""The models of the field at equal compute: concatenation, SPADE, ControlNet, latent diffusion and a cascade.

    concat        the mask as channels of the input
    spade         the mask scales and shifts the norms of the decoder
    controlnet    a base without masks takes half of the compute, the control on it the other half
    latent        an autoencoder takes 0.4 of the compute, the same net on its latents the rest
    cascade       the net on slices of half the side takes 0.4 of the compute, super-resolution the rest

All have the same net, optimiser, batch and sampler, and see the same slices. First each trains for --tflops, which are
counted, with --seeds seeds. With several --lrs each takes the one with the least validation loss. Then, with --seconds,
each trains again for as many seconds of training steps as concat took. --models also takes variants of concat: other
objectives, nets and losses. Images of masks of patients that none has seen are measured by one segmenter through
`segdiff evaluate`, with intervals over patients.

A comparison is stored in a folder (--out) and continues where it was stopped; --budget-minutes stops it in time. The
JSON file, a figure and a gallery are written of all that is complete.

    python benchmarks/models.py --out runs/models --dry-run
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from support.harness import headline, run_script, stamp, write
from support.models_arms import ALL, MODELS, Training, longer_by_seconds, with_seconds
from support.models_figure import draw_models
from support.recipes_runs import NEVER, QUICK, Scale, make_data
from support.small_runs import METRICS, cell_of_seeds, draw_runs, over_seeds, stopped

from data_shards.problems import InputProblems, Problem
from segdiff_dist.evaluation.metrics.definitions import DEFINITIONS

SCALE = Scale(side=32, segmenter_images=4_800, patients=(20, 2, 5), slice_stride=6)
BATCH = 16
_COSTS = ("flops", "seconds", "kept_mib_of_a_batch", "process_gib", "seconds_an_image")


def main() -> int:
    args = parse()
    deadline = NEVER if args.budget_minutes is None else time.time() + 60 * args.budget_minutes
    scale = replace(SCALE, side=args.side, segmenter_images=args.segmenter_images)
    if args.quick:
        scale = replace(QUICK, patients=(4, 1, 2))
    refuse_another_data(args)
    if args.dry_run:
        print_plan(args)
        return 0
    if not make_data(args.out, args.archive, scale, 1, deadline):
        return stopped()
    refuse_another_data(args)
    complete = train_all(args, deadline)
    done = {by: found for by in ("flops", "seconds") if (found := finished(args, by))}
    if not done:
        return stopped()
    report(args, done)
    return 0 if complete else stopped()


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/models"), help="the comparison's folder")
    parser.add_argument("--archive", type=Path, help="a folder of volumes, or a shard set, in the phantom's place")
    parser.add_argument("--models", nargs="+", choices=ALL, default=list(MODELS), help="default: the five")
    parser.add_argument("--tflops", type=float, default=2.25, help="of each model's trainings, counted")
    parser.add_argument("--seconds", action="store_true", help="then also at equal seconds of training steps")
    parser.add_argument("--lrs", nargs="+", type=float, default=[2e-3], help="learning rates to choose from")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each model, of seed 0, 1, ...")
    parser.add_argument("--side", type=int, default=SCALE.side, help="of the slices, in pixels")
    parser.add_argument(
        "--segmenter-images", type=int, default=SCALE.segmenter_images, help="of the training of the segmenter"
    )
    parser.add_argument("--batch", type=int, default=BATCH, help="images of a step")
    parser.add_argument("--masks", type=int, default=40, help="sampled of each")
    parser.add_argument(
        "--split", choices=("val", "test"), default="test", help="whose masks: val if test has no labels"
    )
    parser.add_argument("--budget-minutes", type=float, help="stop after so many minutes; the same command goes on")
    parser.add_argument("--quick", action="store_true", help="a tiny one, to see that it works, in OUT/quick")
    parser.add_argument("--dry-run", action="store_true", help="say what is left to do, and stop")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write what was measured, figures beside")
    args = parser.parse_args(words)
    if args.seeds < 1:
        parser.error(f"--seeds {args.seeds}: give at least 1")
    if args.tflops <= 0:
        parser.error(f"--tflops {args.tflops:g}: give more than 0")
    if args.seconds and "concat" not in args.models:
        parser.error("--seconds: its seconds are those of concat; add it to --models")
    args.out = args.out.absolute()
    args.archive = None if args.archive is None else args.archive.absolute()
    if args.quick:
        args.out, args.side, args.tflops, args.seeds, args.masks = args.out / "quick", QUICK.side, 0.03, 1, 12
    return args


def refuse_another_data(args: argparse.Namespace) -> None:
    """Slices that do not go with the arguments, as far as they are there."""
    from data_shards.store.shards import ShardSet

    made, archive = args.out / "shards", args.archive
    if archive is not None and not archive.is_dir():
        raise InputProblems([Problem("arguments", "--archive", f"no folder {archive}", "give volumes or a shard set")])
    is_set = archive is not None and (archive / "index.json").is_file()
    if is_set and made.exists() and made.resolve() != archive.resolve():
        value = f"{archive}, and {made} has other slices"
        raise InputProblems([Problem("arguments", "--archive", value, "give another --out")])
    folder = archive if is_set else made
    if not (folder / "index.json").is_file():
        return
    shards = ShardSet.open([str(folder)])
    if shards.size != args.side:
        value = f"{args.side} pixels, the slices in {folder} have {shards.size}"
        raise InputProblems([Problem("arguments", "--side", value, f"give --side {shards.size}, or another --out")])
    if not len(shards.select(split=args.split)):
        other = "val" if args.split == "test" else "test"
        raise InputProblems([Problem("arguments", "--split", f"no slice of {args.split}", f"try --split {other}")])


def train_all(args: argparse.Namespace, deadline: float) -> bool:
    """Train and measure all that is missing; False if time ran out."""
    for lr in args.lrs if len(args.lrs) > 1 else ():
        for model in args.models:
            if not Training(args, model, 0, lr).train(deadline):
                return False
    for seed in range(args.seeds):
        for model in args.models:
            training = Training(args, model, seed, best_lr(args, model))
            if not (training.train(deadline) and training.measure(deadline)):
                return False
    if not args.seconds:
        return True
    for seed in range(args.seeds):
        for model in args.models[args.models[0] == "concat" :]:
            training = at_equal_seconds(args, model, seed)
            if not (training.train(deadline) and training.measure(deadline)):
                return False
    return True


def best_lr(args: argparse.Namespace, model: str) -> float:
    """The learning rate with the least validation loss, of those that were trained."""
    if len(args.lrs) == 1:
        return float(args.lrs[0])
    return min(args.lrs, key=lambda lr: Training(args, model, 0, lr).validation_loss())


def at_equal_seconds(args: argparse.Namespace, model: str, seed: int) -> Training:
    """A model that sees as many images as it can in the seconds that concat took."""
    own, reference = (
        [Training(args, name, one, best_lr(args, name)) for one in range(args.seeds)] for name in (model, "concat")
    )
    return own[seed] if model == "concat" else with_seconds(own[seed], longer_by_seconds(own, reference))


def finished(args: argparse.Namespace, by: str) -> dict[str, list[Training]]:
    """By model, the trainings that were measured; a model's seeds may not all be there yet."""
    found: dict[str, list[Training]] = {}
    if by == "seconds" and not (args.seconds and (args.out / by).is_dir()):
        return found
    for model in args.models:
        if not all(Training(args, model, 0, lr).is_trained for lr in args.lrs):
            continue
        seeds = [Training(args, model, seed, best_lr(args, model)) for seed in range(args.seeds)]
        if by == "seconds":
            if not all(t.summary_file.is_file() for t in seeds):
                continue
            seeds = [at_equal_seconds(args, model, seed) for seed in range(args.seeds)]
        if done := [t for t in seeds if t.summary_file.is_file()]:
            found[model] = done
    return found


def report(args: argparse.Namespace, done: dict[str, dict[str, list[Training]]]) -> None:
    """Print the tables, write the JSON file, draw."""
    record = stamp(args, without=("archive", "out"))
    print(headline(record))
    results = {by: {model: row_of(trainings) for model, trainings in models.items()} for by, models in done.items()}
    file = args.json or args.out / "models.json"
    for by, rows in results.items():
        print_table(rows, by)
        draw_runs(
            {model: trainings[0].last for model, trainings in done[by].items()},
            file.with_name(f"{file.stem}-{by}-gallery.png"),
        )
    first = json.loads(next(iter(done["flops"].values()))[0].summary_file.read_text())
    record |= {name: first[name] for name in ("num_samples", "num_patients")}
    data = "phantom" if args.archive is None else "archive"
    draw_models(results, f"{data} slices, {args.side}x{args.side}, {args.tflops:g} TFLOPs", file.with_suffix(".png"))
    write(file, record | {"data": data, "results": results})


def row_of(trainings: list[Training]) -> dict[str, Any]:
    """Metrics and costs of a model's seeds."""
    costs = [training.costs() for training in trainings]
    summaries = [json.loads(training.summary_file.read_text()) for training in trainings]
    numbers = {name: {"value": costs[0][name], "of_seeds": [one[name] for one in costs]} for name in _COSTS}
    return {
        "lr": trainings[0].lr,
        "seeds": [training.seed for training in trainings],
        "images": costs[0]["images"],
        "parameters": costs[0]["parameters"],
        "costs": numbers,
        "metrics": over_seeds(summaries, METRICS),
    }


def print_table(rows: dict[str, dict[str, Any]], by: str) -> None:
    """A row a metric, a column a model: mean, range over seeds, interval over patients of the first seed."""
    print(f"\n{'equal ' + by:<46}" + "".join(f"{name:>36}" for name in rows))
    for metric in METRICS:
        cells = [cell_of_seeds(row["metrics"].get(metric), DEFINITIONS[metric].digits) for row in rows.values()]
        print(f"{DEFINITIONS[metric].label:<46}" + "".join(f"{cell:>36}" for cell in cells))
    for cost in _COSTS:
        cells = [" ".join(f"{value:.3g}" for value in row["costs"][cost]["of_seeds"]) for row in rows.values()]
        print(f"{cost:<46}" + "".join(f"{cell:>36}" for cell in cells))


def print_plan(args: argparse.Namespace) -> None:
    """What is left: trainings by model and seed, and the compute of each."""
    print(f"{args.out}: {args.side}x{args.side}, {args.tflops:g} TFLOPs each, learning rates {args.lrs}")
    for model in args.models:
        parts = ", ".join(f"{part.name} {part.share:g}" for part in ALL[model])
        done = len(finished(args, "flops").get(model, []))
        print(f"  {model:<12} {parts:<36} {done} of {args.seeds} seeds measured")
    again = len(args.lrs) - 1 + args.seeds * (2 if args.seconds else 1)
    print(f"in all {again * len(args.models)} trainings; besides, once: slices and segmenter, about 5 minutes")


if __name__ == "__main__":
    run_script(main)
