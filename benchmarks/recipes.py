"""A fair comparison of recipes: the paper's at its best and ours, over images seen and over seconds.

Both train the same small net on the same slices of CT and MR, with as many images, in the same precision, on one core
each; only the settings that docs/recipes.md lists for a recipe differ. The paper's recipe uses the learning rate, and
averaged or plain weights, that are best on the validation split. At several points of training a fixed set of held-out
masks is sampled, and scored by a segmenter that was trained on the same training split: Dice over the organs of the
mask, Frechet distance of the segmenter's features, PSNR, and sharpness (power by band of frequency, and texture inside
organs, against the real images, since the others do not detect blur). Then ours with one part at a time as in the
paper.

A comparison is stored in a folder (--out) and continues where it was stopped: --budget-minutes stops it in time,
--dry-run prints the remaining work. The default is a phantom; --archive adds an archive in AMOS' layout. If its test
split has no labels, the validation split's masks are sampled, by which the paper's learning rate was chosen.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

from support.harness import run_script, stamp, write
from support.recipes_comparison import Comparison, Work
from support.recipes_figure import draw_curves, draw_gallery
from support.recipes_measure import Scored, measure
from support.recipes_runs import (
    ABLATIONS,
    NEVER,
    QUICK,
    Run,
    Scale,
    describe,
    make_data,
    samplers,
    train,
)
from support.recipes_tables import print_result

from data_shards.files import write_atomic
from data_shards.problems import Problem, refuse
from segdiff_dist.config import differences

# Used until a run has measured its speed: images trained and images taken through the net once, a second on one core of
# an AMD EPYC, for the net and size of Scale's defaults.
_TRAINED_PER_S, _FORWARD_PER_S = 15.0, 47.0
# Seconds to start a training, and to load the parts for scoring one.
_START_S, _LOAD_S = 20.0, 5.0


def advance(run: Run, scored: list[Scored], scale: Scale, deadline: float) -> bool:
    """Train a run and measure it; False if time ran out before. Runs in a process of the pool."""
    if not train(run, scale, deadline):
        return False
    for one in scored:
        if not one.is_done and time.time() >= deadline:
            return False
        measure(one, scale)
    return True


def work_off(work: Work, scale: Scale, jobs: int, deadline: float) -> bool:
    """Advance every run, `jobs` at a time; False if time ran out before all was done."""
    waiting = {run: scored for run, scored in work.items() if not (run.is_trained and all(j.is_done for j in scored))}
    if not waiting:
        return True
    os.environ["OMP_NUM_THREADS"] = "1"  # for the pool's processes
    context = multiprocessing.get_context("spawn")
    complete = True
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        futures = {pool.submit(advance, run, scored, scale, deadline): run for run, scored in waiting.items()}
        try:
            for number, future in enumerate(as_completed(futures), 1):
                complete &= future.result()
                state = "done" if future.result() else "stopped, goes on next time"
                print(f"  {number}/{len(futures)}  {futures[future].folder.name}: {state}", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return complete


class _Rates:
    """Images a second of one core, from finished runs if there are any."""

    def __init__(self, runs: Iterable[Run] = ()) -> None:
        done = [run for run in runs if run.is_trained]
        rates = [images / seconds for run in done for images, seconds in [list(run.seconds().items())[-1]]]
        self.trained = statistics.median(rates) if rates else _TRAINED_PER_S
        self.forward = _FORWARD_PER_S * self.trained / _TRAINED_PER_S

    def minutes_to_train(self, run: Run, scale: Scale) -> float:
        """Remaining seconds of one core; 0 if it is done."""
        return 0.0 if run.is_trained else (_START_S + run.num_images(scale) / self.trained) / 60.0

    def minutes_to_measure(self, scored: Iterable[Scored], scale: Scale) -> float:
        """The same for scoring."""
        num_steps = [samplers(scale)[one.sampler]["num_steps"] for one in scored if not one.is_done]
        return sum(_LOAD_S + scale.num_masks * steps / self.forward for steps in num_steps) / 60.0


def print_plan(comparisons: Sequence[Comparison], jobs: int) -> None:
    """Print every run and its remaining minutes."""
    total = 0.0
    for comparison in comparisons:
        scale, (first, second) = comparison.scale, comparison.rounds()
        rates = _Rates([*first, *second])
        rows = [(run.folder.name, run, scored, rates.minutes_to_train(run, scale)) for run, scored in first.items()]
        for run, scored in second.items():
            is_known = comparison.best_paper() is not None
            # One of the candidates of the first round will be its first seed.
            left = rates.minutes_to_train(run, scale) if is_known or run.seed else 0.0
            rows.append((run.folder.name if is_known else f"the paper's best, {run.seed}", run, scored, left))
        print(f"\n{comparison.data.name}: {rates.trained:.1f} images a second and core")
        print(f"  {'run':<24}{'images':>8}{'left of it':>12}{'scored':>8}{'left of it':>12}   (core-minutes)")
        for name, run, scored, left in rows:
            to_measure = rates.minutes_to_measure(scored, scale)
            total += left + to_measure
            print(f"  {name:<24}{run.num_images(scale):>8,}{left:>12.1f}{len(scored):>8}{to_measure:>12.1f}")
    print(f"\nin all {total:.0f} core-minutes, about {total / jobs:.0f} minutes with {jobs} jobs")
    print("besides, once for each data set: slices and segmenter, 5 to 10 minutes")


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/recipes"), help="the comparison's folder")
    parser.add_argument("--archive", type=Path, help="an archive in AMOS' layout, compared on besides the phantom")
    parser.add_argument("--only", choices=("phantom", "archive"), help="one data set alone")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="where to write what was measured, with figures beside; OUT/recipes.json",
    )
    parser.add_argument("--quick", action="store_true", help="a tiny one, to see that it works, in OUT/quick")
    parser.add_argument("--dry-run", action="store_true", help="say what is left to do and how long it takes, and stop")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one core each")
    parser.add_argument("--budget-minutes", type=float, help="stop after so many minutes; the same command goes on")
    parser.add_argument("--seeds", type=int, default=3, help="of the paper's at its best and of ours")
    parser.add_argument("--ablation-seeds", type=int, default=1, help="of ours with one part changed; 0 leaves it out")
    parser.add_argument("--size", type=int, default=64, help="side of the slices")
    parser.add_argument("--images", type=int, default=Scale.num_images, help="of a training")
    parser.add_argument("--masks", type=int, default=Scale.num_masks, help="sampled at each point")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of every training")
    args = parser.parse_args(words)
    if args.only == "archive" and args.archive is None:
        parser.error("--only archive: name it with --archive PATH")
    if args.images % (8 * Scale.batch_size):
        parser.error(f"--images {args.images}: give a multiple of {8 * Scale.batch_size}")
    if not 0 <= args.ablation_seeds <= args.seeds:
        parser.error(f"--ablation-seeds {args.ablation_seeds}: give 0 to --seeds ({args.seeds})")
    return args


def main() -> int:
    args = parse()
    deadline = NEVER if args.budget_minutes is None else time.time() + 60 * args.budget_minutes
    scale = replace(Scale(), side=args.size, num_images=args.images, num_masks=args.masks, precision=args.precision)
    out, seeds, ablations = args.out.absolute(), args.seeds, ABLATIONS
    if args.quick:
        scale, out, seeds, ablations = QUICK, out / "quick", 1, ABLATIONS[:1]
    sets = {"phantom": None} if args.only != "archive" else {}
    if args.archive is not None and args.only != "phantom":
        sets["archive"] = args.archive.absolute()
    comparisons = {
        name: Comparison(out / name, scale, seeds, min(seeds, args.ablation_seeds), ablations) for name in sets
    }
    if args.dry_run:
        print_plan(list(comparisons.values()), args.jobs)
        return 0
    refuse_another_scale(out, scale)
    file, results = args.json or out / "recipes.json", {}
    for name, comparison in comparisons.items():
        print(f"{name}: slices and segmenter", flush=True)
        complete = make_data(comparison.data, sets[name], scale, args.jobs, deadline)
        for number in range(2):
            # The second round depends on what the first one found.
            complete = complete and work_off(comparison.rounds()[number], scale, args.jobs, deadline)
        rates = comparison.speeds(deadline) if complete else None
        if rates is None:
            print("time is up; the same command goes on from here")
            break
        result = results[name] = comparison.result(rates)
        print_result(name, result)
        draw(comparison, result, name, file)
        write_results(args, scale, results, file)
    return 0


def refuse_another_scale(out: Path, scale: Scale) -> None:
    """A comparison in the folder can only be continued with its own settings."""
    file, now = out / "scale.json", json.loads(json.dumps(describe(scale, samplers(scale))))
    if not file.is_file():
        write_atomic(file, json.dumps(now, indent=1) + "\n")
        return
    begun = json.loads(file.read_text())
    refuse(
        Problem(str(file), key, f"{old!r} there, {new!r} now", "use another --out, or that value")
        for key, old, new in differences(begun, now)
    )


def draw(comparison: Comparison, result: dict[str, Any], name: str, beside: Path) -> None:
    """The data set's two figures, beside the JSON file."""
    from data_shards.store.shards import ShardSet

    title = f"The paper's recipe and ours on {name} slices, {comparison.scale.side}x{comparison.scale.side}"
    draw_curves(result, title, beside.with_name(f"{beside.stem}-{name}.png"))
    num_labels = ShardSet.open([str(comparison.data / "shards")]).label_table.num_classes
    draw_gallery(comparison.gallery(), beside.with_name(f"{beside.stem}-{name}-gallery.png"), num_labels)


def write_results(args: argparse.Namespace, scale: Scale, results: dict[str, Any], file: Path) -> None:
    """The JSON file: the measurements and the machine."""
    record = stamp(args, without=("archive", "out")) | {"scale": describe(scale, samplers(scale)), "results": results}
    write(file, record)


if __name__ == "__main__":
    run_script(main)
