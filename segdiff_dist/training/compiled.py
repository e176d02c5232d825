"""`train.compile`: torch.compile, after a check that the compiled network has eager's gradients.

On a CPU, if torch 2.13 may change the layout of convolutions, it compiles diffusers' UNet to one with the right loss
and wrong gradients, without an error. So a compiled network is compared with the eager one before it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from data_shards.files import first_line
from data_shards.problems import problem
from data_shards.records import Batch
from segdiff_dist.ranks.distributed import gather_objects

if TYPE_CHECKING:
    from segdiff_dist.training.task import Task

# Largest allowed distance of the compiled gradient from eager's, relative to its norm: rounding in another order. Known
# wrong gradients differ by 0.4 and more.
_TOLERANCE = {"fp32": 1e-3, "bf16": 0.1}


def compile_checked(task: Task, batch: Batch, precision: str) -> None:
    """Compile the task's model in place. Its parameters keep their names. Call it on every rank.

    Raises InputProblems if it cannot be compiled, or if its gradient of `batch` is not eager's.
    """
    device = batch.image_BHW.device
    if device.type == "cpu":
        import torch._inductor.config

        torch._inductor.config.layout_optimization = False
    why = _why_not(task, batch, precision)
    reason = next((one for one in gather_objects(why) if one is not None), None)
    if reason is not None:
        raise problem(
            "config", "train.compile", "true", f"{reason} (torch {torch.__version__}, {device}); leave it off"
        )
    task.model.compile()


def _why_not(task: Task, batch: Batch, precision: str) -> str | None:
    from torch._dynamo.exc import TorchDynamoException

    eager = _gradients(task, task.model, batch, precision)
    try:
        compiled = _gradients(task, torch.compile(task.model), batch, precision)
    except TorchDynamoException as error:
        return f"this network cannot be compiled here: {first_line(error)}"
    finally:
        task.model.zero_grad(set_to_none=True)
    worst, off = max(((name, _off(compiled[name], g)) for name, g in eager.items()), key=lambda pair: pair[1])
    overall = _off(torch.cat([compiled[n].flatten() for n in eager]), torch.cat([g.flatten() for g in eager.values()]))
    if overall <= _TOLERANCE[precision]:
        return None
    return f"compiled, the gradient is {overall:.1%} off eager's, that of {worst} {off:.1%}"


def _gradients(task: Task, forward: Callable[..., Any], batch: Batch, precision: str) -> dict[str, Tensor]:
    model = task.model
    model.zero_grad(set_to_none=True)
    with torch.autocast(batch.image_BHW.device.type, torch.bfloat16, enabled=precision == "bf16"):
        loss, _ = task.loss(forward, batch)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _off(actual: Tensor, expected: Tensor) -> float:
    """Distance relative to the expected gradient's norm; infinity for NaN."""
    off = float((actual - expected).norm() / expected.norm().clamp(min=1e-12))
    return off if off == off else float("inf")
