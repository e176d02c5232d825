"""All uses of diffusers' undocumented parts, for the versions in which they were checked.

The networks' blocks, which fused_unet.py and cpu_unet.py give other forward functions; how a block recomputes
activations; and how a scheduler gets a given grid. Another version is refused when this file is imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from data_shards import lean_imports
from segdiff_dist.library_versions import require_supported

# To raise the upper bound in library_versions.py: read these parts in the new version, and run
# tests/unit/test_fused_unet.py, test_cpu_norm.py and test_samplers.py with it.
require_supported("diffusers")


@contextmanager
def _without_compiler() -> Iterator[None]:
    """A context in which diffusers does not load torch's compiler, 1 s of processor time, if lean imports are on.

    Only its caches and its offloading, which this project does not use, ask for the compiler when they are imported.
    """
    if not lean_imports.are_on():
        yield
        return
    before = torch.compiler.disable
    torch.compiler.disable = lambda fn=None, *_, **__: (lambda function: function) if fn is None else fn
    try:
        with lean_imports.without("torch._dynamo"):
            yield
    finally:
        torch.compiler.disable = before


if lean_imports.are_on():
    # Schedulers that this project does not use import scipy.stats, 1.5 s of processor time.
    with lean_imports.without_package_map(), _without_compiler():
        from diffusers.utils import import_utils

    import_utils._scipy_available = False

with _without_compiler():
    from diffusers import (
        DDIMScheduler,
        DPMSolverMultistepScheduler,
        ModelMixin,
        UNet2DModel,
        UniPCMultistepScheduler,
    )
    from diffusers.models.attention_processor import Attention
    from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding, zero_module
    from diffusers.models.downsampling import Downsample2D
    from diffusers.models.embeddings import TimestepEmbedding, Timesteps
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.unets import unet_2d_blocks as blocks
    from diffusers.models.unets.unet_2d import UNet2DOutput
    from diffusers.models.upsampling import Upsample2D

__all__ = [
    "Attention",
    "ControlNetConditioningEmbedding",
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "Downsample2D",
    "ModelMixin",
    "ResnetBlock2D",
    "TimestepEmbedding",
    "Timesteps",
    "UNet2DModel",
    "UNet2DOutput",
    "UniPCMultistepScheduler",
    "Upsample2D",
    "blocks",
    "respaced",
    "run_checkpointed",
    "run_down_and_mid",
    "run_up",
    "zero_module",
]


def run_checkpointed(block: Any, module: nn.Module, *inputs: Any) -> Any:
    """module(*inputs) of a block; or, keeping only its inputs, with the rest computed again in the backward pass."""
    if torch.is_grad_enabled() and block.gradient_checkpointing:
        return block._gradient_checkpointing_func(module, *inputs)
    return module(*inputs)


def run_down_and_mid(
    net: Any, x_BCHW: Tensor, timestep_B: Tensor, labels_B: Tensor | None, added_BCHW: Tensor | None = None
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The first half of UNet2DModel.forward: what the middle block gives, the embedding of time and class, the skips.

    `net`: a UNet2DModel, or a module with its encoder's parts. `added_BCHW`: is added to the first convolution.
    """
    emb_BE = net.time_embedding(net.time_proj(timestep_B).to(x_BCHW.dtype))
    if net.class_embedding is not None:
        emb_BE = emb_BE + net.class_embedding(labels_B).to(x_BCHW.dtype)
    h_BCHW = net.conv_in(x_BCHW)
    skips = [h_BCHW if added_BCHW is None else h_BCHW + added_BCHW]
    h_BCHW = skips[0]
    for block in net.down_blocks:
        h_BCHW, more = block(hidden_states=h_BCHW, temb=emb_BE)
        skips += more
    return net.mid_block(h_BCHW, emb_BE), emb_BE, skips


def run_up(unet: UNet2DModel, mid_BCHW: Tensor, emb_BE: Tensor, skips: list[Tensor]) -> Tensor:
    """The second half: the up blocks and the output convolution."""
    h_BCHW = mid_BCHW
    for block in unet.up_blocks:
        skips, taken = skips[: -len(block.resnets)], skips[-len(block.resnets) :]
        h_BCHW = block(h_BCHW, tuple(taken), emb_BE)
    made_BCHW: Tensor = unet.conv_out(unet.conv_act(unet.conv_norm_out(h_BCHW)))
    return made_BCHW


def respaced(scheduler_class: Any, a_S: Tensor, **settings: Any) -> Any:
    """A scheduler for predicted x_0, whose only timesteps, S - 1 down to 0, are the alpha_bars a_S of a falling grid.

    So all solvers use one grid, of any S. DDIMScheduler's own strides miss the next timestep if S does not divide T,
    and the leading and linspace spacings of the others differ from it. Respacing: Nichol and Dhariwal 2021, section 4.
    """
    a_up_S = a_S.flip(0)
    betas_S = 1.0 - a_up_S / torch.cat((a_up_S.new_ones(1), a_up_S[:-1]))
    spacing = {"timestep_spacing": "trailing", "prediction_type": "sample"}
    scheduler = scheduler_class(num_train_timesteps=len(a_S), trained_betas=betas_S.tolist(), **spacing, **settings)
    scheduler.alphas_cumprod = a_up_S  # bit for bit; small values would lose digits in float32 betas
    scheduler.set_timesteps(len(a_S))
    return scheduler
