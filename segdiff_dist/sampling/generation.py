"""Images of items by one model: the sampler with its guidance and, of a cascade, the stages below.

Dimensions: B batch, C channels, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from data_shards.problems import problem

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from segdiff_dist.denoising.conditioning import Conditions
    from segdiff_dist.denoising.config import DiffusionConfig
    from segdiff_dist.denoising.replayed import Net
    from segdiff_dist.denoising.sampler_config import SamplerConfig
    from segdiff_dist.denoising.samplers import Guide


@dataclass(frozen=True)
class PassOptions:
    """What takes part in the passes through the net besides its conditions. `weaker`: the net of autoguidance.
    `on_pass`: called after each evaluation of a noise level; what it raises ends the work."""

    guide: Guide | None = None
    weaker: Net | None = None
    on_pass: Callable[[], None] | None = None


def generate(
    model: Net,
    items: list[dict[str, Any]],
    conditions: Conditions,
    diffusion: DiffusionConfig,
    sampler: SamplerConfig,
    seed: int | Tensor,
    options: PassOptions = PassOptions(),  # frozen
) -> np.ndarray:
    """uint8 [B, H, W] images of the items under their conditions; noise is keyed by (seed, item_id). `seed`: a number,
    or int64 [B, 1], one for each item.

    Raises InputProblems with the items if values of the net or the solver are not finite.
    """
    from segdiff_dist.denoising.samplers import clear_air
    from segdiff_dist.pixels import to_uint8

    conditions = _with_lower_stage(model, items, conditions, sampler, seed, options)
    x_0_BCHW = _sampled(model, items, conditions, diffusion, sampler, seed, options)
    images_BCHW = x_0_BCHW if model.space is None else model.space.decode(x_0_BCHW)
    _refuse_not_finite(items, images_BCHW.flatten(1).isfinite().all(dim=1).tolist())
    body_id = model.label_table.body_id
    if sampler.clear_air and body_id is not None:
        images_BCHW = clear_air(images_BCHW, conditions.mask_BHW, body_id)
    return to_uint8(images_BCHW).cpu().numpy()


def _with_lower_stage(
    model: Net,
    items: list[dict[str, Any]],
    conditions: Conditions,
    sampler: SamplerConfig,
    seed: int | Tensor,
    options: PassOptions,
    stage: int = 0,
) -> Conditions:
    """The conditions with the images of the lower stage of a cascade, augmented; `stage`: of the model, from the top.

    The noise of a stage has streams of its own, so that it does not depend on the noise of another.
    """
    import torch

    from segdiff_dist.denoising.cascade import augmentation_noise, augmented

    if model.lower is None:
        return conditions
    assert model.lower_net is not None
    own, alone = sampler.alone, PassOptions(on_pass=options.on_pass)
    below = _with_lower_stage(model.lower_net, items, conditions, own, seed, alone, stage + 1)
    z_B1hw = _sampled(model.lower_net, items, below, model.lower.diffusion, own, seed, alone, stage + 1)
    item_B = _item_ids(items, z_B1hw.device)
    level_B = torch.full((len(items),), sampler.augmentation, device=z_B1hw.device)
    noise_B1hw = augmentation_noise(seed, item_B, model.lower.side, stage)
    low_B1hw = augmented(z_B1hw.clamp(-1.0, 1.0), level_B, noise_B1hw)
    return conditions._replace(low_B1hw=low_B1hw, level_B=level_B)


def _item_ids(items: list[dict[str, Any]], device: torch.device) -> Tensor:
    import torch

    return torch.tensor([item["item_id"] for item in items], device=device)


def _sampled(
    model: Net,
    items: list[dict[str, Any]],
    conditions: Conditions,
    diffusion: DiffusionConfig,
    sampler: SamplerConfig,
    seed: int | Tensor,
    options: PassOptions,
    stage: int = 0,
) -> Tensor:
    """float32 [B, C, h, w]: x_0 of the net, as it denoises it; as `generate`."""
    import torch

    from segdiff_dist.denoising import samplers
    from segdiff_dist.denoising.conditioning import guided
    from segdiff_kernels import philox

    item_B = _item_ids(items, conditions.mask_BHW.device)
    side, space = conditions.mask_BHW.shape[-1], model.space
    shape = (1, side, side) if space is None else space.shape(side)

    def noise(step: int) -> Tensor:
        """Step -1 is the start; each step of each item has its own counters."""
        return philox.normal(seed, philox.STREAM_SAMPLE + philox.STREAM_STAGE * stage + 1 + step, item_B, shape)

    finite_B = torch.ones(len(items), dtype=torch.bool, device=item_B.device)

    def watched(guidance: float) -> Callable[[Tensor, Tensor], Tensor]:
        predict = guided(model, conditions, guidance, sampler.guidance_removes, options.weaker)
        return _watched(predict, finite_B, options.on_pass)

    x_0_BCHW = samplers.sample(
        watched(sampler.guidance),
        diffusion,
        sampler if space is None else space.bounds(sampler),
        noise(-1),
        noise,
        options.guide,
        unguided=None if sampler.guidance_interval is None else watched(1.0),
        fused=model.uses_kernels,
    )
    finite_B.logical_and_(x_0_BCHW.flatten(1).isfinite().all(dim=1))
    _refuse_not_finite(items, finite_B.tolist())
    return x_0_BCHW


def _watched(
    predict: Callable[[Tensor, Tensor], Tensor], finite_B: Tensor, on_pass: Callable[[], None] | None
) -> Callable[[Tensor, Tensor], Tensor]:
    """Check the prediction before clipping can hide values that are not finite; on its device, so that nothing
    waits."""

    def predict_and_look(x_BCHW: Tensor, timestep_B: Tensor) -> Tensor:
        prediction_BCHW = predict(x_BCHW, timestep_B)
        finite_B.logical_and_(prediction_BCHW.flatten(1).isfinite().all(dim=1))
        if on_pass is not None:
            on_pass()
        return prediction_BCHW

    return predict_and_look


def _refuse_not_finite(items: list[dict[str, Any]], is_finite: list[bool]) -> None:
    ids = sorted({item["item_id"] for item, good in zip(items, is_finite, strict=True) if not good})
    if not ids:
        return
    more = f" and {len(ids) - 8} more" if len(ids) > 8 else ""
    value = f"not finite, in items {', '.join(map(str, ids[:8]))}{more}"
    remedy = "sample from other weights (another average, an earlier checkpoint), or in fp32 if it was bf16"
    raise problem("denoiser", "prediction", value, remedy)
