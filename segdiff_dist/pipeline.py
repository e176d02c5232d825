"""A trained model in five lines of Python: a mask in, an image out.

    FOLDER/model_index.json           diffusers' list of what is below
    FOLDER/unet/                      the UNet2DModel; beside its files, what joins the mask to its input
    FOLDER/vae/                       for a model that works on latents: the AutoencoderKL
    FOLDER/scheduler/                 diffusers' scheduler of the process that it was trained on
    FOLDER/segdiff.json               schedule and sampler settings
    FOLDER/README.md                  the model card

Dimensions: B batch, H rows, W columns.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from data_shards.documents import read_json, reading
from data_shards.fan_out import num_cores
from data_shards.files import write_atomic
from data_shards.labels import UNUSED
from data_shards.problems import Problem, problem, refuse
from data_shards.records import AXES
from segdiff_dist.config import validate
from segdiff_dist.denoising.conditioning import Conditions, class_ids
from segdiff_dist.denoising.config import DenoiserConfig, DiffusionConfig
from segdiff_dist.denoising.denoiser import Denoiser, known_modalities
from segdiff_dist.denoising.diffusion import as_trained, make_scheduler
from segdiff_dist.denoising.grids import sigma_bounds
from segdiff_dist.denoising.latent_space import copy_to_pipeline, sampler_problems
from segdiff_dist.denoising.process import make_process
from segdiff_dist.denoising.sampler_config import SamplerConfig
from segdiff_dist.ranks.distributed import pick_device
from segdiff_dist.sampling.config import LEAST_BATCH
from segdiff_dist.sampling.worker import batch_size_for, generate, memory_bytes
from segdiff_dist.weight_files import DIGESTS, write_digests

if TYPE_CHECKING:
    from PIL.Image import Image

    from data_shards.store.shards import ShardSet

# More at once is not faster.
_MOST_AT_ONCE = 16
UNET, SEGMENTER, _SCHEDULER, DESCRIPTION = "unet", "segmenter", "scheduler", "segdiff.json"
_RESTORE = "copy the folder again from where it was written"


@dataclass(frozen=True)
class SegGuidedPipeline:
    """Masks to images by one model. `from_pretrained` reads what `segdiff export --format pipeline` wrote."""

    model: Denoiser
    diffusion: DiffusionConfig
    sampler: SamplerConfig
    device: torch.device

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        precision: Literal["bf16", "fp32"] = "fp32",
    ) -> SegGuidedPipeline:
        """The pipeline in `folder`; `precision`: of the network. Raises InputProblems if the folder is not a
        pipeline."""
        folder = Path(folder)
        if not (folder / DESCRIPTION).is_file():
            remedy = "give what `segdiff export --run RUN --format pipeline OUT` wrote"
            raise problem(folder, "pipeline", f"no {DESCRIPTION}", remedy)
        description = read_json(folder / DESCRIPTION, _RESTORE)
        with reading(folder / DESCRIPTION, "the description of a pipeline", _RESTORE):
            diffusion = validate(DiffusionConfig, description["diffusion"], folder / DESCRIPTION)
            sampler = validate(SamplerConfig, description["sampler"], folder / DESCRIPTION)
        return cls.from_weights(folder / UNET, diffusion, sampler, device=device, precision=precision)

    @classmethod
    def from_weights(
        cls,
        weights: Path,
        diffusion: DiffusionConfig,
        sampler: SamplerConfig,
        *,
        device: Literal["auto", "cpu", "cuda"],
        precision: Literal["bf16", "fp32"],
    ) -> SegGuidedPipeline:
        """The model in a folder under RUN/weights. `diffusion` is used if the weights do not hold theirs. Guidance that
        needs another network (segmenter guidance, autoguidance) is left out. Raises InputProblems, also if the sampler
        does not go with the net's training."""
        chosen = pick_device(device)
        model = Denoiser.load(weights).prepare_for(chosen)
        process, own = _trained_process(weights, diffusion), _alone(sampler)
        refuse(own.problems(process))
        return cls(model.to(torch.bfloat16) if precision == "bf16" else model, process, own, chosen)

    def __call__(
        self,
        mask: Any,
        modality: str = "MR",
        *,
        axis: str = "axial",
        seed: int = 0,
        num_inference_steps: int | None = None,
        first_item: int = 0,
    ) -> Image | list[Image]:
        """8-bit grey PIL images: one of a mask [H, W], a list of masks [B, H, W].

        `mask`: label ids of `labels`, any integer array or a PIL image, of `size` pixels, shown as docs/data.md says.
        Image b has the noise of (seed, first_item + b): at the same precision, those of `segdiff sample` for that item.
        num_inference_steps: null is the exported sampler's. Raises InputProblems.
        """
        from PIL import Image

        mask_BHW, alone = self._checked(np.asarray(mask), modality, axis)
        sampler = replace(self.sampler, num_steps=num_inference_steps or self.sampler.num_steps)
        refuse(sampler.problems(self.diffusion))
        item_ids = list(range(first_item, first_item + len(mask_BHW)))
        made_BHW = replace(self, sampler=sampler).generate(mask_BHW, item_ids, modality, axis, seed)
        images = [Image.fromarray(image_HW) for image_HW in made_BHW]
        return images[0] if alone else images

    @torch.inference_mode()
    def generate(
        self,
        mask_BHW: np.ndarray,
        item_ids: list[int],
        modality: str,
        axis: str,
        seed: int,
        described: str | None = None,
    ) -> np.ndarray:
        """uint8 [B, H, W] of checked masks, each with the noise of (seed, item id), as many at once as fit;
        `described`: the text of a progress bar, if one is wanted."""
        from data_shards.progress import progress_bar

        passes = 1 if self.sampler.guidance == 1.0 else 2
        room = memory_bytes(self.device.type) // (1 if self.device.type == "cuda" else num_cores())
        num = batch_size_for(self.model.config, self.size, passes, room, _MOST_AT_ONCE, latent=self.model.latent)
        class_id = class_ids(torch.tensor(self.model.modalities.index(modality)), torch.tensor(AXES.index(axis)))
        image_BHW = np.empty_like(mask_BHW)
        with progress_bar(total=len(mask_BHW), desc=described, unit="img", disable=described is None) as bar:
            for at in range(0, len(mask_BHW), num):
                rows = list(range(at, min(at + num, len(mask_BHW))))
                # Filled up as in sampling, so that an image alone is rounded as in a larger batch.
                filled = rows + rows[:1] * (LEAST_BATCH - len(rows))
                shown_BHW = torch.from_numpy(mask_BHW[filled]).to(self.device)
                conditions = Conditions(shown_BHW, class_id.expand(len(filled)).to(self.device))
                items = [{"item_id": item_ids[row]} for row in filled]
                made_BHW = generate(self.model, items, conditions, self.diffusion, self.sampler, seed)
                image_BHW[rows] = made_BHW[: len(rows)]
                bar.update(len(rows))
        return image_BHW

    def size_with(self, shards: ShardSet, modality: str) -> int:
        """`size`. Raises InputProblems if the set's slices are not what the model was trained on, or if it does not
        know the modality."""
        table, known = self.model.label_table, self.model.trained_on
        if modality not in known:
            remedy = f"the model knows {', '.join(known)}: choose from these"
            raise problem("command line", "--modality", modality, remedy)
        if table == shards.label_table and self.size <= shards.size:
            return self.size
        value = f"{shards.label_table.name!r} at {shards.size} pixels"
        remedy = f"the model was trained on {table.name!r} at {self.size}: give that set"
        raise problem(shards.root, "label set, size", value, remedy)

    @property
    def size(self) -> int:
        """Rows and columns of masks and images."""
        return self.model.size

    @property
    def labels(self) -> dict[int, str]:
        """The meaning of the ids in a mask."""
        return {i: name for i, name in enumerate(self.model.label_table.names) if name != UNUSED}

    def _checked(self, mask: np.ndarray, modality: str, axis: str) -> tuple[np.ndarray, bool]:
        """uint8 [B, H, W] and whether it was one mask."""
        problems = []

        def check(field: str, good: bool, value: object, remedy: str) -> None:
            if not good:
                problems.append(Problem("pipeline", field, str(value), remedy))

        known = self.model.trained_on
        check("modality", modality in known, modality, f"give one of {', '.join(known)}")
        check("axis", axis in AXES, axis, f"give one of {', '.join(AXES)}")
        fits = mask.ndim in (2, 3) and mask.size > 0 and mask.shape[-2:] == (self.size, self.size)
        check("mask", fits, f"shape {mask.shape}", f"give [H, W] or [B, H, W] of {self.size} x {self.size} pixels")
        whole = mask.dtype.kind in "bui"
        check("mask", whole, f"dtype {mask.dtype}", "give whole numbers, the label ids")
        unknown = sorted(set(np.unique(mask).tolist()) - set(self.labels)) if whole else []
        check("mask", not unknown, f"label ids {unknown}", f"use those of {self.model.label_table.name!r}: .labels")
        refuse(problems)
        return mask.astype(np.uint8).reshape(-1, self.size, self.size), mask.ndim == 2


