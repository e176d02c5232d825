"""The attention switch: xformers on CUDA, torch's scaled_dot_product_attention elsewhere. This file owns xformers."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any, Literal

from data_shards.problems import problem

if TYPE_CHECKING:
    import torch

AttentionBackend = Literal["auto", "sdpa", "xformers"]


def choose_attention(requested: AttentionBackend, device: torch.device) -> Literal["sdpa", "xformers"]:
    """The backend to use on `device`. Asked for by name and not possible: refused; `auto` takes what is there."""
    available = device.type == "cuda" and importlib.util.find_spec("xformers") is not None
    if requested == "xformers" and not available:
        why = "xformers needs a CUDA GPU" if device.type != "cuda" else "xformers is not installed"
        raise problem(
            "config", "denoiser.attention", "xformers", f"{why}; install the `cuda` extra there, or use auto or sdpa"
        )
    return "xformers" if available and requested != "sdpa" else "sdpa"


def set_attention(unet: Any, backend: Literal["sdpa", "xformers"]) -> None:
    """Make every attention block of a diffusers model compute with `backend`."""
    from diffusers.models.attention_processor import Attention, AttnProcessor2_0, XFormersAttnProcessor

    for module in unet.modules():
        if isinstance(module, Attention):
            module.set_processor(XFormersAttnProcessor() if backend == "xformers" else AttnProcessor2_0())
