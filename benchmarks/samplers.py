"""The fewest steps with which each solver is as good as 50 of DDIM, on held-out masks and a trained run.

Each mask is sampled with the same noise by every solver, at several numbers of steps, and scored by the run's
segmenter. As good: Dice(mask, prediction on generated) at most 0.005 below that of 50 DDIM steps, the Frechet distance
of the segmenter's features at most 3 % above, and `sharpness` at most 0.02 below: fewer steps may blur, which Dice does
not detect. The fewest steps of each solver that are as good are then timed in turns with DDIM's 50. Guidance and all
else that is neither solver, steps, their spacing nor sigma_shift is that of the run's sampler, unless it is given here.
Measurements are kept in --out; the same command continues.

    OMP_NUM_THREADS=1 python benchmarks/samplers.py --run runs/demo/run --figure runs/samplers/samplers.png
"""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from support.harness import Contender, arguments, compare, headline, measure, stamp, write
from support.samplers_figure import draw
from support.samplers_measure import Scored, Scorer

from data_shards.problems import InputProblems
from segdiff_dist.denoising.config import DiffusionConfig
from segdiff_dist.denoising.sampler_config import PRESETS, SamplerConfig
from segdiff_dist.denoising.samplers import num_evaluations

DICE_MARGIN, DISTANCE_MARGIN, SHARPNESS_MARGIN = 0.005, 0.03, 0.02
# Speed of the preset `fast`, against 50 DDIM steps.
TARGET = 4.0
STEPS = {
    "ddim": (8, 10, 12, 16, 25),
    "dpm_solver_pp_2m": (5, 6, 8, 10, 12, 16),
    "unipc": (5, 6, 8, 10, 12, 16),
    "heun": (4, 5, 6, 8),
}
_QUICK_STEPS = dict.fromkeys(STEPS, (4,))


def shared_settings(args: Namespace, scorer: Scorer) -> SamplerConfig:
    """What all samplers share; preset, solver and steps are left out."""
    given = {
        name: value for name in ("guidance", "guidance_interval") if (value := getattr(args, name, None)) is not None
    }
    if "guidance_interval" in given:
        given["guidance_interval"] = tuple(given["guidance_interval"])
    free = {"preset": "paper", "solver": None, "num_steps": None, "timestep_spacing": None, "sigma_shift": 1.0}
    return replace(scorer.own_sampler, **free, **given)  # type: ignore[arg-type]


def reference_of(shared: SamplerConfig, diffusion: DiffusionConfig) -> SamplerConfig:
    """50 DDIM steps as in the paper; trailing if the net was trained to start at pure noise."""
    own = replace(shared, timestep_spacing="trailing") if diffusion.zero_terminal_snr else shared
    return own.resolved(diffusion.objective)


def spacing_of(diffusion: DiffusionConfig) -> Any:
    """The spacing of fewer steps."""
    return "karras" if diffusion.objective == "edm" else "trailing"


def is_as_good(scored: Scored, reference: Scored) -> bool:
    """Within the margins, or better."""
    return (
        scored.dice >= reference.dice - DICE_MARGIN
        and scored.distance <= reference.distance * (1 + DISTANCE_MARGIN)
        and scored.sharpness >= reference.sharpness - SHARPNESS_MARGIN
    )


def limits_of(reference: Scored) -> dict[str, float]:
    """What a sampler must reach to be as good."""
    return {
        "dice": reference.dice - DICE_MARGIN,
        "distance": reference.distance * (1 + DISTANCE_MARGIN),
        "sharpness": reference.sharpness - SHARPNESS_MARGIN,
    }


def row_of(scorer: Scorer, scored: Scored, reference: Scored) -> dict[str, Any]:
    """The row of one sampler in the table and in the JSON."""
    difference = scorer.difference(scored, reference)
    return {
        "solver": scored.sampler.solver,
        "num_steps": scored.sampler.num_steps,
        "timestep_spacing": scored.sampler.timestep_spacing,
        "sigma_shift": scored.sampler.sigma_shift,
        "evaluations": scored.evaluations,
        "dice": scored.dice,
        "dice_difference": difference.value,
        "dice_difference_ci95": difference.interval,
        "distance": scored.distance,
        "distance_ratio": scored.distance / reference.distance,
        "distance_by_noise": scored.distance_by_noise,
        "sharpness": scored.sharpness,
        "power_ratio": scored.power_ratio_F.tolist(),
        "is_as_good": is_as_good(scored, reference),
    }


def tried(args: Namespace, shared: SamplerConfig, diffusion: DiffusionConfig) -> Iterator[SamplerConfig]:
    """Every solver with every number of its steps and every shift."""
    for solver, steps in (_QUICK_STEPS if args.quick else STEPS).items():
        for shift in args.shifts if solver in args.solvers else ():
            for num_steps in args.steps or steps:
                spacing = spacing_of(diffusion)
                own = {"solver": solver, "num_steps": num_steps, "timestep_spacing": spacing, "sigma_shift": shift}
                yield replace(shared, **own)


def row_key(row: dict[str, Any]) -> tuple[Any, ...]:
    """The settings in which a row's sampler differs from the others."""
    return row["solver"], row["num_steps"], row["sigma_shift"]


def fewest(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any] | None]:
    """For each solver the row with the fewest evaluations that is as good; None if there is none."""
    found: dict[str, dict[str, Any] | None] = {}
    for solver in STEPS:
        good = [row for row in rows if row["solver"] == solver and row["is_as_good"]]
        found[solver] = min(good, key=lambda row: row["evaluations"], default=None)
    return found


