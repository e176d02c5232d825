"""What a finished checkpoint leaves for others: exported weights, and snapshots of the averages.

RUN/weights/<average>/         through the task: for the denoiser a diffusers folder
RUN/weights/exported.json      images_seen of the checkpoint they come from
RUN/snapshots/<images>/<average>.safetensors     for `segdiff average`
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from data_shards.problems import Problem, problem
from segdiff_dist.config import write_text_atomically
from segdiff_dist.training import ema
from segdiff_dist.training.checkpoint import checkpoint_name, read_state
from segdiff_dist.training.config import TrainConfig
from segdiff_dist.training.engine import ONLINE
from segdiff_dist.training.sharded_state import SavedState

if TYPE_CHECKING:
    from segdiff_dist.training.loop import Task

_EXPORTED = "exported.json"


@dataclass(frozen=True)
class AverageConfig:
    """Which average `segdiff average` makes."""

    length: float = 0.07
    """Its relative width (sigma_rel): segdiff_dist/training/ema.py."""
    images_seen: int | None = None
    """Where it ends; null: at the newest snapshot."""

    def problems(self) -> list[Problem]:
        """What is out of range."""
        if 0 < self.length <= ema.WIDEST:
            return []
        return [Problem("config", "average.length", str(self.length), f"give a number in (0, {ema.WIDEST:.3f}]")]

    @property
    def name(self) -> str:
        """The folder under weights/."""
        return ema.name_of(self.length) + (f"_at_{self.images_seen}" if self.images_seen else "")


class Exporter:
    """Exports from checkpoint files, so that nothing is gathered over the network and no step waits."""

    def __init__(self, task: Task, config: TrainConfig, folder: Path) -> None:
        self.task, self.config, self.folder = task, config, folder

    def export(self, checkpoint: Path) -> None:
        """Export a complete checkpoint, if it is one that counts; main rank."""
        state = read_state(checkpoint)
        if state["is_best"]:
            saved = SavedState(checkpoint, state["ranks"])
            # Where the best are chosen, they were chosen by the first average.
            averages = (*self.config.averages, ONLINE) if self.task.score is None else self.config.averages[:1]
            for average in averages:
                self.task.export(average, saved.full(average))
            exported = {"images_seen": state["images_seen"], "averages": averages}
            write_text_atomically(self.folder / "weights" / _EXPORTED, json.dumps(exported) + "\n")
        every = self.config.snapshot_every_images
        if every and state["images_seen"] % every == 0:
            self._snapshot(checkpoint, state)

    def catch_up(self, checkpoint: Path) -> None:
        """Export the newest checkpoint where the run was killed before it could; main rank."""
        if not is_exported(checkpoint, self.folder):
            self.export(checkpoint)

    def _snapshot(self, checkpoint: Path, state: dict[str, Any]) -> None:
        from safetensors.torch import save_file

        saved = SavedState(checkpoint, state["ranks"])
        folder = self.folder / "snapshots" / checkpoint.name
        folder.mkdir(parents=True, exist_ok=True)
        for average in self.config.averages:
            path = folder / f"{average}.safetensors"
            # Not in half precision, as Karras et al. keep theirs: what it rounds away is more than the misfit.
            save_file(saved.full(average), path.with_suffix(".unfinished"))
            path.with_suffix(".unfinished").rename(path)


def is_exported(checkpoint: Path, folder: Path) -> bool:
    """Whether the weights under `folder` are those of a checkpoint, or better ones from before it."""
    note = folder / "weights" / _EXPORTED
    exported = json.loads(note.read_text())["images_seen"] if note.is_file() else -1
    return exported >= int(checkpoint.name) or not read_state(checkpoint)["is_best"]


def average_snapshots(
    run: Path, config: TrainConfig, length: float, images_seen: int | None = None
) -> tuple[dict[str, Tensor], float]:
    """The average of relative width `length` that ends at `images_seen` (default: the newest snapshot), from the run's
    snapshots: fp32 weights, and how far its profile stays from the wanted one (ema.misfit: 0 exact, 1 unrelated).

    Raises InputProblems where there are no snapshots up to there.
    """
    from safetensors.torch import load_file

    taken = sorted(int(p.name) for p in (run / "snapshots").glob("[0-9]*") if p.is_dir())
    end = images_seen or max(taken, default=0)
    used = [(length_of, t) for t in taken if t <= end for length_of in config.ema_lengths]
    if not used or used[-1][1] != end:
        have = ", ".join(map(str, taken)) or "none"
        raise problem(run / "snapshots", "images_seen", end, f"there: {have}; train with --train.snapshot-every-images")
    share_N = ema.reconstruct(used, (length, end))
    total: dict[str, Tensor] = {}
    for (length_of, t), part in zip(used, share_N, strict=True):
        file = run / "snapshots" / checkpoint_name(t) / f"{ema.name_of(length_of)}.safetensors"
        for name, values in load_file(file).items():
            total[name] = total.get(name, torch.zeros(())) + part * values.double()
    return {name: values.float() for name, values in total.items()}, ema.misfit(used, (length, end))
