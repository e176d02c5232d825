"""Evaluation: triples (mask, real, generated) a second on one and two workers, its scaling, and its limits.

256x256, all metrics except those of Inception, LPIPS and radiomics; surface Dice is timed separately. The figures and
the report are not drawn. A rate includes everything from opening the run to summary.json, except the start of Ray.

--against CHECKOUT compares with the code of another checkout instead: one evaluation of --triples by each, in a process
of its own, cut into --rounds pieces that take turns. The rate is of CPU time on one thread.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import truediv
from pathlib import Path
from typing import Any

import numpy as np
from support.evaluate_data import forget_evaluation, write_samples, write_segmenter, write_shards
from support.harness import Contender, arguments, compare, measure, report
from support.other_code import answers_of, revision

from data_shards.fan_out import ray_session
from data_shards.labels import AMOS
from segdiff_dist.evaluation.measure.config import EvaluateConfig
from segdiff_dist.evaluation.measure.job import measure as evaluate
from segdiff_dist.evaluation.metrics import feature_sets, frechet, overlaps, similarity, surfaces

_LIMIT_MINUTES, _LIMIT_TRIPLES = 15, 10_000


def with_workers(run: Path, num: int, num_workers: int, peaks: dict[str, int], *, surface: bool = False) -> Contender:
    """Times the evaluation of `num` triples, and notes the driver's highest memory."""

    def turn() -> tuple[float, float]:
        forget_evaluation(run)
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")  # reset the peak
        before, start = _resident("VmRSS"), time.perf_counter()
        summary = evaluate(
            run, EvaluateConfig(num_workers=num_workers, surface_dice=surface, device="cpu"), progress=False
        )
        seconds = time.perf_counter() - start
        assert summary["num_samples"] == num
        peaks[f"{num:,} triples"] = round((_resident("VmHWM") - before) / 2**20)
        return num, seconds

    return turn


def against_other_code(args: argparse.Namespace, folder: Path) -> None:
    """Rates of this code and of that of args.against, and their ratio: one evaluation each, in pieces and in turns."""
    num, rounds = (256, 2) if args.quick else (args.triples, args.rounds)
    run = folder / f"run-{args.size}-{num}"
    write_segmenter(run / "segmenter" / "weights")
    write_samples(run, write_shards(folder / f"shards-{args.size}", args.size), num)
    ours, theirs = "this code", f"code of {revision(args.against)}"
    script = Path(__file__).parent / "support" / "evaluate_once.py"
    with (
        answers_of(script, Path(__file__).resolve().parents[1], run) as ask_ours,
        answers_of(script, args.against.resolve(), run) as ask_theirs,
    ):
        asked = {ours: ask_ours, theirs: ask_theirs}
        stop = time.monotonic() + 60 * args.minutes
        contenders = {name: _pieces(ask, num, rounds) for name, ask in asked.items()}
        rates = measure(contenders, rounds, goes_on=lambda: time.monotonic() < stop)
        summary_s = {name: ask("summary") for name, ask in asked.items()}
    sizes = _sizes(num, rounds)[: len(rates[ours].rounds)]
    tasks_s = {name: sum(map(truediv, sizes, rates[name].rounds)) for name in asked}
    seconds = {name: round(tasks_s[name] + summary_s[name], 1) for name in asked}
    notes = {
        "triples": f"{sum(sizes):,} of {num:,}",
        "CPU s of the summary": {name: round(value, 1) for name, value in summary_s.items()},
        "CPU s of all": seconds,
        "all: this code is as fast as the other, times": round(seconds[theirs] / seconds[ours], 3),
    }
    report(args, rates, [compare(rates, ours, theirs, 1.0)], unit="triples a CPU second, by piece", notes=notes)


def _pieces(ask: Callable[[object], float], num: int, rounds: int) -> Contender:
    """Each turn evaluates the next piece of `num` triples: (its triples, its CPU seconds)."""
    sizes = iter(_sizes(num, rounds))

    def turn() -> tuple[float, float]:
        size = next(sizes)
        return size, ask(size)

    return turn