_HEADER = (
    f"{'solver':<17} {'steps':>5} {'shift':>5} {'evaluations':>11} {'Dice':>8} {'less ref':>8} {'95 %':<19} "
    f"{'distance':>8} {'/ ref':>7} {'sharpness':>9} {'finest':>7} {'as good':>7}"
)


def row_text(row: dict[str, Any]) -> str:
    """A line of the table."""
    interval = row["dice_difference_ci95"]
    interval_text = "" if interval is None else f"[{interval[0]:+.4f}, {interval[1]:+.4f}]"
    return (
        f"{row['solver']:<17} {row['num_steps']:>5} {row['sigma_shift']:>5g} "
        f"{row['evaluations']:>11} {row['dice']:>8.4f} "
        f"{row['dice_difference']:>+8.4f} {interval_text:<19} {row['distance']:>8.4f} {row['distance_ratio']:>7.3f} "
        f"{row['sharpness']:>9.3f} {row['power_ratio'][-1]:>7.3f} {'yes' if row['is_as_good'] else 'no':>7}"
    )


def time_in_turns(scorer: Scorer, contenders: dict[str, SamplerConfig], rounds: int) -> Any:
    """Images a second of each sampler, on one batch, in turns."""
    batch = scorer.items[:16]

    def contender(sampler: SamplerConfig) -> Contender:
        def work() -> tuple[float, float]:
            began = time.perf_counter()
            scorer.sample(sampler, batch, noise=0)
            return len(batch), time.perf_counter() - began

        return work

    return measure({name: contender(sampler) for name, sampler in contenders.items()}, rounds)


def parsed_arguments() -> Namespace:
    """The command line."""
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--run", type=Path, default=Path("runs/demo/run"), help="a run with denoiser and segmenter")
    parser.add_argument("--split", default="test", choices=("val", "test"))
    parser.add_argument("--num", type=int, help="masks; all of the split where this is left out")
    parser.add_argument("--noises", type=int, default=2, help="images of each mask")
    parser.add_argument("--data", type=Path, help="slices in place of the run's own, with its label table")
    parser.add_argument("--guidance", type=float, help="default: the run's")
    parser.add_argument("--guidance-interval", nargs=2, type=float, metavar=("FROM", "TO"), help="default: the run's")
    parser.add_argument("--shifts", nargs="+", type=float, default=[1.0], help="values of sigma_shift to try")
    parser.add_argument("--solvers", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--steps", nargs="+", type=int, help="numbers of steps, in place of the usual ones")
    parser.add_argument("--out", type=Path, default=Path("runs/samplers"), help="where measurements are kept")
    parser.add_argument("--figure", type=Path, metavar="PNG", help="draw Dice and distance over evaluations")
    return parser.parse_args()


def main() -> int:
    args = parsed_arguments()
    torch.set_num_threads(1)
    num, noises, rounds = (8, 1, 1) if args.quick else (args.num, args.noises, args.rounds)
    try:
        scorer = Scorer(args.run, args.split, num, noises, args.out, args.data)
    except InputProblems as error:
        print("\n".join(str(problem) for problem in error.problems), file=sys.stderr)
        return 2
    result = stamp(args)
    shared = shared_settings(args, scorer)
    reference_config = reference_of(shared, scorer.diffusion)
    reference = scorer.score(reference_config)
    rows = [row_of(scorer, reference, reference)]
    print(f"\n{_HEADER}\n{row_text(rows[0])}", flush=True)
    samplers = {}
    for sampler in tried(args, shared, scorer.diffusion):
        rows.append(row_of(scorer, scorer.score(sampler), reference))
        samplers[row_key(rows[-1])] = sampler
        print(row_text(rows[-1]), flush=True)

    chosen, fast = fewest(rows), replace(shared, preset="fast")
    contenders = {"DDIM, 50 steps": reference_config, "preset fast": fast}
    for solver, row in chosen.items():
        if row is not None:
            contenders[f"{solver}, {row['num_steps']} steps"] = samplers.get(row_key(row), reference_config)
    rates = time_in_turns(scorer, contenders, rounds)
    first, *others = contenders
    ratios = [compare(rates, name, first, TARGET if name == "preset fast" else None) for name in others]
    by_evaluations = num_evaluations(reference_config, scorer.diffusion) / num_evaluations(fast, scorer.diffusion)
    limits = limits_of(reference)
    result |= {
        "measured_on": scorer.measured_on,
        "margins": {"dice": DICE_MARGIN, "distance": DISTANCE_MARGIN, "sharpness": SHARPNESS_MARGIN},
        "shared": asdict(shared),
        "limits": limits,
        "rows": rows,
        "fewest": chosen,
        "preset_fast": PRESETS["fast"],
        "preset_fast_by_evaluations": by_evaluations,
        "images_per_s": {name: spread.to_json() for name, spread in rates.items()},
        "ratios": [{"name": r.name, "against": r.against, "target": r.target, **r.spread.to_json()} for r in ratios],
    }
    print(f"\n{headline(result)}\n")
    for solver, row in chosen.items():
        print(f"{solver}: {'none as good' if row is None else row_text(row)}")
    print(f"preset fast: {by_evaluations:.1f} times fewer evaluations than 50 DDIM steps")
    for ratio in ratios:
        print(ratio)
    if args.figure is not None:
        repeated = f", {noises} times" if noises > 1 else ""
        title = f"{scorer.measured_on['num_masks']} held-out masks{repeated}; dashed: as good as 50 DDIM steps"
        draw(rows, limits, title, args.figure)
    write(args.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
