"""Our training loop compared with those it replaces: the same network, slices and global batch, in turns.

    (a) the published loop's design   fp32, row-major, plain AdamW, noise from the CPU, .item() every step, no averages
    (b) diffusers' style              accelerate, EMAModel, DDPMScheduler, clipping, DataLoader; fp32 and bf16
    ours                              segdiff_dist.training.loop.train, with two averages, log, MLflow and a checkpoint
    ours, bare                        the same without averages, log, MLflow and checkpoint

Each with one and with two ranks, a thread of arithmetic each, in processes of their own that are started for the turn.
(a) and (b) save nothing while they are timed. Then the time that a step waits for a checkpoint of the paper's network.
`--net paper` takes the paper's network at 256x256, where a step takes half a minute on a CPU.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from support.baselines import make_pair
from support.checkpoint_costs import checkpoint_costs
from support.harness import Contender, Ratio, Spread, arguments, compare, measure, report
from support.train_loops import PARTS
from support.train_turns import Turn, run

from data_shards.labels import AMOS
from data_shards.records import SliceMeta, SliceRecord
from data_shards.store.shard_writer import ShardWriter, set_format

_PAPER_PARAMETERS = 113_670_000
# Far more often than anyone saves; the turns, which take seconds, hold one checkpoint each.
_SAVES_EVERY_S = 60.0

# The settings of all contenders: a global batch of `images`, `pairs` slices to draw from.
_NETS: dict[str, dict[str, Any]] = {
    "tiny": {"size": 32, "block_out_channels": (32, 64), "attention_resolutions": (), "images": 8, "pairs": 64},
    "small": {"size": 64, "block_out_channels": (32, 64, 128, 128), "attention_resolutions": (), "images": 8},
    "paper": {
        "size": 256,
        "block_out_channels": (128, 128, 256, 256, 512, 512),
        "attention_resolutions": (16,),
        "images": 2,
        "pairs": 64,
    },
}


@dataclass
class Contest:
    """The contenders of one run, and what their turns results beside their speed."""

    folder: Path
    results: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def contender(self, name: str, turn: Turn) -> Contender:
        """Images and seconds of a turn of its own processes."""

        def measured() -> tuple[float, float]:
            turns = self.results.setdefault(name, [])
            result = run(turn, self.folder / name.replace(" ", "-") / str(len(turns)))
            turns.append(result)
            return turn.global_batch_size * turn.steps, result["seconds"]

        return measured

    def notes(self, rates: dict[str, Spread]) -> dict[str, str]:
        """For every contender images a second, data wait and memory."""
        return {name: self._line(name, spread.median) for name, spread in rates.items()}

    def costs(self, name: str, turn: Turn) -> dict[str, str]:
        """The cost of each timed part of our loop in a step, beside the targets."""

        def of_a_step(part: str) -> float:
            return self._median(name, lambda results: results["parts_s"].get(part, 0.0) / turn.steps)

        step_s = self._median(name, lambda results: results["seconds"]) / turn.steps
        found = {
            f"{name}, {part}": f"{1000 * of_a_step(part):.2f} ms a step, {of_a_step(part) / step_s:.2%} of it"
            for part in PARTS
        }
        every_step = (of_a_step("averages") + of_a_step("logging")) / step_s
        checkpoint_s = of_a_step("checkpointing") * turn.steps
        often, seldom = (every_step + checkpoint_s / s for s in (turn.steps * step_s, _SAVES_EVERY_S))
        found[f"{name}, averages, logging and checkpointing"] = (
            f"{often:.2%} of the time with a checkpoint every {turn.steps * step_s:.0f} s; "
            f"with one every {_SAVES_EVERY_S:.0f} s {share_and_limit(seldom, 0.03)}"
        )
        found[f"{name}, data wait"] = share_and_limit(self._median(name, lambda results: results["data_wait"]), 0.01)
        return found

    def _line(self, name: str, images_per_s: float) -> str:
        peak_gib = self._median(name, lambda turn: turn["peak_mib"]) / 1024
        words = [f"{images_per_s:.3g} img/s", f"{peak_gib:.2f} GiB at most"]
        if all(turn["data_wait"] is not None for turn in self.results[name]):
            words.insert(1, f"data wait {self._median(name, lambda turn: turn['data_wait']):.2%}")
        return ", ".join(words)

    def _median(self, name: str, value: Any) -> float:
        return statistics.median(map(value, self.results[name]))


def write_data(folder: Path, num: int, size: int) -> None:
    """The same pairs as PNG files in folder/pairs and as a shard set in folder/shards."""
    from PIL import Image

    for part in ("images", "masks"):
        (folder / "pairs" / part).mkdir(parents=True)
    writer = ShardWriter(folder / "shards", set_format("webdataset", "raw", 1000, size=size, bits=8, soft_edge=False))
    for number in range(num):
        image_HW, mask_HW = make_pair(number, size)
        for part, pixels_HW in (("images", image_HW), ("masks", mask_HW)):
            Image.fromarray(pixels_HW).save(folder / "pairs" / part / f"{number:06d}.png")
        writer.write(SliceRecord(image_HW, mask_HW, _meta(number, mask_HW)))
    table = {"name": AMOS.name, "names": list(AMOS.names)}
    writer.finish({"label_table": table, "preprocessing": {"size": size, "bits": 8}})


def _meta(number: int, mask_HW: np.ndarray) -> SliceMeta:
    return SliceMeta(
        case_id=f"amos_{number // 100:04d}",
        modality="CT",
        axis="axial",
        slice_index=number % 100,
        split="train",
        spacing_mm=(1.0, 1.0),
        affine=tuple(np.eye(4).ravel()),
        intensity_scale=512 / 255,
        intensity_offset=-256.0,
        label_set="amos",
        labels_present=tuple(int(i) for i in np.unique(mask_HW) if i),
        labelled=True,
        source_sha256="0" * 64,
    )


def turns_of(net: dict[str, Any], data: Path, ranks: int, warm_up: int, steps: int) -> dict[str, Turn]:
    """The contenders with so many ranks."""
    base = Turn(
        "ours",
        data,
        net["size"],
        net["block_out_channels"],
        net["attention_resolutions"],
        net["images"],
        ranks,
        "bf16",
        warm_up,
        steps,
    )
    of = f"{ranks} rank{'s' * (ranks > 1)}"
    bare = {f"ours, bf16, bare, {of}": replace(base, loop="ours, bare")} if ranks == 1 else {}
    return {
        f"(a) published, fp32, {of}": replace(base, loop="published", precision="fp32"),
        f"(b) accelerate, fp32, {of}": replace(base, loop="accelerated", precision="fp32"),
        f"(b) accelerate, bf16, {of}": replace(base, loop="accelerated"),
        f"ours, fp32, {of}": replace(base, precision="fp32", parts=ranks == 1),
        f"ours, bf16, {of}": replace(base, parts=ranks == 1),
        **bare,
    }


def ratios_of(rates: dict[str, Spread], ranks: int, target: float | None) -> list[Ratio]:
    """Ours against each, with so many ranks."""
    of = f"{ranks} rank{'s' * (ranks > 1)}"
    pairs = [("bf16", "(a) published, fp32", target), ("fp32", "(a) published, fp32", None)]
    pairs += [(precision, f"(b) accelerate, {precision}", None) for precision in ("bf16", "fp32")]
    pairs += [("bf16", "ours, bf16, bare", 0.97)] if ranks == 1 else []
    named = [(f"ours, {ours}, {of}", f"{against}, {of}", at_least) for ours, against, at_least in pairs]
    return [compare(rates, *pair) for pair in named if {*pair[:2]} <= set(rates)]


def share_and_limit(value: float, limit: float) -> str:
    """A share of the time, and whether it is below its limit."""
    return f"{value:.2%}, target below {limit:.0%}: {'reached' if value < limit else 'NOT reached'}"


def checkpoint_note(costs: dict[str, Any]) -> str:
    """In words; the first checkpoint also makes the memory that it copies to."""
    waits = [waited / written for waited, written in zip(costs["waited_s"], costs["written_s"], strict=True)]
    again = max(waits[1:])
    return (
        f"{costs['gib']:.2f} GiB: a step of {costs['step_s']:g} s waits "
        f"{', '.join(f'{s:.2f}' for s in costs['waited_s'])} s for "
        f"{', '.join(f'{s:.1f}' for s in costs['written_s'])} s of writing; after the first {again:.1%} of it, target "
        f"below 5%: {'reached' if again < 0.05 else 'NOT reached'}; work beside it slowed by {costs['slowed']:.1%}"
    )


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--net", choices=("small", "paper"), default="small")
    parser.add_argument("--ranks", type=int, nargs="+", help="numbers of ranks; by default 1 and 2, for paper 1")
    parser.add_argument("--steps", type=int, help="timed steps a turn; by default 8, for paper 2")
    args = parser.parse_args()
    is_paper = args.net == "paper"
    net, rounds, warm_up, steps = _NETS[args.net], args.rounds, 2, args.steps or 8
    parameters, every_ranks = _PAPER_PARAMETERS, args.ranks or [1, 2]
    if is_paper:
        rounds, steps, every_ranks = min(rounds, 1), args.steps or 2, args.ranks or [1]
    if args.quick:
        net, rounds, warm_up, steps, parameters = _NETS["tiny"], 1, 2, 4, _PAPER_PARAMETERS // 20
    target = None if args.quick else 1.9 if is_paper else 1.5

    folder = Path(tempfile.mkdtemp(prefix="bench-train-"))
    try:
        pairs = net.get("pairs", 512)
        print(f"writing {pairs} pairs to {folder}", file=sys.stderr)
        write_data(folder / "data", pairs, net["size"])
        contest, turns = Contest(folder), {}
        for ranks in every_ranks:
            turns |= turns_of(net, folder / "data", ranks, warm_up, steps)
        if args.quick:  # starting processes is what takes the time
            kept = ("(a)", "(b) accelerate, bf16", "ours, bf16")
            turns = {name: turn for name, turn in turns.items() if name.startswith(kept[2 * (turn.ranks > 1) :])}
        rates = measure({name: contest.contender(name, turn) for name, turn in turns.items()}, rounds)
        ratios = [ratio for ranks in every_ranks for ratio in ratios_of(rates, ranks, target)]
        notes: dict[str, Any] = dict(contest.notes(rates))
        for name, turn in turns.items():
            if turn.parts:
                notes |= contest.costs(name, turn)
        notes["a checkpoint"] = checkpoint_note(checkpoint_costs(parameters, folder / "checkpoints", 3))
        report(args, rates, ratios, unit="images a second", notes=notes)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    main()
