"""Recipes compared, fairly: the paper's at its best against ours, over images seen and over seconds.

Both train the same small net on the same slices of CT and MR, with as many images, in the same precision, on one core
each; only what docs/recipes.md lists as a recipe's differs. The paper's takes its learning rate, and whether its
weights are averaged, from what is best on the validation split. At several points of training a fixed set of held-out
masks is sampled, and judged by a segmenter that was trained on the same training split: Dice over the organs of the
mask, Frechet distance of the segmenter's features, PSNR. Then ours with one part at a time as the paper has it.

A comparison lives in a folder (--out) and goes on where it was stopped: --budget-minutes stops it in time, --dry-run
says what is left. By default on a phantom; --archive adds an archive in AMOS' layout. Where its test split has no
labels, the validation split's masks are sampled, the ones that chose the paper's learning rate.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from _harness import commit, hardware, versions
from _recipes_figure import draw_curves, draw_gallery
from _recipes_measure import METRICS, Judged, measure
from _recipes_runs import (
    A_THIRD,
    ABLATIONS,
    AVERAGE,
    NEVER,
    ONLINE,
    OURS,
    QUICK,
    SAMPLED_OTHERWISE,
    Recipe,
    Run,
    Scale,
    describe,
    make_data,
    paper,
    samplers,
    train,
)
from _recipes_verdict import choose, over_seeds, told, verdict

# Until a run has said how fast it is: images trained and images taken through the net once, a second on one core of an
# AMD EPYC, for the net and size of Scale's defaults.
_TRAINED_PER_S, _FORWARD_PER_S = 15.0, 47.0
# Starting a training, and loading what a measurement needs.
_START_S = 20.0
_SEARCH_SPLIT = "val"

Work = dict[Run, list[Judged]]


class Comparison:
    """One data set's runs and what is measured of them."""

    def __init__(self, data: Path, scale: Scale, seeds: int, ablation_seeds: int, ablations: Sequence[Recipe]) -> None:
        self.data, self.scale, self.seeds = data, scale, range(seeds)
        self.ablation_seeds, self.ablations = range(ablation_seeds), ablations

    @property
    def split(self) -> str:
        """Whose masks are sampled: those of test, where they are published."""
        from data_shards.store.shards import ShardSet

        if not (self.data / "shards" / "index.json").is_file():
            return "test"
        return "test" if len(ShardSet.open([str(self.data / "shards")]).select(split="test")) else "val"

    def first_round(self) -> Work:
        """The paper's candidates, ours, and its ablations."""
        work: Work = {}
        for lr in self.scale.paper_lrs:
            run = self._run(paper(lr), 0)
            work[run] = [self._final(run, w, "paper", _SEARCH_SPLIT) for w in (AVERAGE, ONLINE)]
        for seed in self.seeds:
            work[self._run(OURS, seed)] = self.curve(OURS, seed)
        for recipe, seeds in ((A_THIRD, self.seeds), *((ablation, self.ablation_seeds) for ablation in self.ablations)):
            for seed in seeds:
                work[self._run(recipe, seed)] = [self._final(self._run(recipe, seed))]
        for seed in self.ablation_seeds:
            work[self._run(OURS, seed)] += self.sampled_otherwise(seed)
        return work

    def second_round(self) -> Work:
        """The paper at its best, with every seed. Until it is known, any candidate stands for it."""
        best = self.best_paper() or (self.scale.paper_lrs[-1], ONLINE)
        return {self._run(paper(best[0]), seed): self.paper_curve(best, seed) for seed in self.seeds}

    def search(self) -> dict[tuple[float, str], dict[str, Any]]:
        """What has been measured of the paper's candidates, by learning rate and weights."""
        found = {}
        for lr in self.scale.paper_lrs:
            for weights in (AVERAGE, ONLINE):
                judged = self._final(self._run(paper(lr), 0), weights, "paper", _SEARCH_SPLIT)
                if judged.is_done:
                    found[lr, weights] = judged.result()
        return found

    def best_paper(self) -> tuple[float, str] | None:
        """Learning rate and weights; None while candidates are missing."""
        search = self.search()
        if len(search) < 2 * len(self.scale.paper_lrs):
            return None
        best: tuple[float, str] = choose({k: {m: r[m]["value"] for m in METRICS} for k, r in search.items()})
        return best

    def curve(self, recipe: Recipe, seed: int) -> list[Judged]:
        """Our recipe's points, or another's."""
        run = self._run(recipe, seed)
        return [Judged(run, n, recipe.weights, recipe.sampler, self.split) for n in run.points(self.scale)]

    def paper_curve(self, best: tuple[float, str], seed: int) -> list[Judged]:
        """The paper's at its best."""
        return self.curve(replace(paper(best[0]), weights=best[1]), seed)

    def sampled_otherwise(self, seed: int) -> list[Judged]:
        """Our weights, sampled in other ways."""
        run = self._run(OURS, seed)
        return [self._final(run, weights, sampler) for _, _, weights, sampler in SAMPLED_OTHERWISE]

    def _run(self, recipe: Recipe, seed: int) -> Run:
        return Run(self.data, recipe, seed)

    def _final(self, run: Run, weights: str = "", sampler: str = "", split: str = "") -> Judged:
        recipe = run.recipe
        weights, sampler, split = weights or recipe.weights, sampler or recipe.sampler, split or self.split
        return Judged(run, run.num_images(self.scale), weights, sampler, split)

    def result(self) -> dict[str, Any] | None:
        """This data set's part of the JSON file; None while something is missing."""
        best = self.best_paper()
        if best is None or any(not judged.is_done for work in self.rounds() for judged in _all(work)):
            return None
        chosen = {"paper": [self.paper_curve(best, s) for s in self.seeds], "ours": self._curves(OURS)}
        chosen["a_third"] = self._curves(A_THIRD)
        label = f"the paper's, lr {best[0]:g}, {'averaged' if best[1] == AVERAGE else 'online'} weights"
        labels = {"paper": label, "ours": "ours", "a_third": A_THIRD.about}
        values = {k: [_values(curve) for curve in curves] for k, curves in chosen.items()}
        seconds = {k: [[c.run.seconds()[c.images] for c in curve] for curve in v] for k, v in chosen.items()}
        finals = [{m: v[m][-1] for m in METRICS} for v in values["a_third"]]
        found = verdict(self.scale.points, values["ours"], values["paper"], seconds["ours"], seconds["paper"], finals)
        return {
            "split": self.split,
            "num_masks": chosen["ours"][0][0].result()["num_masks"],
            "num_patients": chosen["ours"][0][0].result()["num_patients"],
            "real_dice": chosen["ours"][0][0].result()["real_dice"],
            "search": [{"lr": lr, "weights": w, **r} for (lr, w), r in self.search().items()],
            "best_paper": {"lr": best[0], "weights": best[1]},
            "curves": {
                name: {
                    "label": labels[name],
                    "images": [judged.images for judged in chosen[name][0]],
                    "seconds": [statistics.fmean(s) for s in zip(*seconds[name], strict=True)],
                    **{m: [over_seeds(v) for v in zip(*(c[m] for c in values[name]), strict=True)] for m in METRICS},
                }
                for name in chosen
            },
            "finals_over_patients": {name: chosen[name][0][-1].result() for name in ("paper", "ours")},
            "verdict": found,
            "ablations": self._ablations(),
        }

    def rounds(self) -> tuple[Work, Work]:
        """All there is to do, in order."""
        return self.first_round(), self.second_round()

    def _curves(self, recipe: Recipe) -> list[list[Judged]]:
        return [self.curve(recipe, seed) for seed in self.seeds]

    def _ablations(self) -> list[dict[str, Any]]:
        """A row each, ours first."""
        judged: list[tuple[str, str, list[Judged]]] = [(OURS.name, OURS.about, [])]
        judged[0][2].extend(self._final(self._run(OURS, seed)) for seed in self.ablation_seeds)
        for recipe in self.ablations:
            judged.append((recipe.name, recipe.about, [self._final(self._run(recipe, s)) for s in self.ablation_seeds]))
        for number, (name, about, _, _) in enumerate(SAMPLED_OTHERWISE):
            judged.append((name, about, [self.sampled_otherwise(seed)[number] for seed in self.ablation_seeds]))
        return [
            {
                "name": name,
                "about": about,
                **{m: over_seeds([j.result()[m]["value"] for j in finals]) for m in METRICS},
            }
            for name, about, finals in judged
        ]

    def gallery(self) -> list[tuple[str, Any]]:
        """Columns: mask, real slice, and both recipes' images along their training."""
        best = self.best_paper()
        assert best is not None
        paper_curve, our_curve = self.paper_curve(best, 0), self.curve(OURS, 0)
        shown = paper_curve[0].images_NHW()
        columns = [("mask", shown["mask"]), ("real", shown["real"])]
        for name, curve in (("paper", paper_curve), ("ours", our_curve)):
            columns += [(f"{name} {judged.images:,}", judged.images_NHW()["generated"]) for judged in curve]
        return columns


