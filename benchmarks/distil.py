"""Students of `segdiff distil` beside their teacher: quality with the same masks and noise, and seconds an image.

Each contender is a run folder, sampled as its config.yaml says; the teacher also by the preset `fast`. All are measured
by the teacher's segmenter through `segdiff evaluate`: Dice (false organs count), sharpness, power in the finest band,
distance of the segmenter's features, with intervals over patients. Seconds are measured in turns, on one thread.

    OMP_NUM_THREADS=1 python benchmarks/distil.py --teacher runs/demo/run --students runs/s4 runs/s2 runs/s1
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from support.harness import Contender, arguments, headline, measure, stamp, write

from segdiff_dist.cli import main as segdiff
from segdiff_dist.denoising.samplers import num_evaluations
from segdiff_dist.experiment import load_experiment
from segdiff_dist.painting.model import open_model
from segdiff_dist.pipeline import SegGuidedPipeline
from segdiff_dist.sampling.store import SampleStore

FIGURES = (
    "dice_either_mask_gen",
    "segmenter_frechet",
    "sharpness",
    "sharpness_75_100",
    "psnr_db",
)
_AT_ONCE = 4


def parsed_arguments() -> Namespace:
    """The command line."""
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--teacher", type=Path, default=Path("runs/demo/run"), help="a run with denoiser and segmenter")
    parser.add_argument("--students", type=Path, nargs="+", required=True, help="runs of `segdiff distil`")
    parser.add_argument("--split", default="test", choices=("val", "test"))
    parser.add_argument("--num", type=int, default=48, help="masks")
    parser.add_argument("--out", type=Path, default=Path("runs/distilled"), help="where images and figures are kept")
    parser.add_argument("--figure", type=Path, metavar="PNG", help="draw some masks' images, a row each")
    return parser.parse_args()


def contenders_of(args: Namespace) -> dict[str, tuple[Path, tuple[str, ...]]]:
    """By name: the run, and the flags that change its sampler."""
    plain = ("--sample.sampler.solver", "None", "--sample.sampler.num-steps", "None")
    plain += ("--sample.sampler.timestep-spacing", "None", "--sample.sampler.preset", "fast")
    teacher = load_experiment(None, args.teacher).sample.sampler
    found = {
        f"teacher, {teacher.num_steps} steps": (args.teacher, ()),
        "teacher, fast": (args.teacher, plain),
        "teacher, 4 steps": (args.teacher, ("--sample.sampler.num-steps", "4")),
    }
    for run in args.students:
        steps = load_experiment(None, run).sample.sampler.num_steps
        found[f"student, {steps} step{'s' if steps != 1 else ''}"] = (run, ())
    return found


def sample_and_evaluate(args: Namespace, name: str, run: Path, flags: tuple[str, ...]) -> Path:
    """A copy of the run's weights and settings with images and evaluation in it; what is done is not done again."""
    place = args.out / name.replace(", ", "-").replace(" ", "-")
    if not (place / "weights").is_dir():
        place.mkdir(parents=True, exist_ok=True)
        shutil.copytree(run / "weights", place / "weights")
        shutil.copyfile(run / "config.yaml", place / "config.yaml")
    if not (place / "evaluation" / "summary.json").is_file():
        more = ("--num", str(args.num), "--sample.samples-per-mask", "1", "--sample.cross-modality-masks", "0")
        more += ("--split", args.split, "--sample.num-workers", "1", "--tracking.no-enabled")
        measured_by = (
            "--evaluate.segmenter",
            str(args.teacher / "segmenter" / "weights"),
            "--evaluate.num-workers",
            "1",
        )
        if segdiff(["sample", "--run", str(place), *more, *flags]) != 0:
            raise SystemExit(f"{name}: sampling failed")
        if segdiff(["evaluate", "--run", str(place), *measured_by, "--tracking.no-enabled"]) != 0:
            raise SystemExit(f"{name}: evaluation failed")
    return place


def row_of(name: str, place: Path) -> dict[str, Any]:
    """The figures of one contender."""
    metrics = json.loads((place / "evaluation" / "summary.json").read_text())["metrics"]
    pipeline = pipeline_of(place)
    passes = num_evaluations(pipeline.sampler, pipeline.diffusion)
    row: dict[str, Any] = {"name": name, "passes": passes}
    return row | {key: {k: metrics[key][k] for k in ("value", "ci95", "n")} for key in FIGURES if key in metrics}


def pipeline_of(place: Path) -> SegGuidedPipeline:
    """What makes a run's images, as its samples were made."""
    model = open_model(place, device="cpu")
    return model.pipeline


def seconds(places: dict[str, Path], rounds: int) -> Any:
    """Images a second of each contender, in turns."""

    def contender(place: Path) -> Contender:
        pipeline, masks = pipeline_of(place), SampleStore.open(place / "samples").mask[:_AT_ONCE]

        def work() -> tuple[float, float]:
            began = time.perf_counter()
            pipeline.generate(np.asarray(masks), list(range(_AT_ONCE)), pipeline.model.trained_on[0], "axial", 0)
            return _AT_ONCE, time.perf_counter() - began

        return work

    return measure({name: contender(place) for name, place in places.items()}, rounds)


def draw(places: dict[str, Path], file: Path, num: int = 6) -> None:
    """A row for each contender, over a row of masks; columns are some masks."""
    stores = [SampleStore.open(place / "samples") for place in places.values()]
    chosen = np.linspace(0, len(stores[0].items) - 1, num).round().astype(int)
    mask = np.asarray(stores[0].mask[:])[chosen]
    rows = [mask * (255 // max(1, int(mask.max()))), *(np.asarray(store.image[:])[chosen] for store in stores)]
    sheet = np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0).astype(np.uint8)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).resize((sheet.shape[1] * 2, sheet.shape[0] * 2), Image.Resampling.NEAREST).save(file)


def main() -> int:
    args = parsed_arguments()
    torch.set_num_threads(1)
    args.num = 8 if args.quick else args.num
    result = stamp(args)
    places = {name: sample_and_evaluate(args, name, *how) for name, how in contenders_of(args).items()}
    rows = [row_of(name, place) for name, place in places.items()]
    rates = seconds(places, 1 if args.quick else args.rounds)
    for row in rows:
        row["images_per_s"] = rates[row["name"]].to_json()
        shown = "  ".join(f"{key} {row[key]['value']:.3f}" for key in FIGURES if key in row)
        print(f"{row['name']:<20} {row['passes']:>3} passes  {shown}  {rates[row['name']]}", flush=True)
    print(f"\n{headline(result)}")
    if args.figure is not None:
        draw(places, args.figure)
    write(args.json, result | {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
