"""GroupNorm's gradients over channels-last on a CPU: segdiff_dist.cpu_norm compared with torch's own, over the UNet's
shapes.

bf16 images with weights in bf16, as DeepSpeed trains them, on one thread; megavalues of x a second. torch is timed in
both layouts, so that its time with row-major tensors is known too.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import torch
import torch.nn.functional as F
from support.harness import Contender, arguments, compare, measure, report
from torch import Tensor

from segdiff_dist.cpu_norm import group_norm
from segdiff_dist.ranks.cpu_memory import keep_freed_memory

# Images, channels and side: of the paper's network at its resolutions, and of a small one at 64x64.
SHAPES = ((2, 128, 256), (2, 128, 128), (2, 256, 64), (2, 512, 16), (8, 32, 64), (8, 64, 32), (8, 128, 16))
_REPEATS = 5


def gradients(
    norm: Callable[..., Tensor], shape: tuple[int, int, int], layout: torch.memory_format, repeats: int
) -> Contender:
    """Times the backward pass alone, from an output that is kept."""
    n, c, side = shape

    def turn() -> tuple[float, float]:
        x_NCHW, dy_NCHW = (
            torch.randn(n, c, side, side).bfloat16().contiguous(memory_format=layout).requires_grad_() for _ in range(2)
        )
        weight_C, bias_C = (torch.randn(c).bfloat16().requires_grad_() for _ in range(2))
        leaves = (x_NCHW, weight_C, bias_C)
        y_NCHW = norm(x_NCHW, 32, weight_C, bias_C, 1e-5)
        torch.autograd.grad(y_NCHW, leaves, dy_NCHW.detach(), retain_graph=True)
        start = time.perf_counter()
        for _ in range(repeats):
            torch.autograd.grad(y_NCHW, leaves, dy_NCHW.detach(), retain_graph=True)
        return repeats * x_NCHW.numel() / 1e6, time.perf_counter() - start

    return turn


def main() -> None:
    args = arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    shapes, repeats = (SHAPES[-2:], 1) if args.quick else (SHAPES, _REPEATS)
    contenders: dict[str, Contender] = {}
    ratios = []
    for n, c, side in shapes:
        name = f"{n}x{c}x{side}x{side}"
        contenders |= {
            f"ours {name}": gradients(group_norm, (n, c, side), torch.channels_last, repeats),
            f"torch {name}": gradients(F.group_norm, (n, c, side), torch.channels_last, repeats),
            f"torch in rows {name}": gradients(F.group_norm, (n, c, side), torch.contiguous_format, repeats),
        }
        ratios.append((f"ours {name}", f"torch {name}"))
    rates = measure(contenders, 1 if args.quick else args.rounds)
    report(args, rates, [compare(rates, *pair) for pair in ratios], unit="megavalues a second")


if __name__ == "__main__":
    main()
