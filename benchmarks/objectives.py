"""Training objectives compared by several metrics: Dice, sharpness, texture, precision, recall, PSNR.

launch/configs/amos_small.yaml on an archive in AMOS' layout: EDM with guidance and the efficient net, as shipped; and
the former net, for as many images, with x0 and zero terminal SNR, v with zero terminal SNR, and x0 with min-SNR's
weights. All use the same masks and one segmenter, which was trained on the same training split. `segdiff evaluate`
measures each; the results are a table, a JSON file and one picture of the same masks. With several seeds (training and
sampling) the table has mean and range; the picture and the intervals over patients are those of the first seed.

    OUT/shards, OUT/segmenter-run    what all of them share
    OUT/runs/NAME-SEED               a run folder each

Existing results are not made again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from support.harness import headline, run_script, stamp, write
from support.recipes_runs import segdiff
from support.small_runs import cell_of_seeds, draw_runs, over_seeds

from data_shards.files import write_atomic
from data_shards.records import MODALITIES
from segdiff_dist.config import merge, read_yaml, to_yaml
from segdiff_dist.evaluation.metrics.definitions import DEFINITIONS
from segdiff_dist.evaluation.metrics.sharpness import SHARPNESS_BANDS, sharpness_messages

_CONFIG = Path(__file__).parents[1] / "launch" / "configs" / "amos_small.yaml"


def _former(**diffusion: Any) -> dict[str, Any]:
    """What amos_small.yaml was before EDM and Muon, with this in its diffusion section."""
    ddpm = {"objective": "ddpm", "lognormal": [-1.2, 1.2], "mask_dropout": 0.0, "zero_terminal_snr": True}
    ddim = {"solver": "ddim", "num_steps": 25, "timestep_spacing": "trailing", "clip_sample": True}
    return {
        "denoiser": {"net": "unet", "block_out_channels": [16, 48, 96, 96], "layers_per_block": 1},
        "train": {"optimizer": "adamw"},
        "diffusion": {**ddpm, **diffusion},
        "sample": {"sampler": {**ddim, "guidance": 1.0, "guidance_interval": None}},
    }


OBJECTIVES: dict[str, tuple[str, dict[str, Any]]] = {
    "edm": ("EDM, guided, efficient net, Muon (shipped)", {}),
    "x0": ("x0, zero terminal SNR", _former(prediction_type="x0")),
    "v": ("v, zero terminal SNR", _former(prediction_type="v")),
    # min-SNR gives pure noise the weight 0, and with a zero terminal SNR sampling would begin at pure noise.
    "x0-min-snr": ("x0, min-SNR", _former(prediction_type="x0", zero_terminal_snr=False, loss_weighting="min_snr")),
}
METRICS = (
    *("dice_either_mask_real", "dice_either_mask_gen", "dice_mask_real", "dice_mask_gen", "false_positive_rate_gen"),
    *("sharpness", *SHARPNESS_BANDS, "texture"),
    *("segmenter_precision", "segmenter_recall", "segmenter_frechet", "psnr_db", "ssim"),
)


def settings_of(name: str, args: argparse.Namespace, seed: int = 0) -> dict[str, Any]:
    """The config file of a run."""
    over: dict[str, Any] = {
        "amos_root": str(args.archive.absolute()),
        "data": str(args.out.absolute() / "shards"),
        "run": str(args.out.absolute() / "runs" / f"{name}-{seed}"),
        "train": {"seed": seed},
        "sample": {"seed": seed} | ({"num": args.masks} if args.masks else {}),
        "evaluate": {"segmenter": str(_segmenter(args.out.absolute()))},
        "tracking": {"enabled": False},
    }
    settings = merge(merge(read_yaml(_CONFIG), OBJECTIVES[name][1]), over)
    return merge(settings, {"train": {"num_images": args.images}}) if args.images else settings


def make(args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Run every missing stage; returns summary.json of each seed by objective."""
    out, found = args.out.absolute(), {}
    for name in args.objectives:
        found[name] = [_make_run(name, seed, args, out) for seed in range(args.seeds)]
    return found


