"""All uses of diffusers' undocumented parts, for the versions in which they were checked.

The networks' blocks, which fused_unet.py and cpu_unet.py give other forward functions; how a block recomputes
activations; and how a scheduler gets a given grid. Another version is refused when this file is imported.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from data_shards import lean_imports
from segdiff_dist.library_versions import require_supported

# To raise the upper bound in library_versions.py: read these parts in the new version, and run
# tests/unit/test_fused_unet.py, test_cpu_norm.py and test_samplers.py with it.
require_supported("diffusers")

if lean_imports.are_on():
    # Schedulers that this project does not use import scipy.stats, 1.5 s of processor time.
    with lean_imports.without_package_map():
        from diffusers.utils import import_utils

    import_utils._scipy_available = False

from diffusers import (  # noqa: E402
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from diffusers.models.attention_processor import Attention  # noqa: E402
from diffusers.models.resnet import ResnetBlock2D  # noqa: E402
from diffusers.models.unets import unet_2d_blocks as blocks  # noqa: E402
from diffusers.models.unets.unet_2d import UNet2DOutput  # noqa: E402
from diffusers.models.upsampling import Upsample2D  # noqa: E402

__all__ = [
    "Attention",
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "ResnetBlock2D",
    "UNet2DModel",
    "UNet2DOutput",
    "UniPCMultistepScheduler",
    "Upsample2D",
    "blocks",
    "recomputed",
    "respaced",
]


def recomputed(block: Any, module: nn.Module, *inputs: Any) -> Any:
    """module(*inputs) of a block; or, keeping only its inputs, with the rest computed again in the backward pass."""
    if torch.is_grad_enabled() and block.gradient_checkpointing:
        return block._gradient_checkpointing_func(module, *inputs)
    return module(*inputs)


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