def _all(work: Work) -> Iterable[Judged]:
    return (judged for several in work.values() for judged in several)


def _values(curve: list[Judged]) -> dict[str, list[float]]:
    return {metric: [judged.result()[metric]["value"] for judged in curve] for metric in METRICS}


def advance(run: Run, judged: list[Judged], scale: Scale, deadline: float) -> bool:
    """Train a run and measure it; False where time ran out before all was done. Runs in a process of the pool."""
    os.environ["OMP_NUM_THREADS"] = "1"
    if not train(run, scale, deadline):
        return False
    for one in judged:
        if not one.is_done and time.time() >= deadline:
            return False
        measure(one, scale)
    return True


def work_off(work: Work, scale: Scale, jobs: int, deadline: float) -> bool:
    """Advance every run, `jobs` at a time; False where time ran out before all was done."""
    waiting = {run: judged for run, judged in work.items() if _left(run, judged, scale, _Rates()) > 0}
    if not waiting:
        return True
    context = multiprocessing.get_context("spawn")
    complete = True
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        futures = {pool.submit(advance, run, judged, scale, deadline): run for run, judged in waiting.items()}
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
    """Images a second of one core, from the runs that are done where there are any."""

    def __init__(self, runs: Iterable[Run] = ()) -> None:
        done = [run for run in runs if run.is_trained]
        rates = [images / seconds for run in done for images, seconds in [list(run.seconds().items())[-1]]]
        self.trained = statistics.median(rates) if rates else _TRAINED_PER_S
        self.forward = _FORWARD_PER_S * self.trained / _TRAINED_PER_S


