"""A shipped recipe, and the models of the field, on an archive of few patients: each patient is held out once.

With three validation patients nothing can be told apart. So the labelled cases are divided into folds, each with cases
of all modalities. For each fold the networks train on the other folds' cases, and images are made of its own masks. All
images together are measured as one evaluation, with intervals over all patients.

    OBJECTIVE   launch/configs/amos_small.yaml, as benchmarks/objectives.py trains it: edm (shipped), x0, v, ...
    MODEL       as benchmarks/models.py trains it: concat, spade, controlnet, latent, cascade, ... (--models)

Dice is that of each fold's own segmenter, which has not seen the fold's patients. Distances and neighbourhoods need the
same features for all folds: those of ImageNet's network in a package, and of the first fold's segmenter.

    OUT/fold-K/archive, objectives, models    links to the archive's cases, and the folders of the two benchmarks

Existing results are not made again; --budget-minutes stops the models in time.

    python benchmarks/cross_validation.py --archive AMOS22 --out runs/folds
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import models
import objectives
from support.folds import write_folds
from support.harness import headline, run_script, stamp, write
from support.models_arms import ALL, Training
from support.pooled import Extractors, Fold, between_patients, difference, pool, spread_out
from support.recipes_runs import NEVER
from support.small_runs import draw_runs, stopped

from data_shards.records import MODALITIES
from segdiff_dist.evaluation.metrics.definitions import DEFINITIONS
from segdiff_dist.evaluation.metrics.sums import Interval

METRICS = tuple(
    dict.fromkeys(
        (
            *objectives.METRICS,
            *("false_positive_rate_mask_gen", "false_positive_rate_mask_real", "air_mean_real", "air_mean_gen"),
            *(
                f"{network}_{name}"
                for network in ("segmenter", "imagenet_lite")
                for name in ("frechet", "precision", "recall", "patient_precision", "patient_recall")
            ),
        )
    )
)
# Measured image by image, so that two models can be compared mask by mask.
_COMPARED = ("dice_either_mask_gen", "dice_mask_gen", "psnr_db", "ssim", "sharpness")
# x0 and v are among the objectives.
_MODELS = tuple(name for name in ALL if name not in objectives.OBJECTIVES)
_INTERVAL = Interval(resamples=2000, seed=0)


def main() -> int:
    args = parse()
    deadline = NEVER if args.budget_minutes is None else time.time() + 60 * args.budget_minutes
    archives = write_folds(args.archive, [folder / "archive" for folder in folders(args)])
    for folder, archive in zip(folders(args), archives, strict=True):
        objectives.make(_recipe(args, folder, archive))
    for _, training in trainings(args):
        if not (training.train(deadline) and training.measure(deadline)):
            return stopped()
    report(args)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archive", type=Path, required=True, help="an archive in AMOS' layout")
    parser.add_argument("--out", type=Path, default=Path("runs/folds"), help="the comparison's folder")
    parser.add_argument("--folds", type=int, default=4)
    parser.add_argument(
        "--objectives", nargs="+", choices=objectives.OBJECTIVES, default=["edm"], help="default: the shipped one"
    )
    parser.add_argument("--masks", type=int, default=64, help="sampled of each fold with an objective")
    parser.add_argument("--models", nargs="+", choices=_MODELS, default=[], help="default: none")
    parser.add_argument("--model-masks", type=int, default=48, help="sampled of each fold by a model")
    parser.add_argument("--tflops", type=float, default=9.0, help="of a model's trainings, counted")
    parser.add_argument("--lr", type=float, default=4e-3, help="of the models")
    parser.add_argument("--budget-minutes", type=float, help="stop after so many minutes; the same command goes on")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write what was measured, pictures beside")
    args = parser.parse_args()
    if args.folds < 2:
        parser.error(f"--folds {args.folds}: give at least 2")
    args.out, args.archive = args.out.absolute(), args.archive.absolute()
    return args


def folders(args: argparse.Namespace) -> list[Path]:
    """Of the folds."""
    return [args.out / f"fold-{k}" for k in range(args.folds)]


def trainings(args: argparse.Namespace) -> Iterator[tuple[str, Training]]:
    """Of the models, fold by fold, with their names."""
    side = objectives.settings_of("edm", _recipe(args, args.out, args.archive))["prepare"]["size"]
    for folder in folders(args):
        out = folder / "models"
        _link(out / "shards", folder / "objectives" / "shards")
        _link(out / "segmenter", folder / "objectives" / "segmenter-run")
        given = {"out": out, "side": side, "tflops": args.tflops, "batch": models.BATCH}
        shared = argparse.Namespace(**given, masks=args.model_masks, split="val")
        for model in args.models:
            yield model, Training(shared, model, 0, args.lr)


def report(args: argparse.Namespace) -> None:
    """Print the tables, write the JSON file, draw each fold."""
    runs = {
        name: [folder / "objectives" / "runs" / f"{name}-0" for folder in folders(args)] for name in args.objectives
    }
    for model, training in trainings(args):
        runs.setdefault(model, []).append(training.last)
    segmenter = folders(args)[0] / "objectives" / "segmenter-run" / "segmenter" / "weights"
    extract = Extractors.load(segmenter)
    folds = {name: [Fold.open(run, extract) for run in of_folds] for name, of_folds in runs.items()}
    results = {name: result_of(of, list(extract.by_name)) for name, of in folds.items()}
    for first, *others in (args.objectives, args.models or [""]):
        for name in others:
            results[name][f"less_{first}"] = differences(folds[name], folds[first])
            print(f"{name} less {first}: {json.dumps(results[name][f'less_{first}'])}")
    record = stamp(args, without=("archive", "out"))
    print(headline(record))
    for group in ("all", *MODALITIES):
        print_table(results, group)
    file = args.json or args.out / "cross_validation.json"
    write(file, record | {"results": results})
    for k in range(args.folds):
        draw_runs({name: of[k] for name, of in runs.items()}, file.with_name(f"{file.stem}-fold-{k}.png"))


def result_of(folds: list[Fold], extractors: list[str]) -> dict[str, Any]:
    """What was measured of all folds together."""
    summary = pool(folds, _INTERVAL)
    groups = {"all": summary["metrics"], **summary["by_modality"]}
    kept = ("value", "ci95", "n", "num_patients")
    return {name: summary[name] for name in ("num_samples", "num_patients")} | {
        "metrics": {
            group: {m: {k: entries[m].get(k) for k in kept} for m in METRICS if m in entries}
            for group, entries in groups.items()
        },
        "spread_out": {
            name: {m or "all": spread_out(folds, name, m) for m in (None, *MODALITIES)} for name in extractors
        },
        "between_patients": {
            name: {m: found for m in MODALITIES if (found := between_patients(folds, name, m))} for name in extractors
        },
    }


def differences(folds: list[Fold], others: list[Fold]) -> dict[str, Any]:
    """Of the same masks, with intervals over patients."""
    found = {name: difference(folds, others, name, _INTERVAL) for name in _COMPARED}
    return {name: asdict(one) for name, one in found.items() if one is not None}


def print_table(results: dict[str, dict[str, Any]], group: str) -> None:
    """A row a metric, a column a recipe, intervals over patients in brackets."""
    print(f"\n{group:<46}" + "".join(f"{name:>26}" for name in results))
    for metric in METRICS:
        found = [result["metrics"][group].get(metric) for result in results.values()]
        if any(found):
            label, digits = DEFINITIONS[metric].label, DEFINITIONS[metric].digits
            print(f"{label:<46}" + "".join(f"{_cell(entry, digits):>26}" for entry in found))
    for name, result in results.items():
        for features, of_modality in result["spread_out"].items():
            print(f"{name}, {features}, few images of each patient: {json.dumps(of_modality[group])}")
        for features, of_modality in result["between_patients"].items():
            if found := of_modality.get(group):
                print(f"{name}, {features}, halves of the patients: {json.dumps(_rounded(found))}")


def _cell(entry: dict[str, Any] | None, digits: int) -> str:
    if entry is None or entry["value"] is None:
        return "-"
    interval = entry["ci95"]
    return f"{entry['value']:.{digits}f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")


def _rounded(found: dict[str, Any]) -> dict[str, Any]:
    return {k: {m: round(v, 3) for m, v in of.items()} for k, of in found.items() if isinstance(of, dict)}


def _recipe(args: argparse.Namespace, folder: Path, archive: Path) -> argparse.Namespace:
    """Arguments of benchmarks/objectives.py."""
    given = {"archive": archive, "out": folder / "objectives", "objectives": args.objectives, "images": None}
    return argparse.Namespace(**given, masks=args.masks, threads=1, seeds=1)


def _link(link: Path, to: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.exists():
        link.symlink_to(to)


if __name__ == "__main__":
    run_script(main)
