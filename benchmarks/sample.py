"""Sampling: our workers compared with diffusers' own pipeline loop, one worker and two, with Ray and without, in turns.

    diffusers' loop     UNet2DModel and DDIMScheduler as DDIMPipeline runs them: fp32, one process, a thread a core
    ours                what `segdiff sample` runs: Ray workers of one thread each, images and masks into the store
    ours, fast          the same with `preset: fast`, whose images benchmarks/samplers.py finds as good as 50 DDIM steps

All make the same items of a shard set of simple shapes with the same untrained weights, which does not change the
speed. The fp32 rows show the gain of bf16, the others that of two processes of one thread over one process of two.
`--run RUN --data SHARDS` takes a trained run; `--net paper` the paper's network, for which a CPU takes hours.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; diffusers' turn takes all cores by itself

import numpy as np
import torch
from support.harness import Contender, arguments, compare, measure, report
from support.sample_turns import Task, diffusers_loop, ours, ours_without_ray

from data_shards.fan_out import ray_session
from data_shards.labels import AMOS
from data_shards.records import SliceMeta, SliceRecord
from data_shards.store.shard_writer import ShardWriter, set_format
from segdiff_dist.denoising.config import DenoiserConfig, DiffusionConfig
from segdiff_dist.denoising.denoiser import Denoiser
from segdiff_dist.denoising.sampler_config import SamplerConfig
from segdiff_dist.sampling.config import SampleConfig

_NETS: dict[str, tuple[int, DenoiserConfig]] = {
    "tiny": (32, DenoiserConfig((16, 32), 1, (), norm_num_groups=8)),
    "demo": (64, DenoiserConfig((16, 48, 96, 96), 1, (), attention_head_dim=16, norm_num_groups=8)),
    "paper": (256, DenoiserConfig()),
}
_DIFFUSERS, _FP32, _ONE, _TWO = "diffusers' loop, fp32", "ours, fp32, 2 workers", "ours, 1 worker", "ours, 2 workers"
_FAST, _NO_RAY = "ours, fast, 2 workers", "ours, 1 process without Ray"


_FEW_STEPS = 10


def write_masks(out: Path, size: int, num: int) -> Path:
    """A shard set whose test split holds `num` masks of a body with two organs."""
    writer = ShardWriter(out, set_format("webdataset", "raw", 256, size=size, bits=8, soft_edge=False))
    row, column = np.mgrid[0:size, 0:size] / size
    for index in range(num):
        left, right = np.random.default_rng(index).uniform(0.25, 0.75, 2)
        mask = np.where((row - 0.5) ** 2 / 0.16 + (column - 0.5) ** 2 / 0.2 < 1, AMOS.body_id or 0, 0).astype(np.uint8)
        mask[(row - 0.5) ** 2 + (column - left) ** 2 < 0.02] = 6
        mask[(row - 0.4) ** 2 + (column - right) ** 2 < 0.01] = 1
        present = tuple(int(i) for i in np.unique(mask) if i)
        meta = SliceMeta(
            f"amos_{index:04d}", "CT", "axial", index, "test", (1.0, 1.0), tuple(np.eye(4).ravel()), 2.0, -256.0,
            "amos", present, True, "0" * 64,
        )  # fmt: skip
        writer.write(SliceRecord(mask * 10, mask, meta))
    table = {"name": AMOS.name, "names": AMOS.names}
    writer.finish({"label_table": table, "preprocessing": {"size": size, "bits": 8}})
    return out


def write_untrained(run: Path, net: str) -> Path:
    """RUN/weights/untrained."""
    torch.manual_seed(0)
    size, config = _NETS[net]
    model = Denoiser(config, AMOS, size)
    model.save(run / "weights" / "untrained", model.state_dict())
    return run


def task_of(args: Any, folder: Path) -> Task:
    """The images to make: from a run's held-out masks, or from shapes with untrained weights."""
    config = SampleConfig(
        num=args.images,
        seed=0,
        region_size=args.batch,
        batch_size=args.batch,
        sampler=SamplerConfig(num_steps=args.steps),
        weights="untrained",
    )
    if args.run is None:
        run, data = write_untrained(folder / "run", args.net), folder / "set"
        write_masks(data, _NETS[args.net][0], args.images)
        return Task(run, data, DiffusionConfig(), config)
    from segdiff_dist.experiment import load_experiment

    experiment = load_experiment(None, args.run)
    spacing = "trailing" if experiment.diffusion.zero_terminal_snr else "leading"
    sampler = SamplerConfig(num_steps=args.steps, timestep_spacing=spacing)
    config = replace(config, weights=experiment.train.averages[0], sampler=sampler, num=args.images)
    return Task(args.run, args.data or Path(experiment.given("data")), experiment.diffusion, config)


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--net", choices=list(_NETS), default="demo")
    parser.add_argument("--run", type=Path, help="a trained run, in place of untrained weights")
    parser.add_argument("--data", type=Path, help="its shard set, where it is not the one its config names")
    parser.add_argument("--images", type=int, default=64, help="made by each contender in a round")
    parser.add_argument("--batch", type=int, default=16, help="images made at once, also by diffusers' loop")
    parser.add_argument("--steps", type=int, default=50, help="of DDIM")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.net, args.images, args.batch, args.steps = 1, "tiny", 8, 4, 20
    folder = Path(tempfile.mkdtemp(prefix="bench-sample-"))
    try:
        with ray_session(num_cpus=max(2, os.cpu_count() or 1)):
            run(args, folder)
    finally:
        shutil.rmtree(folder)


