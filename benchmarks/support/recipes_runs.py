"""The trainings of benchmarks/recipes.py: data sets, the scoring segmenter, recipes as settings, and a run of one
recipe.

    OUT/DATA/shards, shards_without_body      the slices; the same with masks that do not say where the patient ends
    OUT/DATA/segmenter                        the segmenter's run
    OUT/DATA/runs/RECIPE-SEED/config.yaml     a run's settings, for `segdiff train`
                              weights/IMAGES/AVERAGE    its weights at some points of its training
                              seconds.json              how long its steps took up to these points
                              measured/                 see recipes_measure.py

Existing results are not made again, so a comparison may be stopped and started at any time.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.files import write_atomic
from segdiff_dist.config import merge, to_yaml
from support.rewritten_shards import forget_body

Settings = dict[str, Any]

# Parts of a training at which it is scored.
POINTS = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)
AVERAGE, ONLINE = "ema_0.05", "online"
# The comparison's deadline: runs stop then at a point from which they can continue.
NEVER = float("inf")


@dataclass(frozen=True)
class Scale:
    """The size of a comparison; all of its runs share it."""

    side: int = 64
    num_images: int = 6_400
    """Images of a whole training; a multiple of 8 batches, so that there is a checkpoint at each of POINTS."""
    batch_size: int = 8
    precision: str = "fp32"
    block_out_channels: tuple[int, ...] = (16, 48, 96, 96)
    segmenter_images: int = 12_800
    segmenter_channels: tuple[int, ...] = (16, 32, 64, 128, 256)
    patients: tuple[int, int, int] = (16, 4, 4)
    """Patients of the phantom's train, val and test split, in each modality."""
    slice_stride: int = 4
    num_masks: int = 80
    paper_steps: int = 50
    our_steps: int = 25
    paper_lrs: tuple[float, ...] = (1e-5, 1e-4, 1e-3)

    @property
    def points(self) -> tuple[int, ...]:
        """Images seen at each of POINTS."""
        return tuple(round(self.num_images * part) for part in POINTS)


QUICK = Scale(
    side=32,
    num_images=320,
    block_out_channels=(16, 32),
    segmenter_images=1_600,
    segmenter_channels=(16, 32, 64),
    patients=(2, 2, 2),
    slice_stride=8,
    num_masks=12,
    paper_steps=8,
    our_steps=4,
    paper_lrs=(1e-4, 1e-3),
)


@dataclass(frozen=True)
class Recipe:
    """A training as settings over the shared ones, and how its weights are sampled."""

    name: str
    about: str
    settings: Settings = field(hash=False)
    weights: str = AVERAGE
    sampler: str = "ours"
    has_body: bool = True
    share: float = 1.0
    """The share of the comparison's images; schedules end with it."""


def paper(lr: float) -> Recipe:
    """The published code's recipe (docs/recipes.md), except for net, batch and number of images, which all share.

    The published models have one modality each, so the one net for both gets the modality, as ours does. The published
    masks cover the whole patient, so these masks keep `body`.
    """
    settings: Settings = {
        "denoiser": {"mask_encoding": "scalar_signed", "soft_masks": False},
        "diffusion": {"prediction_type": "epsilon", "beta_schedule": "linear", "zero_terminal_snr": False},
        "train": {"lr": lr},
    }
    return Recipe(f"paper-lr-{lr:g}", f"the paper's recipe, learning rate {lr:g}", settings, ONLINE, "paper")


OURS = Recipe(
    "ours",
    "soft one-hot masks, x0, zero terminal SNR, averaged weights, learning rate 1e-3",
    {
        "denoiser": {"mask_encoding": "onehot", "soft_masks": True},
        "diffusion": {"prediction_type": "x0", "beta_schedule": "linear", "zero_terminal_snr": True},
        "train": {"lr": 1e-3},
    },
)
A_THIRD = replace(
    OURS, name="ours-a-third", about="ours, a third of the images, its schedule ending there", share=1 / 3
)


def _without(name: str, about: str, changes: Settings, **others: Any) -> Recipe:
    return replace(OURS, name=f"ours-{name}", about=about, settings=merge(OURS.settings, changes), **others)


