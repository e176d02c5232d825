"""The trained denoiser that a training begins from: the base of a ControlNet (control.py), or the lower stage of a
cascade (cascade.py). Where its weights are, and whether it goes with the settings."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_shards.documents import read_json, reading
from data_shards.problems import InputProblems, Problem, problem
from segdiff_dist.denoising.cascade import LOWER, LowerStage, copy_stage
from segdiff_dist.denoising.denoiser import BaseNet, Denoiser, described_modalities, known_modalities
from segdiff_dist.denoising.schedule import as_trained
from segdiff_dist.weight_files import DESCRIPTION

if TYPE_CHECKING:
    from torch import Tensor

    from data_shards.store.shards import ShardSet
    from segdiff_dist.denoising.config import DenoiserConfig, DiffusionConfig

# In a run folder: the weights of the base, as they were when the training began.
KEPT = "base"
# The settings that make a net's shape.
_SHAPE = (
    *("space", "net", "block_out_channels", "layers_per_block", "attention_resolutions"),
    *("attention_head_dim", "norm_num_groups", "class_conditioning"),
)


@dataclass(frozen=True)
class Base:
    """The base of a training: the folder of its weights, and their description."""

    folder: Path
    description: dict[str, Any]
    net: BaseNet
    size: int
    trained_on: tuple[str, ...]
    """Its modalities."""

    @classmethod
    def find(cls, denoiser: DenoiserConfig, run: Path) -> Base | None:
        """That of `denoiser.base`, a run folder or a folder of weights; None for another conditioning.

        A training that has begun in `run` has a copy of its base, and goes on with it.
        """
        if denoiser.conditioning != "controlnet" or denoiser.base is None:
            return None
        return cls._open("denoiser.base", denoiser.base, run / KEPT, "--denoiser.conditioning none")

    @classmethod
    def below(cls, denoiser: DenoiserConfig, run: Path) -> Base | None:
        """That of `denoiser.cascade`, likewise; None if there is none."""
        if denoiser.cascade is None:
            return None
        return cls._open("denoiser.cascade", denoiser.cascade, run / LOWER, "--denoiser.low-resolution SIDE")

    @classmethod
    def _open(cls, field: str, given: str, kept: Path, flag: str) -> Base:
        begun = any(file.is_dir() for file in (kept.parent / "checkpoints").glob("[0-9]*"))
        folder = kept if begun else _weights_in(Path(given))
        file = folder / DESCRIPTION
        if not file.is_file():
            remedy = f"train it first, as with {flag}, or give a run folder or a folder of weights"
            if begun:
                remedy = f"the training began with its weights: copy them there from {given}"
            raise problem("config" if not begun else folder, field, given, remedy)
        remedy = "copy the weights again from where they were trained"
        description = read_json(file, remedy, "the description of a denoiser")
        with reading(file, "the description of a denoiser", remedy):
            size, trained_on = int(description["size"]), known_modalities(description, file)
            return cls(folder, description, BaseNet.of(description, file), size, trained_on)

    def keep(self, run: Path) -> None:
        """Copy the weights into the run folder, which then needs no other."""
        if self.folder != run / KEPT:
            copy_stage(self.folder, run / KEPT)

    def kept_below(self, run: Path, *, copy: bool) -> LowerStage:
        """The same for the lower stage of a cascade, which is returned. `copy`: on one rank."""
        stage = LowerStage.open(self.folder)
        if copy and self.folder != run / LOWER:
            stage.copy_to(run / LOWER)
        return replace(stage, folder=run / LOWER)

    def begin(self, model: Denoiser) -> None:
        """Give a denoiser the base's weights; its control begins as a copy of the encoder. Raises InputProblems for
        weights that cannot be used."""
        assert model.control is not None
        model.load_state_dict({**model.state_dict(), **Denoiser.load(self.folder).state_dict()})
        model.control.copy_encoder(model.unet)

    def with_its_sigma_data(self, diffusion: DiffusionConfig) -> DiffusionConfig:
        """sigma_data, which training measures, is the base's."""
        measured = self.description.get("diffusion", {}).get("sigma_data")
        return diffusion if diffusion.sigma_data is not None else replace(diffusion, sigma_data=measured)

    def problems(
        self,
        denoiser: DenoiserConfig,
        diffusion: DiffusionConfig,
        size: int,
        modalities: tuple[str, ...],
        seen: Sequence[str],
    ) -> list[Problem]:
        """Why it does not go with the settings and with slices of `size` pixels. `modalities`: the set's; `seen`: those
        of the slices to train on."""
        trained_with, base = self.description.get("diffusion", {}), self.net.config
        differing = {
            f"denoiser.{name}": (getattr(base, name), getattr(denoiser, name))
            for name in _SHAPE
            if getattr(base, name) != getattr(denoiser, name)
        }
        differing |= {f"diffusion.{name}": pair for name, pair in as_trained(diffusion, trained_with)[1].items()}
        problems = [
            Problem("config", name, _shown(now), f"the base {self.folder} has {_shown(before)}: give that")
            for name, (before, now) in differing.items()
        ]
        problems += self._of_slices("denoiser.base", size, modalities, seen)

        def check(good: bool, value: str, remedy: str) -> None:
            if not good:
                problems.append(Problem(str(self.folder), "denoiser.base", value, remedy))

        check(base.conditioning != "controlnet", "a ControlNet itself", "give the base that it was trained on")
        reads_masks = base.conditioning not in ("none", "controlnet") and not trained_with.get("mask_dropout")
        remedy = "train it with --denoiser.conditioning none, or with --diffusion.mask-dropout 0.1"
        check(not reads_masks, "never trained without its masks", remedy)
        return problems

    def problems_below(
        self,
        denoiser: DenoiserConfig,
        diffusion: DiffusionConfig,
        shards: ShardSet,
        size: int,
        seen: Sequence[str],
    ) -> list[Problem]:
        """Why the lower stage of a cascade does not go with the settings and with slices of `size` pixels, which are
        of `shards`."""
        field, own, below = "denoiser.cascade", denoiser.low_resolution or size, self.net.config
        found = self._of_slices(field, size, shards.modalities, seen)

        def check(good: bool, value: str, remedy: str) -> None:
            if not good:
                found.append(Problem(str(self.folder), field, value, remedy))

        side = below.low_resolution or self.size
        remedy = f"train the lower stage with --denoiser.low-resolution SIDE, a divisor of {own} below it"
        check(side < own and own % side == 0, f"its images have {side} pixels, and these {own}", remedy)
        table = self.net.label_table
        remedy = "train the lower stage on this set"
        value = f"label table {table.name!r}, and the set has {shards.label_table.name!r}"
        check(table == shards.label_table, value, remedy)
        check(below.space == "pixel", "a denoiser of latents", "give one with --denoiser.low-resolution")
        theirs, ours = self.description.get("diffusion", {}).get("objective", "ddpm"), diffusion.objective
        check(theirs == ours, f"objective {theirs}, not {ours}", "both stages are sampled alike: give the same")
        alike = below.soft_masks == denoiser.soft_masks
        check(alike, f"soft_masks {below.soft_masks}", "both stages read the same masks: give the same")
        return found

    def _of_slices(self, field: str, size: int, modalities: tuple[str, ...], seen: Sequence[str]) -> list[Problem]:
        where, named = str(self.folder), described_modalities(self.description, self.folder / DESCRIPTION)
        problems = []
        if self.size != size:
            remedy = f"prepare slices of {self.size} pixels or give --loader.crop-size {self.size}, or train another"
            problems.append(Problem(where, field, f"trained at {self.size} pixels, not {size}", remedy))
        if named != modalities or not set(seen) <= set(self.trained_on):
            value = f"it knows {', '.join(self.trained_on)}, and the slices are {', '.join(seen)}"
            remedy = f"choose with --loader.modalities {' '.join(self.trained_on)}, or train one on these"
            problems.append(Problem(where, field, value, remedy))
        return problems


def kept_weights(run: Path) -> dict[str, Tensor]:
    """The weights of the base of a training that has begun, in fp32."""
    return dict(Denoiser.load(run / KEPT).state_dict())


def _weights_in(given: Path) -> Path:
    """The weights of a run folder, its first average; or the folder itself."""
    if (given / DESCRIPTION).is_file() or not (given / "weights").is_dir():
        return given
    names = sorted(file.parent.name for file in (given / "weights").glob(f"[!.]*/{DESCRIPTION}"))
    with suppress(InputProblems, KeyError, IndexError, TypeError):
        names = [str(read_json(given / "weights" / "exported.json", "train again")["averages"][0]), *names]
    return given / "weights" / next(iter(names), "")


def _shown(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)
