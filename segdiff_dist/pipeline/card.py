"""The model card, in the form of Hugging Face's (Mitchell et al. 2019)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_shards import __version__
from data_shards.labels import UNUSED
from segdiff_dist.denoising.config import DenoiserConfig
from segdiff_dist.denoising.denoiser import known_modalities
from segdiff_dist.denoising.sampler_config import SamplerConfig
from segdiff_dist.pipeline.description import DESCRIPTION


@dataclass(frozen=True)
class CardParts:
    """What the exporting command knows, each part None if it does not. `about`: the card's first part. `measured`: a
    section with numbers. `data_digest`: of the shard set of the training. `data_licence`: as the exporting person says.
    `picture`: the name of a file. `use`: how the model is used, if it is no pipeline of diffusers."""

    about: str | None = None
    measured: str | None = None
    data_digest: str | None = None
    data_licence: str | None = None
    picture: str | None = None
    use: str | None = None


def _process_words(process: Mapping[str, Any]) -> str:
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


def _shift_words(sampler: SamplerConfig) -> str:
    if sampler.sigma_shift == 1.0:
        return ""
    low, high = sampler.sigma_shift_interval
    return f"at noise levels {low:g} to {high:g} the network is given {sampler.sigma_shift:g} times the level;\n"


def _air_words(sampler: SamplerConfig) -> str:
    return "where the mask has air, images are made black;\n" if sampler.clear_air else ""


def card(description: Mapping[str, Any], process: Mapping[str, Any], sampler: SamplerConfig, parts: CardParts) -> str:
    """The card of a net whose segdiff.json is `description`, trained on this process."""
    size, table, net = description["size"], description["label_table"], description["denoiser"]
    known = known_modalities(description, Path(DESCRIPTION))
    modalities = " or ".join(known)
    classes = "\n".join(f"| {i} | {name} |" for i, name in enumerate(table["names"]) if name != UNUSED)
    reads = (
        "the mask, the modality and the axis"
        if net["class_conditioning"]
        else "the mask alone; modality and axis are ignored"
    )
    if net["conditioning"] == "none":
        reads = "no mask, so the image does not follow it"
    use = parts.use or f"{_use(size, known[-1])}\n{_network_alone(net)}"
    return f"""---
library_name: {"diffusers" if parts.use is None else "monai"}
pipeline_tag: image-to-image
tags: [medical, ct, mr, synthetic, segmentation-guided-diffusion, segdiff]
---

# Segmentation-guided diffusion, {size} x {size}
{_section(parts.about)}
**Its images are synthetic.** Generates the {modalities} slice that belongs to a label mask.
The network reads {reads}.

{use}
{_picture(parts.picture)}
## How it is sampled

{sampler.solver}, {sampler.num_steps} steps, {sampler.timestep_spacing}{_guidance_words(sampler)};
{_shift_words(sampler)}{_air_words(sampler)}{_process_words(process)}.

## Masks

Label set `{table["name"]}`. Masks are shown the radiological way (the patient's right on the left), cut as the training
slices were.

| id | class |
| --- | --- |
{classes}
{_section(parts.measured)}
## Training data

{_data(parts)}

## Limits

Images are synthetic. They are for research on methods, not for diagnosis, and may show anatomy that no patient has. The
model may reproduce training images: read the memorisation check of `segdiff evaluate` before you share images. The
licence and the terms of the training data hold for this model too.
"""


def _use(size: int, modality: str) -> str:
    return f"""```python
import numpy as np
from segdiff_dist.pipeline import SegGuidedPipeline

pipeline = SegGuidedPipeline.from_pretrained("this/folder")
mask = np.load("mask.npy")  # uint8 [{size}, {size}], ids as below
pipeline(mask, modality="{modality}").save("image.png")
```

The same through diffusers. It runs `pipeline.py` of this folder, which needs the package segdiff-dist ({__version__} or
later); without the package it stops with a line that names it:

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("this/folder", trust_remote_code=True)
pipeline(mask, modality="{modality}", seed=0).images[0].save("image.png")
```
"""


def _section(text: str | None) -> str:
    return "" if text is None else f"\n{text.strip()}\n"


def _picture(file: str | None) -> str:
    if file is None:
        return ""
    return f"""
![Label masks, and the images that the model made of them]({file})

*Top: masks. Below each: the synthetic image that the model made of it.*
"""


def _data(parts: CardParts) -> str:
    licence = "not stated; segdiff, which wrote this card, does not know it"
    lines = [f"Licence: {parts.data_licence or licence}."]
    if parts.data_digest is not None:
        lines.append(f"Shard set: sha256 `{parts.data_digest}` of its index.json, which has the digests of all files.")
    return "\n".join(lines)


def _network_alone(net: dict[str, Any]) -> str:
    """What the network reads, for use without segdiff."""
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
    if net.get("cascade") is not None:
        alone = """The network needs segdiff: it enlarges the images of the denoiser in `unet/low_resolution`, and an
embedding says how much noise these got."""
    return {
        "spade": """The network needs segdiff: the mask enters at its norms (SPADE), which diffusers' UNet2DModel does
not have.""",
        "controlnet": """The network needs segdiff: a ControlNet reads the mask. diffusers' UNet2DModel loads its base
alone, which reads no mask.""",
        "none": alone.replace(mask, ""),
    }.get(net["conditioning"], alone)
