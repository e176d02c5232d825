"""The Triton side of segdiff_kernels.sampler_step."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from segdiff_kernels.compile_cases import CompileCase
from segdiff_kernels.sampler_step import BLOCK, StepCoefficients


@triton.jit
def sampler_step_kernel(  # type: ignore[no-untyped-def]
    x_t_ptr,
    prediction_ptr,
    noise_ptr,
    previous_x0_ptr,
    limit_ptr,
    x_prev_ptr,
    x0_ptr,
    numel,
    x0_from_x,
    x0_from_prediction,
    prev_from_x,
    prev_from_prediction,
    prev_from_x0,
    prev_from_previous_x0,
    prev_from_noise,
    BLOCK: tl.constexpr,
):
    """A slice of a sample. Pointers that are None are neither read nor written."""
    sample = tl.program_id(0)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = index < numel
    at = sample.to(tl.int64) * numel + index
    x_t = tl.load(x_t_ptr + at, mask=inside, other=0.0).to(tl.float32)
    p = tl.load(prediction_ptr + at, mask=inside, other=0.0).to(tl.float32)
    x0 = x0_from_x * x_t + x0_from_prediction * p
    if limit_ptr is not None:
        limit = tl.load(limit_ptr + sample)
        # NaN stays NaN, as in torch, so that a faulty net does not give a grey image.
        x0 = tl.minimum(tl.maximum(x0, -limit, propagate_nan=tl.PropagateNan.ALL), limit, tl.PropagateNan.ALL)
        x0 = tl.div_rn(x0, tl.zeros_like(x0) + limit)
    x_prev = prev_from_x * x_t + prev_from_prediction * p + prev_from_x0 * x0
    if previous_x0_ptr is not None:
        x_prev += prev_from_previous_x0 * tl.load(previous_x0_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if noise_ptr is not None:
        x_prev += prev_from_noise * tl.load(noise_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(x_prev_ptr + at, x_prev.to(x_prev_ptr.dtype.element_ty), mask=inside)
    if x0_ptr is not None:
        tl.store(x0_ptr + at, x0.to(x0_ptr.dtype.element_ty), mask=inside)


def launch(inputs: Sequence[Tensor | None], coefficients: Sequence[float], outputs: tuple[Tensor, Tensor]) -> None:
    """Fills x_prev and, if it has elements, x0; see segdiff_kernels.sampler_step."""
    x_prev, x0 = outputs
    batch = x_prev.shape[0]
    numel = x_prev.numel() // batch
    *tensors, limit_B = inputs
    sampler_step_kernel[(batch, triton.cdiv(numel, BLOCK))](
        *tensors,
        None if limit_B is None else limit_B.contiguous(),
        x_prev,
        x0 if x0.numel() else None,
        numel,
        *coefficients,
        BLOCK=BLOCK,
    )


def compile_cases() -> list[CompileCase]:
    """DDIM with all optional inputs, and the second-order step; x_t float32, predictions bfloat16."""
    coefficients = dict.fromkeys(StepCoefficients._fields, "fp32")
    pointers = {
        "x_t_ptr": "*fp32",
        "prediction_ptr": "*bf16",
        "noise_ptr": "*fp32",
        "previous_x0_ptr": "*fp32",
        "limit_ptr": "*fp32",
        "x_prev_ptr": "*fp32",
        "x0_ptr": "*fp32",
    }
    absent = {
        "ddim": ("noise_ptr", "previous_x0_ptr", "x0_ptr"),
        "ddim eta": ("previous_x0_ptr", "x0_ptr"),
        "multistep": ("noise_ptr",),
    }
    return [
        CompileCase(
            f"sampler_step/{name}",
            sampler_step_kernel,
            {**pointers, "numel": "i32", **coefficients},
            {**dict.fromkeys(names), "BLOCK": BLOCK},
            divisible_by_16=(*(pointer for pointer in pointers if pointer not in names), "numel"),
            narrow_loads=1,  # the limit
        )
        for name, names in absent.items()
    ]
