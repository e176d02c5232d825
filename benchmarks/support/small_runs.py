"""Short trainings of small nets that few_labels.py, cascade.py and models.py compare: settings, FLOPs, results."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.files import write_atomic
from segdiff_dist.config import to_yaml
from segdiff_dist.evaluation.metrics.definitions import DEFINITIONS
from support.harness import headline, stamp, write
from support.recipes_figure import draw_gallery
from support.recipes_runs import segdiff

METRICS = (
    *("dice_either_mask_gen", "dice_mask_gen", "false_positive_rate_mask_gen", "dice_either_mask_real"),
    *("sharpness", "sharpness_75_100", "texture", "segmenter_frechet", "psnr_db"),
)


def stopped() -> int:
    print("time is up; the same command goes on from here")
    return 0


def stage(work: str, name: str, settings: dict[str, Any], out: Path, deadline: float) -> bool:
    """`segdiff WORK` with these settings; False if it was stopped."""
    config = out / f"{name}.yaml"
    write_atomic(config, to_yaml(settings))
    return segdiff(work, config, out / f"{name}.log", deadline)


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
        "evaluate": {"num_workers": 1, "segmenter": str(out / "segmenter" / "segmenter" / "weights")},
        "tracking": {"enabled": False},
    }


def flops_of(settings: dict[str, Any]) -> float:
    """FLOPs of a training of a denoiser. What it begins from must be trained."""
    return float(network_of(settings).flops_per_image) * settings["train"]["num_images"]


def network_of(settings: dict[str, Any]) -> Any:
    """The denoiser of these settings, for planning."""
    import torch

    from data_shards.store.shards import ShardSet
    from segdiff_dist.denoising.cascade import LowerStage
    from segdiff_dist.denoising.config import DenoiserConfig, DiffusionConfig
    from segdiff_dist.denoising.frozen_base import Base
    from segdiff_dist.denoising.latent_space import LatentSpace
    from segdiff_dist.denoising.network_shapes import denoiser_network

    given = {k: tuple(v) if isinstance(v, list) else v for k, v in settings["denoiser"].items()}
    config, shards, run = DenoiserConfig(**given), ShardSet.open([settings["data"]]), Path(settings["run"])
    passes = DiffusionConfig(**settings.get("diffusion", {})).passes
    base, below = Base.find(config, run), Base.below(config, run)
    lower = None if below is None else LowerStage.open(below.folder)
    latent = LatentSpace.open(str(config.autoencoder)) if config.space == "latent" else None
    of_base = None if base is None else base.net
    cpu = torch.device("cpu")
    return denoiser_network(config, shards, shards.size, cpu, of_base, latent, passes, lower)


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


def over_seeds(summaries: Sequence[Mapping[str, Any]], metrics: Sequence[str], group: str = "all") -> dict[str, Any]:
    """Metrics of evaluations that differ in their seed, as far as all have them; `group`: "all" or a modality.

    `value` is the mean over seeds, `of_seeds` has their values; the interval over patients is that of the first seed.
    """
    groups = [s["metrics"] if group == "all" else s["by_modality"].get(group, {}) for s in summaries]
    found = {}
    for metric in (m for m in metrics if all(entries.get(m, {}).get("value") is not None for entries in groups)):
        values = [entries[metric]["value"] for entries in groups]
        kept = {k: groups[0][metric].get(k) for k in ("ci95", "n", "num_patients")}
        found[metric] = {"value": float(np.mean(values)), "of_seeds": values, **kept}
    return found


def cell_of_seeds(entry: Mapping[str, Any] | None, digits: int) -> str:
    """An entry of over_seeds: mean, smallest and largest seed, interval over patients."""
    if entry is None:
        return "-"
    interval, values = entry["ci95"], entry["of_seeds"]
    spread = f" {min(values):.{digits}f}-{max(values):.{digits}f}" if len(values) > 1 else ""
    return f"{entry['value']:.{digits}f}{spread}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")


def draw_runs(runs: Mapping[str, Path], file: Path, cell_inches: float = 1.7) -> None:
    """Masks, their real images, and the image of each evaluated run; chosen by rule: of each modality, by Dice (mask,
    pred. gen.) averaged over the runs, those at the quartiles."""
    from segdiff_dist.evaluation.report.comparison import shared_masks
    from segdiff_dist.evaluation.report.pictures import Pictures

    pictures = [Pictures.open(run) for run in runs.values()]
    first = pictures[0]
    chosen = [items for modality in first.modalities for items in shared_masks(pictures, modality)]
    columns = [("mask", np.stack([first.mask(items[0]) for items in chosen]))]
    columns += [("real", np.stack([first.real(items[0]) for items in chosen]))]
    for k, name in enumerate(runs):
        columns.append((name, np.stack([pictures[k].generated(items[k]) for items in chosen])))
    draw_gallery(columns, file, first.label_table.num_classes, cell_inches)
