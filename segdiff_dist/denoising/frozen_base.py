"""The base of a ControlNet's training (control.py): where its weights are, and whether it goes with the settings."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_shards.documents import read_json, reading
from data_shards.files import updated_folder
from data_shards.problems import InputProblems, Problem, problem
from segdiff_dist.denoising.denoiser import BaseNet, Denoiser, described_modalities, known_modalities
from segdiff_dist.denoising.diffusion import as_trained

if TYPE_CHECKING:
    from torch import Tensor

    from segdiff_dist.denoising.config import DenoiserConfig, DiffusionConfig

# In a run folder: the weights of the base, as they were when the training began.
KEPT = "base"
_DESCRIPTION = "segdiff.json"
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
        begun = any(file.is_dir() for file in (run / "checkpoints").glob("[0-9]*"))
        folder = run / KEPT if begun else _weights_in(Path(denoiser.base))
        file = folder / _DESCRIPTION
        if not file.is_file():
            remedy = "train it first, as with --denoiser.conditioning none, or give a run folder or a folder of weights"
            if begun:
                remedy = f"the training began with its weights: copy them there from {denoiser.base}"
            raise problem("config" if not begun else folder, "denoiser.base", denoiser.base, remedy)
        remedy = "copy the weights again from where they were trained"
        description = read_json(file, remedy, "the description of a denoiser")
        with reading(file, "the description of a denoiser", remedy):
            size, trained_on = int(description["size"]), known_modalities(description, file)
            return cls(folder, description, BaseNet.of(description, file), size, trained_on)

    def keep(self, run: Path) -> None:
        """Copy the weights into the run folder, which then needs no other."""
        if self.folder == run / KEPT:
            return
        with updated_folder(run / KEPT) as unfinished:
            for file in sorted(one for one in self.folder.iterdir() if one.is_file()):
                shutil.copyfile(file, unfinished / file.name)

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
        found = [
            Problem("config", name, _shown(now), f"the base {self.folder} has {_shown(before)}: give that")
            for name, (before, now) in differing.items()
        ]

        def check(good: bool, value: str, remedy: str) -> None:
            if not good:
                found.append(Problem(str(self.folder), "denoiser.base", value, remedy))

        remedy = f"prepare slices of {self.size} pixels or give --loader.crop-size {self.size}, or train another base"
        check(self.size == size, f"trained at {self.size} pixels, not {size}", remedy)
        named = described_modalities(self.description, self.folder / _DESCRIPTION)
        check(
            named == modalities and set(seen) <= set(self.trained_on),
            f"it knows {', '.join(self.trained_on)}, and the slices are {', '.join(seen)}",
            f"choose with --loader.modalities {' '.join(self.trained_on)}, or train a base on these",
        )
        check(base.conditioning != "controlnet", "a ControlNet itself", "give the base that it was trained on")
        reads_masks = base.conditioning not in ("none", "controlnet") and not trained_with.get("mask_dropout")
        remedy = "train it with --denoiser.conditioning none, or with --diffusion.mask-dropout 0.1"
        check(not reads_masks, "never trained without its masks", remedy)
        return found


def kept_weights(run: Path) -> dict[str, Tensor]:
    """The weights of the base of a training that has begun, in fp32."""
    return dict(Denoiser.load(run / KEPT).state_dict())


def _weights_in(given: Path) -> Path:
    """The weights of a run folder, its first average; or the folder itself."""
    if (given / _DESCRIPTION).is_file() or not (given / "weights").is_dir():
        return given
    names = sorted(file.parent.name for file in (given / "weights").glob(f"[!.]*/{_DESCRIPTION}"))
    with suppress(InputProblems, KeyError, IndexError, TypeError):
        names = [str(read_json(given / "weights" / "exported.json", "train again")["averages"][0]), *names]
    return given / "weights" / next(iter(names), "")


def _shown(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)