def _sizes(num: int, pieces: int) -> list[int]:
    return [num * (piece + 1) // pieces - num * piece // pieces for piece in range(pieces)]


def where_the_time_goes(run: Path) -> dict[str, float]:
    """Milliseconds a triple of each step on one thread, in batches of 16."""
    import torch

    from segdiff_dist.sampling.store import SampleStore
    from segdiff_dist.segmentation.segmenter import Segmenter

    torch.set_num_threads(1)
    store, segmenter = SampleStore.open(run / "samples"), Segmenter.load(run / "segmenter" / "weights")
    images, masks = np.asarray(store.image[:16]), np.asarray(store.mask[:16])
    real, modality = torch.from_numpy(images), torch.zeros(16, dtype=torch.int64)
    fake = torch.from_numpy(np.roll(images, 1, 0))
    moved, organs = np.roll(masks, 2, 1), AMOS.organ_ids
    tolerance_mm = list(surfaces.tolerances_mm(AMOS).values())

    def all_surfaces() -> None:
        for mask_HW, moved_HW in zip(masks, moved, strict=True):
            surfaces.surface_dice(mask_HW, moved_HW, organs, tolerance_mm, (1.5, 1.5))

    steps: dict[str, tuple[int, Callable[[], Any]]] = {
        "read image and mask": (1, lambda: (store.image[:16], store.mask[:16])),
        "segmenter, labels and features": (2, lambda: segmenter.predict_and_features(real, modality)),
        "SSIM and MS-SSIM": (1, lambda: similarity.ssim_and_ms_ssim(real, fake)),
        "PSNR": (1, lambda: similarity.psnr_db(real, fake)),
        "overlaps": (3, lambda: overlaps.dice_per_class(overlaps.confusion(masks, moved, AMOS.num_classes))),
        "surface Dice (not in the rates)": (3, all_surfaces),
    }
    return {name: round(times * _best_ms(step) / 16, 2) for name, (times, step) in steps.items()}


def distances_seconds(num: int) -> dict[str, float]:
    """Seconds of the driver for one group's distances on `num` images a side, 1008 features."""
    real, gen = np.random.default_rng(0).normal(size=(2, num, 1008)).astype(np.float32)
    first, second = (frechet.FeatureStatistics.of(side) for side in (real, gen))
    steps = {
        "Frechet": lambda: frechet.frechet_distance(first, second),
        "kernel": lambda: feature_sets.kernel_distance(real, gen),
        "neighbourhoods": lambda: feature_sets.neighbourhoods(real, gen),
    }
    return {name: round(_best_ms(step, repeats=1) / 1000, 2) for name, step in steps.items()}


def _best_ms(step: Callable[[], Any], repeats: int = 5) -> float:
    times = []
    for _ in range(repeats + (repeats > 1)):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


def _resident(which: str) -> int:
    with open("/proc/self/status", encoding="ascii") as status:
        values = dict(line.split(":", 1) for line in status)
    return int(values[which].split()[0]) * 1024


@contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    folder = given or Path(tempfile.mkdtemp(prefix="bench-evaluate-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder.resolve()
    finally:
        if given is None:
            shutil.rmtree(folder)


def main() -> None:
    parser = arguments(__doc__, rounds=1)
    parser.add_argument("--data", type=Path, help="folder that keeps the triples (1 GB); a temporary one if left out")
    parser.add_argument("--size", type=int, default=256, help="pixels a side; 176 at least, for MS-SSIM")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="compare with the code of this checkout")
    parser.add_argument("--triples", type=int, default=_LIMIT_TRIPLES, help="with --against: how many are evaluated")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="with --against: no new round after these")
    args = parser.parse_args()
    if args.against is not None:
        with _folder(args.data) as folder:
            return against_other_code(args, folder)
    sizes = (64, 128, 256) if args.quick else (1_250, 2_500, _LIMIT_TRIPLES)
    with _folder(args.data) as folder, ray_session(num_cpus=max(2, os.cpu_count() or 1)):
        shards = write_shards(folder / f"shards-{args.size}", args.size)
        runs = {num: folder / f"run-{args.size}-{num}" for num in sizes}
        for num, run in runs.items():
            print(f"{num:,} triples in {run}", flush=True)
            write_segmenter(run / "segmenter" / "weights")
            write_samples(run, shards, num)
        small, middle, large = sizes
        peaks: dict[str, int] = {}
        contenders = {f"{num:,} triples, 2 workers": with_workers(runs[num], num, 2, peaks) for num in sizes}
        contenders[f"{large:,} triples, 1 worker"] = with_workers(runs[large], large, 1, peaks)
        contenders[f"{small:,} triples, 2 workers, with surface Dice"] = with_workers(
            runs[small], small, 2, peaks, surface=True
        )
        rates = measure(contenders, 1 if args.quick else args.rounds)
        notes = {
            "ms a triple on one thread": where_the_time_goes(runs[small]),
            "s a group for distances": distances_seconds(500 if args.quick else 5_000),
            "driver's peak above its start, MiB": dict(peaks),
        }
    of_all = rates[f"{large:,} triples, 2 workers"]
    minutes = _LIMIT_TRIPLES / of_all.median / 60
    source = "measured" if large == _LIMIT_TRIPLES else f"extrapolated from {large:,}"
    result = "within" if minutes <= _LIMIT_MINUTES else "NOT within"
    notes["10,000 triples on 2 workers"] = f"{minutes:.1f} minutes ({source}), {result} {_LIMIT_MINUTES}"
    ratios = [
        compare(rates, f"{large:,} triples, 2 workers", f"{large:,} triples, 1 worker", 1.8),
        # Linear: the rate of many equals that of fewer, or is higher because work that is done once weighs more on the
        # fewer.
        compare(rates, f"{large:,} triples, 2 workers", f"{middle:,} triples, 2 workers", 0.95),
    ]
    report(args, rates, ratios, unit="triples a second", notes=notes)


if __name__ == "__main__":
    main()