def run(args: Any, folder: Path) -> None:
    """Measure, compare, report; Ray already runs."""
    task = task_of(args, folder)
    busy: dict[str, list[float]] = {}

    def contender(name: str, num_workers: int, **changes: Any) -> Contender:
        def turn() -> tuple[float, float]:
            images, seconds, share = ours(task, folder / name, num_workers, **changes)
            busy.setdefault(name, []).append(share)
            return images, seconds

        return turn

    fast = SamplerConfig(preset="fast")
    rates = measure(
        {
            _DIFFUSERS: lambda: diffusers_loop(task, folder / "diffusers"),
            _FP32: contender(_FP32, 2, precision="fp32"),
            _NO_RAY: lambda: ours_without_ray(task, folder / "no-ray"),
            _ONE: contender(_ONE, 1),
            _TWO: contender(_TWO, 2),
            _FAST: contender(_FAST, 2, sampler=fast),
        },
        args.rounds,
    )
    ratios = [
        compare(rates, _TWO, _DIFFUSERS, 1.5),
        compare(rates, _FAST, _DIFFUSERS, 4.0),
        compare(rates, _TWO, _ONE, 1.8),
        compare(rates, _ONE, _NO_RAY, 0.97),
        compare(rates, _FP32, _DIFFUSERS),
        compare(rates, _TWO, _FP32),
    ]
    chosen = fast.resolved()
    notes = {
        "fast": f"{chosen.solver}, {chosen.num_steps} {chosen.timestep_spacing} steps",
        "share of the workers' time that makes images": {
            name: round(float(np.median(shares)), 4) for name, shares in busy.items()
        },
        f"grey values between ours in fp32 and diffusers' after {_FEW_STEPS} steps": _difference(task, folder),
    }
    report(args, rates, ratios, unit="images a second", notes=notes)


def _difference(task: Task, folder: Path) -> str:
    """Our images and those of diffusers must be the same, so that the ratios are fair. Compared after few steps: after
    50 of an untrained net, weights that differ by 1e-6 give other images."""
    import zarr

    sampler = replace(task.config.sampler, num_steps=_FEW_STEPS)
    few = replace(task, config=replace(task.config, num=task.config.batch_size, precision="fp32", sampler=sampler))
    diffusers_loop(few, folder / "theirs")
    ours_without_ray(few, folder / "ours")
    theirs = np.load(folder / "theirs" / "diffusers.npy").astype(int)
    found = np.abs(np.asarray(zarr.open_group(folder / "ours" / "images.zarr", mode="r")["image"]) - theirs)
    return f"at most {found.max()}, mean {found.mean():.5f}"


if __name__ == "__main__":
    sys.exit(main())
