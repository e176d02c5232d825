"""ControlNet with a tenth of the labels: a base without masks learns from all slices, the control from the labelled
ones.

    base            no masks, all slices
    controlnet      on the base; labels of a tenth of the patients
    concat          from nothing; labels of a tenth of the patients, as many images as base and control together
    concat-all      the same with all labels: what the labels are worth

Further arms regularise `concat`, against memorisation of the few slices: `dropout`; `augmented`, slices that are
mirrored, turned, zoomed and changed in contrast; `labelled`, the same with labels of what was done to each slice. With
--memorisation the images are also compared with the training slices.

All have the same net, optimiser and learning rate, and a training image costs each about the same FLOPs, which are
counted. `segdiff sample` and `segdiff evaluate` measure them on masks of patients that none has seen, by a segmenter
that was trained on all labels of the training split. A comparison is stored in a folder (--out) and continues where it
was stopped; --budget-minutes stops it in time.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from support.harness import run_script
from support.recipes_runs import NEVER, QUICK, Scale, make_data
from support.rewritten_shards import rewrite
from support.small_runs import flops_of, shared_settings, stage, stopped, write_table

from segdiff_dist.config import merge

if TYPE_CHECKING:
    from data_shards.records import SliceRecord
    from data_shards.store.shards import ShardSet

SCALE = Scale(side=32, segmenter_images=4_800, patients=(20, 2, 5), slice_stride=6)
# Name -> conditioning, whether it sees all labels, and its images as shares of those of base and control.
ARMS: dict[str, tuple[str, bool, tuple[float, float]]] = {
    "base": ("none", True, (1, 0)),
    "controlnet": ("controlnet", False, (0, 1)),
    "concat": ("concat", False, (1, 1)),
    "concat-all": ("concat", True, (1, 1)),
}
_AUGMENTED = {"loader": {"flip": True, "rotate_degrees": 10.0, "zoom": 0.15, "jitter_mr": 0.2}}
# Settings of the arms that regularise `concat`.
REGULARISED: dict[str, dict[str, Any]] = {
    "dropout": {"denoiser": {"dropout": 0.1}},
    "augmented": _AUGMENTED,
    "labelled": _AUGMENTED | {"denoiser": {"augmentation_labels": True}},
}
ARMS |= dict.fromkeys(REGULARISED, ARMS["concat"])


def main() -> int:
    args = parse()
    out = args.out.absolute()
    deadline = NEVER if args.budget_minutes is None else time.time() + 60 * args.budget_minutes
    scale = replace(QUICK, patients=(10, 1, 1)) if args.quick else SCALE
    if not make_data(out, None, scale, 1, deadline):
        return stopped()
    few = out / "few"
    if not (few / "index.json").is_file():
        rewrite(out / "shards", few, lambda shards: labelled_part(shards, args.patients))
    for name in args.arms:
        settings = settings_of(name, args, out)
        for work in ("train", "sample", "evaluate"):
            if work == "evaluate" and (out / name / "evaluation" / "summary.json").is_file():
                continue
            print(f"{name}: {work}", flush=True)
            if not stage(work, name, settings, out, deadline):
                return stopped()
    report(args, out, scale)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/few_labels"), help="the comparison's folder")
    parser.add_argument(
        "--arms", nargs="+", choices=ARMS, default=[*ARMS][:4], help="controlnet needs base; default: the first four"
    )
    parser.add_argument("--memorisation", action="store_true", help="compare the images with the training slices")
    parser.add_argument("--base-images", type=int, default=3_200, help="of the base's training")
    parser.add_argument("--control-images", type=int, default=1_600, help="of the control's training")
    parser.add_argument("--patients", type=int, default=2, help="with labels, of each modality, of 20")
    parser.add_argument("--masks", type=int, default=40, help="sampled of each")
    parser.add_argument("--seed", type=int, default=0, help="of trainings and sampling")
    parser.add_argument("--budget-minutes", type=float, help="stop after so many minutes; the same command goes on")
    parser.add_argument("--quick", action="store_true", help="a tiny one, to see that it works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write what was measured")
    args = parser.parse_args()
    if "controlnet" in args.arms and "base" not in args.arms:
        parser.error("--arms controlnet: it needs base; add it")
    args.arms = [name for name in ARMS if name in args.arms]  # base before controlnet
    return args


def labelled_part(shards: ShardSet, patients: int) -> Iterator[SliceRecord]:
    """The slices of the first `patients` training cases of each modality, and of all other splits."""
    case_N = np.array(shards.samples["case_id"].to_pylist())
    kept: set[str] = set()
    for modality in shards.modalities:
        kept |= set(sorted(set(case_N[shards.select(split="train", modalities=[modality])]))[:patients])
    training = set(shards.select(split="train").tolist())
    return (shards.read(row) for row in range(len(shards)) if row not in training or case_N[row] in kept)


def settings_of(name: str, args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """The config file of an arm."""
    conditioning, all_labels, (of_base, of_control) = ARMS[name]
    images = round(of_base * args.base_images + of_control * args.control_images)
    base = {"base": str(out / "base")} if conditioning == "controlnet" else {}
    own = {
        "data": str(out / ("shards" if all_labels else "few")),
        "run": str(out / name),
        "denoiser": {"conditioning": conditioning, **base},
        "train": {"num_images": images},
    }
    if args.memorisation:  # measured, and never a failure
        own["evaluate"] = {"memorisation": True, "most_memorised": 1.0}
    return merge(merge(shared_settings(args, out), own), REGULARISED.get(name, {}))


def report(args: argparse.Namespace, out: Path, scale: Scale) -> None:
    """Print the table, and write the JSON file."""
    flops = {name: flops_of(settings_of(name, args, out)) for name in args.arms}
    total = {name: value + (flops["base"] if name == "controlnet" else 0.0) for name, value in flops.items()}
    folders = {name: out / name for name in args.arms}
    more: dict[str, Any] = {"side": scale.side, "patients": scale.patients}
    if args.memorisation:
        more["memorisation"] = {name: memorised(folder) for name, folder in folders.items()}
        for name, found in more["memorisation"].items():
            print(f"{name}: {', '.join(f'{key} {value}' for key, value in found.items())}")
    write_table(args, folders, total, args.json or out / "few_labels.json", more)


def memorised(run: Path) -> dict[str, Any]:
    """The share of images that are suspects, that of real images of unseen patients (false alarms), and how much nearer
    to the training slices the generated ones are (docs/metrics.md)."""
    found = json.loads((run / "evaluation" / "summary.json").read_text())["trust"]["memorisation"]
    return {name: found.get(name) for name in ("memorised_share", "num_suspects", "false_alarms", "nearer")}


if __name__ == "__main__":
    run_script(main)