@dataclass(frozen=True)
class Extras:
    """What a pipeline holds beside its net: the preprocessing of its set and the usual side of its slices in mm (0: not
    known), so that masks of any size can be used; a folder of a segmenter's weights; the first part of the card.
    `precision`: of the stored weights."""

    preprocessing: Mapping[str, Any] | None = None
    field_mm: float = 0.0
    precision: Literal["fp32", "bf16"] = "fp32"
    segmenter: Path | None = None
    about: str | None = None

    @property
    def described(self) -> dict[str, Any]:
        """For segdiff.json."""
        if self.preprocessing is None:
            return {}
        return {"preprocessing": dict(self.preprocessing), "field_mm": round(self.field_mm, 1)}


def pipeline_problems(weights: Path, diffusion: DiffusionConfig, sampler: SamplerConfig) -> list[Problem]:
    """Conflicts between `sampler` and the training of the net in `weights`."""
    own, description = _alone(sampler), read_json(weights / DESCRIPTION, _RESTORE)
    return own.problems(_trained_process(weights, diffusion)) + sampler_problems(own, description)


def write_pipeline(
    weights: Path, folder: Path, diffusion: DiffusionConfig, sampler: SamplerConfig, extras: Extras | None = None
) -> None:
    """Write the model in `weights` (a folder under RUN/weights) as a pipeline into the existing `folder`.

    `diffusion` is used if the weights do not hold theirs. Segmenter guidance and autoguidance are left out, since they
    need other networks.
    """
    import diffusers

    extras = extras or Extras()
    _copy_weights(weights, folder / UNET, extras.precision)
    of_latents = copy_to_pipeline(weights, folder)
    if extras.segmenter is not None:
        _copy_weights(extras.segmenter, folder / SEGMENTER, extras.precision)
    description = read_json(weights / DESCRIPTION, _RESTORE)
    process = _trained_process(weights, diffusion)
    own = _alone(sampler.resolved(process.objective))
    scheduler = scheduler_of(process, own)
    scheduler.save_pretrained(folder / _SCHEDULER)
    content = {"diffusion": process.process, "sampler": asdict(own)} | extras.described
    index = {
        "_class_name": "SegGuidedPipeline",
        "_diffusers_version": diffusers.__version__,
        UNET: ["diffusers", "UNet2DModel"],
        _SCHEDULER: ["diffusers", type(scheduler).__name__],
    } | of_latents
    write_atomic(folder / "model_index.json", json.dumps(index, indent=2) + "\n")
    write_atomic(folder / DESCRIPTION, json.dumps(content, indent=2) + "\n")
    write_atomic(folder / "README.md", _card(description, process.process, own, extras.about))