def _left(run: Run, judged: list[Judged], scale: Scale, rates: _Rates) -> float:
    """Minutes of one core that a run and its measurements will still take."""
    seconds = 0.0 if run.is_trained else _START_S + run.num_images(scale) / rates.trained
    for one in judged:
        if not one.is_done:
            steps = samplers(scale)[one.sampler]["num_steps"]
            seconds += _START_S / 4 + scale.num_masks * steps / rates.forward
    return seconds / 60.0


def print_plan(comparisons: Sequence[Comparison], jobs: int) -> None:
    """Every run, and the minutes that are left of it."""
    total = 0.0
    for comparison in comparisons:
        rates = _Rates(run for work in comparison.rounds() for run in work)
        print(f"\n{comparison.data.name}: {rates.trained:.1f} images a second and core")
        print(f"  {'run':<28} {'images':>8} {'judged':>7} {'left, core-minutes':>19}")
        for number, work in enumerate(comparison.rounds()):
            for run, judged in work.items():
                is_candidate = number == 1 and comparison.best_paper() is None
                if is_candidate and run.seed == 0:
                    continue
                left = _left(run, judged, comparison.scale, rates)
                total += left
                name = f"paper-best-{run.seed}" if is_candidate else run.folder.name
                print(f"  {name:<28} {run.num_images(comparison.scale):>8,} {len(judged):>7} {left:>19.1f}")
    print(f"\nin all {total:.0f} core-minutes, about {total / jobs:.0f} minutes with {jobs} jobs")
    print("besides, once for each data set: slices and segmenter, 5 to 10 minutes")


