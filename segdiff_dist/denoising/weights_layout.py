"""Which weights of a denoiser are in which file of its folder, and under which names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from segdiff_dist.denoising.config import DenoiserConfig
from segdiff_dist.weight_files import MODEL_FILE

if TYPE_CHECKING:
    from torch import Tensor

# Prefixes of the weights' names, and their files: the UNet's has diffusers' name, the last one holds all others.
_UNET, UNET_FILE = "unet.", "diffusion_pytorch_model.safetensors"
_CONTROL, _CONTROL_FILE = "control.", "control.safetensors"
_FILES = ((_UNET, UNET_FILE), (_CONTROL, _CONTROL_FILE))
_OTHERS_FILE = "mask_encoder.safetensors"
# Parts of a model that are not of its weights: the lower stage, and what only training has (siamese.py).
_LOWER_NET, _IMAGE_PRIOR = "lower_net.", "image_prior."


def tensors_by_file(weights: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of each file of a folder, as files_in lists them. Those of a lower stage are in a folder of theirs,
    and only training has an image prior."""
    files: dict[str, dict[str, Tensor]] = {UNET_FILE: {}}
    for name, value in weights.items():
        if name.startswith((_LOWER_NET, _IMAGE_PRIOR)):
            continue
        prefix, file = next(((p, f) for p, f in _FILES if name.startswith(p)), ("", _OTHERS_FILE))
        files.setdefault(file, {})[name.removeprefix(prefix)] = value.contiguous()
    return files


def files_in(folder: Path, config: DenoiserConfig) -> list[tuple[str, Path]]:
    """The files of a net's weights, each with the prefix of its names in the net."""
    if (folder / MODEL_FILE).is_file():
        return [("", folder / MODEL_FILE)]
    files = [(_UNET, folder / UNET_FILE)]
    if (folder / _OTHERS_FILE).is_file():
        files.append(("", folder / _OTHERS_FILE))
    if config.conditioning == "controlnet":
        files.append((_CONTROL, folder / _CONTROL_FILE))
    return files
