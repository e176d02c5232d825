"""Write the folder of a pipeline."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from data_shards.documents import read_json
from data_shards.files import write_atomic
from data_shards.problems import Problem, problem
from segdiff_dist.denoising.cascade import LOWER, copy_stage, stage_problems
from segdiff_dist.denoising.config import DiffusionConfig
from segdiff_dist.denoising.denoiser import Denoiser
from segdiff_dist.denoising.latent_space import BESIDE_WEIGHTS, copy_to_pipeline, sampler_problems
from segdiff_dist.denoising.noise_levels import sigma_bounds
from segdiff_dist.denoising.process import make_process
from segdiff_dist.denoising.sampler_config import SamplerConfig
from segdiff_dist.denoising.schedule import make_scheduler
from segdiff_dist.pipeline.card import CardParts, card
from segdiff_dist.pipeline.description import (
    CARD,
    CLASS_NAME,
    CODE,
    DESCRIPTION,
    INDEX,
    PICTURE,
    RESTORE,
    SCHEDULER,
    SEGMENTER,
    UNET,
    trained_process,
)
from segdiff_dist.weight_files import DIGESTS, write_digests

_CODE_HERE = Path(__file__).with_name("in_folder.py")


@dataclass(frozen=True)
class Extras:
    """What a pipeline holds beside its net: the preprocessing of its set and the usual side of its slices in mm (0: not
    known), so that masks of any size can be used; a folder of a segmenter's weights; parts of the card; a PNG.
    `precision`: of the stored weights."""

    preprocessing: Mapping[str, Any] | None = None
    field_mm: float = 0.0
    precision: Literal["fp32", "bf16"] = "fp32"
    segmenter: Path | None = None
    card: CardParts = field(default_factory=CardParts)
    picture: bytes | None = None

    @property
    def described(self) -> dict[str, Any]:
        """For segdiff.json."""
        if self.preprocessing is None:
            return {}
        return {"preprocessing": dict(self.preprocessing), "field_mm": round(self.field_mm, 1)}


def pipeline_problems(weights: Path, diffusion: DiffusionConfig, sampler: SamplerConfig) -> list[Problem]:
    """Conflicts between `sampler` and the training of the net in `weights`."""
    own, description = sampler.alone, read_json(weights / DESCRIPTION, RESTORE)
    return own.problems(trained_process(weights, diffusion)) + [
        *sampler_problems(own, description),
        *stage_problems(own, weights, description),
    ]


def write_pipeline(
    weights: Path, folder: Path, diffusion: DiffusionConfig, sampler: SamplerConfig, extras: Extras | None = None
) -> None:
    """Write the model in `weights` (a folder under RUN/weights) as a pipeline into the existing `folder`.

    `diffusion` is used if the weights do not hold theirs. Segmenter guidance and autoguidance are left out, since they
    need other networks.
    """
    import diffusers

    extras, facts = extras or Extras(), Facts.of(weights, diffusion, sampler)
    copy_weights(weights, folder / UNET, extras.precision)
    of_latents = copy_to_pipeline(weights, folder)
    scheduler = scheduler_of(facts.process, facts.sampler)
    scheduler.save_pretrained(folder / SCHEDULER)
    index = {
        # diffusers reads the file beside it, and the class in it.
        "_class_name": [Path(CODE).stem, CLASS_NAME],
        "_diffusers_version": diffusers.__version__,
        UNET: ["diffusers", "UNet2DModel"],
        SCHEDULER: ["diffusers", type(scheduler).__name__],
    } | of_latents
    write_atomic(folder / INDEX, json.dumps(index, indent=2) + "\n")
    shutil.copyfile(_CODE_HERE, folder / CODE)
    facts.write(extras, folder, folder / DESCRIPTION, folder / CARD)


@dataclass(frozen=True)
class Facts:
    """What a model's folder says of its net: the content of its segdiff.json, the process of its training, its sampler
    without other networks."""

    net: Mapping[str, Any]
    process: DiffusionConfig
    sampler: SamplerConfig

    @classmethod
    def of(cls, weights: Path, diffusion: DiffusionConfig, sampler: SamplerConfig) -> Facts:
        """Of a folder under RUN/weights."""
        process = trained_process(weights, diffusion)
        return cls(read_json(weights / DESCRIPTION, RESTORE), process, sampler.resolved(process.objective).alone)

    def write(self, extras: Extras, folder: Path, description: Path, card_file: Path, use: str | None = None) -> None:
        """Write segdiff.json, the segmenter, the picture and the card of the model in `folder`. `use`: of the card."""
        content = {"diffusion": self.process.process, "sampler": asdict(self.sampler)} | extras.described
        write_atomic(description, json.dumps(content, indent=2) + "\n")
        if extras.segmenter is not None:
            copy_weights(extras.segmenter, folder / SEGMENTER, extras.precision)
        parts = replace(extras.card, use=use)
        if extras.picture is not None:
            write_atomic(card_file.parent / PICTURE, extras.picture)
            parts = replace(parts, picture=PICTURE)
        write_atomic(card_file, card(self.net, self.process.process, self.sampler, parts))


def save_again(source: Path, target: Path, model: Denoiser) -> None:
    """Write a pipeline's folder to another one, with the weights of `model`."""
    if source.resolve() == target.resolve():
        raise problem(target, "folder", "the one that the model was loaded from", "give another one")
    (target / UNET).mkdir(parents=True, exist_ok=True)
    for file in sorted(source.rglob("*")):
        name = file.relative_to(source)
        if file.is_file() and name.parts[0] != UNET:
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target / name)
    model.save(target / UNET, model.state_dict(), read_json(source / UNET / DESCRIPTION, RESTORE))
    # The autoencoder is in vae/ already.
    shutil.rmtree(target / UNET / BESIDE_WEIGHTS, ignore_errors=True)


def copy_weights(source: Path, target: Path, precision: Literal["fp32", "bf16"]) -> None:
    """The files of a folder of weights."""
    from safetensors.torch import load_file, save_file

    # Not copytree, which puts all errors, also that of a full disk, into an error of its own.
    target.mkdir()
    if (source / LOWER).is_dir():  # stays in fp32, since its digest is part of the description
        copy_stage(source / LOWER, target / LOWER)
    files = sorted(file for file in source.iterdir() if file.is_file())
    for file in files:
        if precision == "bf16" and file.suffix == ".safetensors":
            rounded = {name: value.to(torch.bfloat16) for name, value in load_file(file).items()}
            save_file(rounded, target / file.name, metadata={"format": "pt"})
        else:
            shutil.copyfile(file, target / file.name)
    if precision == "bf16" and (target / DIGESTS).is_file():
        write_digests(target, [file.name for file in files if file.name != DIGESTS])


def scheduler_of(process: DiffusionConfig, sampler: SamplerConfig) -> Any:
    """diffusers' scheduler that is nearest to a process: DDIM's, EDM's, or that of rectified flow."""
    from diffusers import EDMDPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

    if process.objective == "ddpm":
        return make_scheduler(process)
    if process.objective == "flow":
        return FlowMatchEulerDiscreteScheduler(shift=1.0 / process.snr_shift)
    least, most = sigma_bounds(sampler, make_process(process))
    return EDMDPMSolverMultistepScheduler(
        sigma_min=least, sigma_max=most, sigma_data=process.sigma_data, rho=sampler.rho
    )
