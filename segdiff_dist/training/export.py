"""Exported weights, and snapshots of the averages, from a complete checkpoint.

RUN/weights/<average>/         through the task: for the denoiser a diffusers folder
RUN/weights/exported.json      images_seen of the checkpoint they come from; written last, for `checkpoint`
RUN/snapshots/<images>/<average>.safetensors     for `segdiff average`
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from data_shards.documents import read_json
from data_shards.files import new_file, write_atomic
from data_shards.problems import InputProblems, problem
from segdiff_dist.training import ema
from segdiff_dist.training.checkpoint import checkpoint_name, crossings, is_checkpoint_folder, read_state, why_unusable
from segdiff_dist.training.config import TrainConfig
from segdiff_dist.training.engine import ONLINE
from segdiff_dist.training.sharded_state import SavedState, errno_of
from segdiff_dist.weight_files import DESCRIPTION, is_damaged, refuse_damaged, write_digests

if TYPE_CHECKING:
    from segdiff_dist.training.task import Task

_EXPORTED = "exported.json"


class Exporter:
    """Exports from checkpoint files, so no rank sends weights over the network, and no step waits."""

    def __init__(self, task: Task, config: TrainConfig, folder: Path) -> None:
        self.task, self.config, self.folder = task, config, folder

    def export(self, checkpoint: Path) -> None:
        """Write the snapshot and the weights of a complete checkpoint, unless both are there. Main rank.

        The weights are those of the checkpoint that the state names as best; without a score that is the checkpoint
        itself. Raises OSError if they cannot be written; a later call tries again.
        """
        from safetensors import SafetensorError

        if is_exported(checkpoint, self.folder):
            return
        try:
            self._snapshot(checkpoint)
            self._weights(checkpoint)
        except SafetensorError as error:  # the library's own error for errors of the system
            raise OSError(errno_of(error), str(error), str(self.folder)) from error

    def _snapshot(self, checkpoint: Path) -> None:
        """Keep the averages of the first checkpoint at or past each multiple of snapshot_every_images."""
        from safetensors.torch import save_file

        every, images_seen = self.config.snapshot_every_images, int(checkpoint.name)
        before = [taken for taken in _snapshots(self.folder, self.config.averages) if taken < images_seen]
        if not every or images_seen not in crossings([*before, images_seen], every):
            return
        saved = SavedState(checkpoint, read_state(checkpoint)["ranks"])
        folder = self.folder / "snapshots" / checkpoint.name
        folder.mkdir(parents=True, exist_ok=True)
        for average in self.config.averages:
            path = folder / f"{average}.safetensors"
            # Not in half precision, as in Karras et al.: its rounding error is larger than the error of the fit.
            with new_file(path) as unfinished:
                save_file(saved.full(average), unfinished)
        write_digests(folder, [f"{average}.safetensors" for average in self.config.averages])

    def _weights(self, checkpoint: Path) -> None:
        state, note = read_state(checkpoint), _read_note(self.folder)
        images_seen = state["images_seen"]
        # Without a score the newest weights are the best, unless they are from within a streak of skipped steps.
        best = state.get("best_images_seen", images_seen if self.task.score is None else None)
        kept = best != images_seen and best == note.get("images_seen") and _are_all_there(self.folder, note)
        if best is not None and not kept:
            source = checkpoint.parent / checkpoint_name(best)
            if source != checkpoint and (why := why_unusable(source, read_all=True)):
                warnings.warn(f"the best weights are not exported: checkpoint {source} {why}", stacklevel=1)
                return
            saved = SavedState(source, read_state(source)["ranks"])
            # If the best weights are chosen by a score, it is the score of the first average.
            averages = (*self.config.averages, ONLINE) if self.task.score is None else self.config.averages[:1]
            for average in averages:
                self.task.export(average, saved.full(average))
            note = {"images_seen": best, "averages": averages}
        if note:  # otherwise nothing was validated yet
            content = json.dumps({**note, "checkpoint": images_seen}) + "\n"
            write_atomic(self.folder / "weights" / _EXPORTED, content, durable=True)


def is_exported(checkpoint: Path, folder: Path) -> bool:
    """Whether everything of a checkpoint was exported to `folder`, and the weights there are the best."""
    note = _read_note(folder)
    best = read_state(checkpoint).get("best_images_seen")
    done = note.get("checkpoint", note.get("images_seen"))  # early versions wrote only the latter
    return done == int(checkpoint.name) and best in (None, note["images_seen"]) and _are_all_there(folder, note)


def exported_averages(folder: Path) -> list[str]:
    """The folders of weights that the training itself exported."""
    return [str(average) for average in _read_note(folder).get("averages", ())]


def refuse_to_replace(folder: Path) -> None:
    """Raise InputProblems if there are exported weights, for a training that begins without a checkpoint."""
    if _read_note(folder):
        value = "those of an earlier training, of which no checkpoint is left"
        remedy = f"a new training would replace them: give another run folder, or remove {folder / 'weights'}"
        raise problem(folder / "weights", "weights", value, remedy)


def _read_note(folder: Path) -> dict[str, Any]:
    """exported.json; empty if there is no readable one."""
    file = folder / "weights" / _EXPORTED
    try:
        note = read_json(file, "remove it")
        return note if isinstance(note.get("images_seen"), int) else {}
    except InputProblems:
        return {}


def _are_all_there(folder: Path, note: dict[str, Any]) -> bool:
    """Whether the weights that exported.json names can be read as they were written. Early versions named none."""
    weights = folder / "weights"
    for average in note.get("averages", ()):
        # Segmenter and autoencoder have one place for all averages.
        own = weights / average if (weights / average).is_dir() else weights
        if not (own / DESCRIPTION).is_file() or is_damaged(own):
            return False
    return True


def _snapshots(run: Path, averages: Sequence[str]) -> list[int]:
    """The counts of a run's complete snapshots."""
    folders = [
        p
        for p in (run / "snapshots").glob("[0-9]*")
        if is_checkpoint_folder(p) and all((p / f"{a}.safetensors").is_file() for a in averages)
    ]
    return sorted(int(p.name) for p in folders)