# Ours with one part as in the paper's, and as in the configs for long runs.
ABLATIONS = (
    _without(
        "scalar-mask",
        "mask as one number a pixel (2 k / 255 - 1)",
        {"denoiser": {"mask_encoding": "scalar_signed", "soft_masks": False}},
    ),
    _without("hard-mask", "one-hot masks without shares at borders", {"denoiser": {"soft_masks": False}}),
    _without("no-body", "masks of organs alone, no body class", {}, has_body=False),
    _without(
        "epsilon",
        "noise predicted, and so no zero terminal SNR",
        {"diffusion": {"prediction_type": "epsilon", "zero_terminal_snr": False}},
    ),
    _without("v", "v predicted, as in the configs for long runs", {"diffusion": {"prediction_type": "v"}}),
    _without("linear", "no zero terminal SNR", {"diffusion": {"zero_terminal_snr": False}}),
    # Without weights, a loss of the noise is one of x_0 with the weight SNR (docs/recipes.md).
    _without(
        "weighting",
        "the error of x_0 weighted by SNR, as a plain loss of the noise does, and so no zero terminal SNR",
        {"diffusion": {"loss_weighting": "min_snr", "min_snr_gamma": 1e9, "zero_terminal_snr": False}},
    ),
)
# The same weights, used otherwise: (name, about, weights, sampler).
SAMPLED_OTHERWISE = (
    ("ours-online", "weights without averaging", ONLINE, "ours"),
    ("ours-paper-sampler", "the paper's sampler: its steps, leading timesteps", AVERAGE, "paper"),
)


def samplers(scale: Scale) -> dict[str, Settings]:
    """By name, as sections of `sample.sampler`."""
    return {
        "paper": {"num_steps": scale.paper_steps, "timestep_spacing": "leading", "clip_sample": True},
        "ours": {"num_steps": scale.our_steps, "timestep_spacing": "trailing", "clip_sample": True},
    }


