"""Short trainings of small nets that few_labels.py and cascade.py compare: their settings, FLOPs and table."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from segdiff_dist.evaluation.metrics.definitions import DEFINITIONS
from support.harness import headline, stamp, write

METRICS = (
    *("dice_either_mask_gen", "dice_mask_gen", "false_positive_rate_mask_gen", "dice_either_mask_real"),
    *("sharpness", "sharpness_75_100", "texture", "segmenter_frechet", "psnr_db"),
)


def stopped() -> int:
    print("time is up; the same command goes on from here")
    return 0


def shared_settings(args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """What all trainings share: net, process, optimiser, sampler, and the segmenter that measures their images."""
    return {
        "loader": {"axes": ["axial"], "num_threads": 1},
        "denoiser": {
            "block_out_channels": [16, 32, 64],
            "layers_per_block": 1,
            "attention_resolutions": [],
            "attention_head_dim": 16,
            "norm_num_groups": 8,
        },
        "diffusion": {"objective": "edm", "lognormal": [-0.4, 1.4]},
        "train": {
            "seed": args.seed,
            "global_batch_size": 16,
            "micro_batch_size": 16,
            "optimizer": "muon",
            "lr": 2e-3,
            "warmup_images": 320,
            "checkpoint_every_images": 1_600,
            "log_every_images": 160,
            "precision": "fp32",
        },
        "validation": {"num_pictures": 0, "num_images": 16},
        "sample": {
            "num": args.masks,
            "seed": args.seed,
            "num_workers": 1,
            "precision": "fp32",
            "sampler": {
                "solver": "dpm_solver_pp_2m",
                "num_steps": 12,
                "timestep_spacing": "karras",
                "clip_sample": False,
            },
        },
        "evaluate": {"num_workers": 1, "segmenter": str(out / "judge" / "segmenter" / "weights")},
        "tracking": {"enabled": False},
    }


def flops_of(settings: dict[str, Any]) -> float:
    """FLOPs of a training."""
    import torch

    from data_shards.store.shards import ShardSet
    from segdiff_dist.denoising.cascade import LowerStage
    from segdiff_dist.denoising.config import DenoiserConfig
    from segdiff_dist.denoising.frozen_base import Base
    from segdiff_dist.denoising.network_shapes import denoiser_network

    given = {k: tuple(v) if isinstance(v, list) else v for k, v in settings["denoiser"].items()}
    config, shards, run = DenoiserConfig(**given), ShardSet.open([settings["data"]]), Path(settings["run"])
    base, below = Base.find(config, run), Base.below(config, run)
    lower = None if below is None else LowerStage.open(below.folder)
    of_base = None if base is None else base.net
    net = denoiser_network(config, shards, shards.size, torch.device("cpu"), of_base, lower=lower)
    return float(net.flops_per_image) * settings["train"]["num_images"]


def write_table(
    args: argparse.Namespace, folders: Mapping[str, Path], flops: Mapping[str, float], file: Path, more: dict[str, Any]
) -> None:
    """Print the metrics of the run folders side by side with the FLOPs of their trainings, and write the JSON file."""
    summaries = {name: json.loads((run / "evaluation/summary.json").read_text()) for name, run in folders.items()}
    results = {
        name: {m: {k: s["metrics"][m].get(k) for k in ("value", "ci95")} for m in METRICS if m in s["metrics"]}
        for name, s in summaries.items()
    }
    record = stamp(args, without=("out",))
    print(headline(record))
    print(f"{'':<46}" + "".join(f"{name:>24}" for name in folders))
    for metric in METRICS:
        cells = [_cell(results[name].get(metric), DEFINITIONS[metric].digits) for name in folders]
        print(f"{DEFINITIONS[metric].label:<46}" + "".join(f"{one:>24}" for one in cells))
    print(f"{'TFLOPs of all trainings':<46}" + "".join(f"{flops[name] / 1e12:>24.1f}" for name in folders))
    first = next(iter(summaries.values()))
    record |= {name: first[name] for name in ("num_samples", "num_patients")} | more
    write(file, record | {"flops": dict(flops), "results": results})


def _cell(entry: dict[str, Any] | None, digits: int) -> str:
    if entry is None or entry["value"] is None:
        return "-"
    interval = entry["ci95"]
    return f"{entry['value']:.{digits}f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")