def _copy_weights(source: Path, target: Path, precision: Literal["fp32", "bf16"]) -> None:
    """The files of a folder of weights."""
    from safetensors.torch import load_file, save_file

    # Not copytree, which puts all errors, also that of a full disk, into an error of its own.
    target.mkdir()
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


def _trained_process(weights: Path, otherwise: DiffusionConfig) -> DiffusionConfig:
    """The facts that sampling needs about the process that the net was trained on."""
    with reading(weights / DESCRIPTION, "the description of a denoiser", _RESTORE):
        said = read_json(weights / DESCRIPTION, _RESTORE).get("diffusion", {})
        process = as_trained(otherwise, said)[0].process
        return validate(DiffusionConfig, process, weights / DESCRIPTION)


def _alone(sampler: SamplerConfig) -> SamplerConfig:
    """The sampler without segmenter guidance and autoguidance, which need another network."""
    guidance = sampler.guidance if sampler.guidance_weights is None else 1.0
    return replace(sampler, segmenter_guidance=0.0, guidance_segmenter=None, guidance=guidance, guidance_weights=None)


def _process_words(process: dict[str, Any]) -> str:
    objective = process.get("objective", "ddpm")
    if objective == "edm":
        return f"EDM's preconditioning with sigma_data {process['sigma_data']:g}, continuous noise levels"
    if objective == "flow":
        return "rectified flow: the net predicts noise - x_0 at t in [0, 1]"
    ends = "with" if process["zero_terminal_snr"] else "without"
    schedule = f"{process['beta_schedule']} schedule of {process['num_train_timesteps']} timesteps"
    return f"the net predicts {process['prediction_type']} on a {schedule} ({ends} zero terminal SNR)"