@dataclass(frozen=True)
class Run:
    """One recipe with one seed."""

    data: Path
    """The data set's folder under OUT."""
    recipe: Recipe
    seed: int

    @property
    def folder(self) -> Path:
        return self.data / "runs" / f"{self.recipe.name}-{self.seed}"

    @property
    def shards(self) -> Path:
        return self.data / ("shards" if self.recipe.has_body else "shards_without_body")

    @property
    def is_trained(self) -> bool:
        return (self.folder / "seconds.json").is_file()

    def num_images(self, scale: Scale) -> int:
        """Whole batches."""
        return round(scale.num_images * self.recipe.share / scale.batch_size) * scale.batch_size

    def points(self, scale: Scale) -> tuple[int, ...]:
        """Images seen when its weights are kept."""
        return scale.points if self.recipe.share == 1.0 else (self.num_images(scale),)

    def seconds(self) -> dict[int, float]:
        """Seconds of training steps up to each point."""
        return {int(k): v for k, v in json.loads((self.folder / "seconds.json").read_text()).items()}

    def settings(self, scale: Scale) -> Settings:
        """The config file, from which `segdiff train` makes the run."""
        num_images = self.num_images(scale)
        shared: Settings = {
            "data": str(self.shards),
            "run": str(self.folder / "run"),
            "loader": {"axes": ["axial"], "num_threads": 1},
            "denoiser": {
                "block_out_channels": list(scale.block_out_channels),
                "layers_per_block": 1,
                "attention_resolutions": [],  # the middle block attends all the same
                "attention_head_dim": 16,
                "norm_num_groups": 8,
                "class_conditioning": True,
            },
            "train": {
                "seed": self.seed,
                "num_images": num_images,
                "global_batch_size": scale.batch_size,
                "micro_batch_size": scale.batch_size,
                "warmup_images": scale.num_images // 20,
                "precision": scale.precision,
                "zero_stage": 0,
                "ema_lengths": [float(AVERAGE.removeprefix("ema_"))],
                "spike_factor": 0,  # every step counts, also with a very uneven weighting
                "checkpoint_every_images": self.points(scale)[0],
                "keep_every_images": self.points(scale)[0],
                "keep_checkpoints": 1,
                "log_every_images": max(scale.batch_size, scale.num_images // 40),
            },
            "validation": {"num_pictures": 0, "num_images": 16},
            "tracking": {"enabled": False},
        }
        return merge(shared, self.recipe.settings)


def train(run: Run, scale: Scale, deadline: float = NEVER) -> bool:
    """Train, keep the weights at the run's points, and remove the checkpoints; False if time ran out before."""
    if run.is_trained:
        return True
    config = run.folder / "config.yaml"
    write_atomic(config, to_yaml(run.settings(scale)))
    if not segdiff("train", config, run.folder / "train.log", deadline):
        return False
    _keep_weights(run, scale)
    seconds = seconds_at(run.folder / "run" / "log.jsonl", run.points(scale))
    write_atomic(run.folder / "seconds.json", json.dumps(seconds) + "\n")
    shutil.rmtree(run.folder / "run" / "checkpoints")
    return True


def seconds_at(log: Path, points: tuple[int, ...]) -> dict[int, float]:
    """Seconds of steps up to each number of images, from a run's log: what validation and checkpoints took of the loop
    is not in it, so a run that was stopped and resumed counts as one that was not."""
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    images = np.array([0, *(row["images_seen"] for row in rows)])
    took = np.diff(images) / np.array([row["images_per_s"] for row in rows])
    return dict(zip(points, np.interp(points, images, [0.0, *took.cumsum()]).tolist(), strict=True))


def _keep_weights(run: Run, scale: Scale) -> None:
    from data_shards.store.shards import ShardSet
    from segdiff_dist.denoising.denoiser import Denoiser
    from segdiff_dist.experiment import load_experiment
    from segdiff_dist.training.checkpoint import checkpoint_name, read_state
    from segdiff_dist.training.sharded_state import SavedState

    experiment = load_experiment(run.folder / "config.yaml", None)
    shards = ShardSet.open([str(run.shards)])
    model = Denoiser(experiment.denoiser, shards.label_table, shards.size)
    for images in run.points(scale):
        checkpoint = run.folder / "run" / "checkpoints" / checkpoint_name(images)
        saved = SavedState(checkpoint, read_state(checkpoint)["ranks"])
        for average in (AVERAGE, ONLINE):
            folder = run.folder / "weights" / str(images) / average
            folder.parent.mkdir(parents=True, exist_ok=True)
            model.save(folder, saved.full(average), {"diffusion": asdict(experiment.diffusion)})


def make_data(data: Path, archive: Path | None, scale: Scale, threads: int, deadline: float = NEVER) -> bool:
    """The shard sets and the segmenter, of a phantom where no archive is given; False where time ran out before. The
    archive may be a shard set itself, which is linked and has no copy without body."""
    config = data / "data.yaml"
    write_atomic(config, to_yaml(_data_settings(data, archive, scale, threads)))
    stages = ["prepare", "train-segmenter"] if archive else ["phantom", "prepare", "train-segmenter"]
    if is_set := archive is not None and (archive / "index.json").is_file():
        stages = ["train-segmenter"]
        if not (data / "shards").exists():
            (data / "shards").symlink_to(archive)
    for stage in stages:
        if not segdiff(stage, config, data / f"{stage}.log", deadline, threads):
            return False
    if not is_set and not (data / "shards_without_body" / "index.json").is_file():
        forget_body(data / "shards", data / "shards_without_body")
    return True


def _data_settings(data: Path, archive: Path | None, scale: Scale, threads: int) -> Settings:
    """The configuration of the shard set and of the segmenter."""
    train_patients, val_patients, test_patients = scale.patients
    return {
        "amos_root": str(archive or data / "phantom"),
        "data": str(data / "shards"),
        "run": str(data / "segmenter"),
        "phantom": {"num_train": train_patients, "num_val": val_patients, "num_test": test_patients},
        "prepare": {
            "axes": ["axial"],
            "size": scale.side,
            # An archive has fewer patients, and its slices cannot be made thinner, so all of them are used.
            "slice_stride": 1 if archive else scale.slice_stride,
            "mask_resize": "soft",
            "soft_edge": True,
            "min_labelled_pixels": scale.side**2 // 200,
            "num_workers": threads,
        },
        "loader": {"axes": ["axial"], "num_threads": 1},
        "segmenter": {
            "first_stride": 1,  # organs may be two pixels wide
            "channels": list(scale.segmenter_channels),
            "rotate_degrees": 10,
            "zoom": 0.15,
            "train": {
                "num_images": scale.segmenter_images,
                "global_batch_size": 16,
                "micro_batch_size": 16,
                "lr": 3e-3,
                "warmup_images": scale.segmenter_images // 20,
                "checkpoint_every_images": scale.segmenter_images // 4,
                "log_every_images": scale.segmenter_images // 40,
                "precision": "fp32",
            },
        },
        "tracking": {"enabled": False},
    }


def segdiff(stage: str, config: Path, log: Path, deadline: float = NEVER, threads: int = 1) -> bool:
    """`segdiff STAGE --config CONFIG` in a separate process; False if it was stopped; it continues when called again.
    Raises RuntimeError with its last output if it failed.
    """
    if time.time() >= deadline:
        return False
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", "import sys; from segdiff_dist.cli import main; sys.exit(main(sys.argv[1:]))"]
    with log.open("ab") as output:
        # In a separate session: otherwise Ctrl-C would reach it too, and a second signal does not wait for a
        # checkpoint.
        process = subprocess.Popen(
            [*command, stage, "--config", str(config)],
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
        )
        return _finish(process, f"segdiff {stage}", log, deadline)


def _finish(process: subprocess.Popen[bytes], name: str, log: Path, deadline: float) -> bool:
    """Wait for it; at the deadline ask it to save and to leave."""
    asked = False
    try:
        process.wait(None if deadline == NEVER else max(0.0, deadline - time.time()))
    except subprocess.TimeoutExpired:
        asked = True
        process.send_signal(signal.SIGTERM)
        process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if process.returncode == 0:
        return True
    if asked:
        return False
    raise RuntimeError(f"{name} ended with {process.returncode}:\n{log.read_text(errors='replace')[-3000:]}")


def describe(scale: Scale, sampler_settings: Mapping[str, Settings]) -> Settings:
    """The settings that all runs share, for the JSON file."""
    return {**asdict(scale), "samplers": dict(sampler_settings), "average": AVERAGE, "points": POINTS}