def snapshot_end(run: Path, config: TrainConfig, images_seen: int | None) -> int:
    """The training images at the end of an average: those that are given, or the newest snapshot's. Raises
    InputProblems if there is no such snapshot."""
    taken = _snapshots(run, config.averages)
    if not taken:
        raise problem(run / "snapshots", "snapshots", "none is whole", "train with --train.snapshot-every-images")
    end = max(taken) if images_seen is None else images_seen
    if end not in taken:
        there = ", ".join(map(str, taken))
        raise problem(
            run / "snapshots", "images_seen", end, f"there: {there}; train with --train.snapshot-every-images"
        )
    return end


def average_snapshots(
    run: Path, config: TrainConfig, length: float, images_seen: int | None = None
) -> tuple[dict[str, Tensor], float]:
    """The average of relative width `length` that ends at `images_seen` (default: the newest snapshot), from the run's
    snapshots: fp32 weights, and the error of its profile (ema.misfit: 0 exact, 1 unrelated). Raises InputProblems if
    there are no snapshots up to there.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    taken, end = _snapshots(run, config.averages), snapshot_end(run, config, images_seen)
    used = [(length_of, t) for t in taken if t <= end for length_of in config.ema_lengths]
    share_N = ema.reconstruct(used, (length, end))
    total: dict[str, Tensor] = {}
    remedy = "remove this snapshot; the others give the average a little less exactly"
    for (length_of, t), part in zip(used, share_N, strict=True):
        folder = run / "snapshots" / checkpoint_name(t)
        refuse_damaged(folder, "snapshot", remedy)
        try:
            for name, values in load_file(folder / f"{ema.name_of(length_of)}.safetensors").items():
                total[name] = total.get(name, torch.zeros(())) + part * values.double()
        except (OSError, SafetensorError, RuntimeError) as error:
            raise problem(folder, "snapshot", f"cannot be read: {error}", remedy) from error
    return {name: values.float() for name, values in total.items()}, ema.misfit(used, (length, end))