def _guidance_words(sampler: SamplerConfig) -> str:
    if sampler.guidance == 1.0:
        return ""
    between = sampler.guidance_interval
    where = "" if between is None else f" at noise levels {between[0]:g} to {between[1]:g}"
    return f", guidance {sampler.guidance:g}{where}"


def _card(description: dict[str, Any], process: dict[str, Any], sampler: SamplerConfig, about: str | None) -> str:
    """The model card, in the form of Hugging Face's (Mitchell et al. 2019). `about`: its first part, if any."""
    size, table, net = description["size"], description["label_table"], description["denoiser"]
    known = known_modalities(description, Path(DESCRIPTION))
    modalities = " or ".join(known)
    classes = "\n".join(f"| {i} | {name} |" for i, name in enumerate(table["names"]) if name != UNUSED)
    stem, side = "", DenoiserConfig(net=net.get("net", "unet")).stem  # older descriptions do not name it
    if side > 1:
        count = {2: "four", 4: "sixteen"}[side]
        stem = f""". Each {side}x{side} pixels are {count} channels, in the input
`torch.nn.functional.pixel_unshuffle(x, {side})` and in the output, of which `pixel_shuffle(y, {side})` makes nine
numbers a pixel: the prediction, and what `head` in mask_encoder.safetensors corrects it by"""
    mask = f""" with the encoded
mask ({net["mask_encoding"]}, {net["conditioning"]})"""
    alone = f"""The network alone, without segdiff:
`diffusers.UNet2DModel.from_pretrained("this/folder", subfolder="unet")`. Its input is the noised image{mask}{stem}."""
    if net.get("space") == "latent":
        alone = f"""`unet` works on latents of `vae`, of unit variance: (z - latents_mean) / latents_std of its
config.json. Its input is a noised latent{mask}, whose channels are means over the pixels of a latent position."""
    alone = {
        "spade": """The network needs segdiff: the mask enters at its norms (SPADE), which diffusers' UNet2DModel does
not have.""",
        "controlnet": """The network needs segdiff: a ControlNet reads the mask. diffusers' UNet2DModel loads its base
alone, which reads no mask.""",
        "none": alone.replace(mask, ""),
    }.get(net["conditioning"], alone)
    reads = (
        "the mask, the modality and the axis"
        if net["class_conditioning"]
        else "the mask alone; modality and axis are ignored"
    )
    if net["conditioning"] == "none":
        reads = "no mask, so the image does not follow it"
    return f"""---
library_name: diffusers
pipeline_tag: image-to-image
tags: [medical, ct, mr, segmentation-guided-diffusion, segdiff]
---

# Segmentation-guided diffusion, {size} x {size}
{"" if about is None else f"{chr(10)}{about.strip()}{chr(10)}"}
Generates the {modalities} slice that belongs to a label mask. The network reads {reads}.

```python
import numpy as np
from segdiff_dist.pipeline import SegGuidedPipeline

pipeline = SegGuidedPipeline.from_pretrained("this/folder")
mask = np.load("mask.npy")  # uint8 [{size}, {size}], ids as below
pipeline(mask, modality="{known[-1]}").save("image.png")
```

{alone}

## How it is sampled

{sampler.solver}, {sampler.num_steps} steps, {sampler.timestep_spacing}{_guidance_words(sampler)};
{_process_words(process)}.

## Masks

Label set `{table["name"]}`. Masks are shown the radiological way (the patient's right on the left), cut as the training
slices were.

| id | class |
| --- | --- |
{classes}

## Limits

Images are synthetic. They are for research on methods, not for diagnosis, and may show anatomy that no patient has. The
model may reproduce training images: read the memorisation check of `segdiff evaluate` before you share images. The
licence and the terms of the training data hold for this model too; segdiff, which wrote this card, knows neither.
"""