def _make_run(name: str, seed: int, args: argparse.Namespace, out: Path) -> dict[str, Any]:
    settings = settings_of(name, args, seed)
    run, config = Path(settings["run"]), out / f"{name}-{seed}.yaml"
    write_atomic(config, to_yaml(settings))
    shared = out / "segmenter.yaml"
    write_atomic(shared, to_yaml(merge(settings, {"run": str(_segmenter(out).parents[1])})))
    stages = {
        ("prepare", shared): out / "shards" / "index.json",
        ("train-segmenter", shared): _segmenter(out) / "segdiff.json",
        ("train", config): run / "weights" / "ema_0.05" / "segdiff.json",
        ("sample", config): run / "samples" / "items.parquet",
        ("evaluate", config): run / "evaluation" / "summary.json",
    }
    for (stage, file), product in stages.items():
        # Training and sampling themselves continue where they stopped.
        if not product.is_file() or stage in ("train", "sample"):
            print(f"{name}, seed {seed}: {stage}", flush=True)
            segdiff(stage, file, out / f"{name}-{seed}.log", threads=args.threads)
    summary: dict[str, Any] = json.loads((run / "evaluation" / "summary.json").read_text())
    return summary


def rows_of(summaries: dict[str, list[dict[str, Any]]], group: str) -> dict[str, dict[str, Any]]:
    """Entries of METRICS by objective; `group`: "all" or a modality."""
    return {name: over_seeds(of_seeds, METRICS, group) for name, of_seeds in summaries.items()}


def print_table(rows: dict[str, dict[str, Any]], group: str) -> None:
    """A row a metric, a column an objective, intervals over patients in brackets."""
    print(f"\n{group:<44}" + "".join(f"{name:>38}" for name in rows))
    for metric in METRICS:
        if any(metric in entries for entries in rows.values()):
            cells = [cell_of_seeds(entries.get(metric), DEFINITIONS[metric].digits) for entries in rows.values()]
            print(f"{DEFINITIONS[metric].label:<44}" + "".join(f"{cell:>38}" for cell in cells))


def _segmenter(out: Path) -> Path:
    return out / "segmenter-run" / "segmenter" / "weights"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archive", type=Path, required=True, help="an archive in AMOS' layout")
    parser.add_argument("--out", type=Path, default=Path("runs/objectives"), help="the comparison's folder")
    parser.add_argument("--images", type=int, help="of a training, in place of the config's")
    parser.add_argument("--masks", type=int, help="sampled of each, in place of the config's")
    parser.add_argument("--threads", type=int, default=1, help="of a training")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each objective, of seed 0, 1, ...")
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES), help="default: all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write what was measured; a picture beside")
    args = parser.parse_args()
    summaries = make(args)
    results = {group: rows_of(summaries, group) for group in ("all", *MODALITIES)}
    record = stamp(args, without=("archive", "out"))
    print(headline(record))
    for group, rows in results.items():
        print_table(rows, group)
    for name, of_seeds in summaries.items():
        print(f"{name}: {' '.join(sharpness_messages(of_seeds[0]['metrics']))}")
    file = args.json or args.out / "objectives.json"
    first = next(iter(summaries.values()))[0]
    counts = {name: first[name] for name in ("num_samples", "num_patients")}
    record |= counts | {
        "config": _CONFIG.name,
        "objectives": {name: {"label": OBJECTIVES[name][0], "over": OBJECTIVES[name][1]} for name in summaries},
        "results": results,
        "texture_by_organ": {
            name: {o: e["texture"]["value"] for o, e in of_seeds[0]["by_organ"].items() if "texture" in e}
            for name, of_seeds in summaries.items()
        },
    }
    write(file, record)
    runs = {OBJECTIVES[n][0].replace(" (shipped)", ""): args.out / "runs" / f"{n}-0" for n in args.objectives}
    draw_runs(runs, file.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    run_script(main)