def print_result(name: str, result: dict[str, Any]) -> None:
    """Tables of one data set."""
    print(f"\n{name}: {result['num_masks']} masks of {result['num_patients']} patients, split {result['split']}")
    print(f"real slices: Dice {result['real_dice']['value']:.3f}")
    best = result["best_paper"]
    print("\nthe paper's recipe, by learning rate and weights, on the validation split")
    for row in result["search"]:
        chosen = "  <- its best" if (row["lr"], row["weights"]) == (best["lr"], best["weights"]) else ""
        print(f"  {row['lr']:<8g} {row['weights']:<10}" + _cells(lambda m, row=row: row[m]["value"]) + chosen)
    print(f"\n{'':<46}{'Dice':>18}{'distance':>18}{'PSNR':>18}")
    for curve in ("paper", "ours", "a_third"):
        told_curve = result["curves"][curve]
        for i, images in enumerate(told_curve["images"]):
            label = f"{told_curve['label'][:34]:<36}{images:>8,}  "
            print(label + "".join(f"{_spread(told_curve[m][i]):>18}" for m in METRICS))
    print("\nours with one part changed")
    for row in result["ablations"]:
        print(f"  {row['about']:<64}" + _cells(lambda m, row=row: row[m]["mean"]))
    print()
    for line in told(result["verdict"]):
        print(line)


def _cells(value: Callable[[str], float]) -> str:
    return f"  Dice {value('dice'):.3f}  distance {value('distance'):8.3f}  PSNR {value('psnr_db'):5.2f} dB"


def _spread(value: dict[str, Any]) -> str:
    return f"{value['mean']:.3f} ±{(value['high'] - value['low']) / 2:.3f}"


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/recipes"), help="the comparison's folder")
    parser.add_argument("--archive", type=Path, help="an archive in AMOS' layout, compared on besides the phantom")
    parser.add_argument("--only", choices=("phantom", "archive"), help="one data set alone")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write what was measured to FILE; figures beside"
    )
    parser.add_argument("--quick", action="store_true", help="a tiny one, to see that it works, in OUT/quick")
    parser.add_argument("--dry-run", action="store_true", help="say what is left to do and how long it takes, and stop")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one core each")
    parser.add_argument("--budget-minutes", type=float, help="stop after so many minutes; the same command goes on")
    parser.add_argument("--seeds", type=int, default=3, help="of the paper's at its best and of ours")
    parser.add_argument("--ablation-seeds", type=int, default=1)
    parser.add_argument("--size", type=int, default=64, help="side of the slices")
    parser.add_argument("--images", type=int, default=Scale.num_images, help="of a training")
    parser.add_argument("--masks", type=int, default=Scale.num_masks, help="sampled at each point")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of every training")
    args = parser.parse_args(words)
    if args.only == "archive" and args.archive is None:
        parser.error("--only archive: name it with --archive PATH")
    if args.images % (8 * Scale.batch_size):
        parser.error(f"--images {args.images}: give a multiple of {8 * Scale.batch_size}")
    if not 1 <= args.ablation_seeds <= args.seeds:
        parser.error(f"--ablation-seeds {args.ablation_seeds}: give 1 to --seeds ({args.seeds})")
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
    results = {}
    for name, comparison in comparisons.items():
        print(f"{name}: slices and segmenter", flush=True)
        complete = make_data(comparison.data, sets[name], scale, args.jobs, deadline)
        for number in range(2):
            # The second round depends on what the first one found.
            complete = complete and work_off(comparison.rounds()[number], scale, args.jobs, deadline)
        result = comparison.result() if complete else None
        if result is None:
            print("time is up; the same command goes on from here")
            return 0
        results[name] = result
        print_result(name, result)
        draw(comparison, result, name, args.json or out / "recipes.json")
    write(args, scale, results, args.json or out / "recipes.json")
    return 0


def draw(comparison: Comparison, result: dict[str, Any], name: str, beside: Path) -> None:
    """The data set's two figures, beside the JSON file."""
    from data_shards.store.shards import ShardSet

    title = f"The paper's recipe and ours on {name} slices, {comparison.scale.side}x{comparison.scale.side}"
    draw_curves(result, title, beside.with_name(f"{beside.stem}-{name}.png"))
    num_labels = ShardSet.open([str(comparison.data / "shards")]).label_table.num_classes
    draw_gallery(comparison.gallery(), beside.with_name(f"{beside.stem}-{name}-gallery.png"), num_labels)


def write(args: argparse.Namespace, scale: Scale, results: dict[str, Any], file: Path) -> None:
    """The JSON file: what was measured, on what."""
    content = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware(),
        "versions": versions(),
        "commit": commit(),
        "arguments": {name: str(value) for name, value in vars(args).items() if name not in ("archive", "out", "json")},
        "scale": describe(scale, samplers(scale)),
        "results": results,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten to {file}", file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(main())
