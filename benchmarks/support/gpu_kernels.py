"""benchmarks/gpu.py: the device's ceilings, the kernels' parity, and the kernels against torch's operators.

Dimensions: N batch, C channels, H rows, W columns.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from segdiff_kernels import tiles
from support.gpu_session import Session, describe

sys.path.append(str(Path(__file__).resolve().parents[2] / "kernels" / "benchmarks"))
import _bench as kernel_bench

GROUPS = 32
# Largest allowed difference of a kernel from torch's reference, relative to the largest value, for bf16 activations.
PARITY = 1e-2
# The UNet's gradients in fp32, fused against eager, of the largest of all: products in another order too.
UNET_PARITY = 1e-4
# A contender: the norms without the one-pass kernels.
THREE_LAUNCHES = "segdiff, three launches"


def ceilings(session: Session) -> dict[str, float]:
    """The ceilings of the device: GB/s of a copy (read and write counted), TFLOP/s of a bf16 matrix product."""
    num, side, device = session.scale.copy_bytes // 2, session.scale.gemm_side, session.device
    source, target = (torch.zeros(num, dtype=torch.bfloat16, device=device) for _ in range(2))
    copy_s = session.seconds(lambda: target.copy_(source), 20)
    a, b = (torch.randn(side, side, device=device).to(torch.bfloat16) for _ in range(2))
    gemm_s = session.seconds(lambda: a @ b, 20)
    found = {"copy_gb_per_s": 4 * num / copy_s / 1e9, "gemm_tflops": 2 * side**3 / gemm_s / 1e12}
    print(f"  copy {found['copy_gb_per_s']:.0f} GB/s, {side}^3 bf16 product {found['gemm_tflops']:.1f} TFLOP/s")
    return found


def parity(session: Session) -> dict[str, Any]:
    """Every kernel against its torch reference on this device, at the small shapes of its own benchmark."""
    found: dict[str, Any] = {}
    for name, script in kernel_benchmarks().items():
        try:
            toy = kernel_bench.benchmark_of(script).toy
            found[name] = {case.name: kernel_bench.disagreement(case) for case in toy()}
            print(f"  {name:<24} {max(found[name].values()):.1e} of the largest value at most", flush=True)
        except Exception as error:  # the parity of the other kernels is still useful
            found[name] = {"error": describe(error)}
            print(f"  {name:<24} {found[name]['error']}", flush=True)
    errors = [e for cases in found.values() if "error" not in cases for e in cases.values()]
    session.check_target(
        "kernels without parity figures", sum("error" in cases for cases in found.values()), 0, is_limit=True
    )
    if errors:
        session.check_target("largest difference of a kernel from torch", max(errors), PARITY, is_limit=True)
    return found


def kernel_benchmarks() -> dict[str, Path]:
    """kernels/benchmarks' scripts by name; that of the attention has a part of its own."""
    folder = Path(kernel_bench.__file__).parent
    scripts = {path.stem: path for path in sorted(folder.glob("[a-z]*.py"))}
    return {name: path for name, path in scripts.items() if name != "attention"}


def unet_parity(session: Session) -> dict[str, float]:
    """Loss and gradients of the whole UNet, fused against diffusers' own, in fp32 without TF32."""
    from data_shards.labels import AMOS
    from segdiff_dist.attention import set_attention
    from segdiff_dist.denoising.conditioning import MaskEncoder
    from segdiff_dist.denoising.denoiser import Denoiser
    from segdiff_dist.denoising.fused_unet import fuse
    from support.gpu_training import random_batch

    scale, device = session.scale, session.device
    torch.manual_seed(0)
    eager, fused = (Denoiser(scale.net, AMOS, scale.size).unet.to(device) for _ in range(2))
    fused.load_state_dict(eager.state_dict())
    for unet in (eager, fused):
        set_attention(unet, "sdpa")
    fuse(fused, reads_labels=True)
    batch = random_batch(2, scale.size, device)
    x_t_N1HW = torch.randn(2, 1, scale.size, scale.size, device=device)
    timestep_N, class_N = torch.tensor([3, 700], device=device), torch.zeros(2, dtype=torch.int64, device=device)
    onehot_NKHW = MaskEncoder("onehot", AMOS.num_classes, 1)(batch.mask_BHW, torch.float32)
    x_NCHW = torch.cat((x_t_N1HW, onehot_NKHW), dim=1).contiguous(memory_format=torch.channels_last)

    def gradients(net: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        prediction_N1HW = net(*args, return_dict=False, **kwargs)[0]
        loss = F.mse_loss(prediction_N1HW, x_t_N1HW)
        loss.backward()
        return loss.detach(), {name: p.grad for name, p in net.named_parameters() if p.grad is not None}

    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        loss, expected = gradients(eager, x_NCHW, timestep_N, class_labels=class_N)
        fused_loss, grads = gradients(fused, x_t_N1HW, timestep_N, class_N, mask_BHW=batch.mask_BHW)
    finally:
        torch.backends.cudnn.allow_tf32 = allowed
    # Some gradients are 0 except for rounding (a key's bias shifts all scores equally), so none is compared by itself.
    scale_of_all = max(float(g.abs().max()) for g in expected.values())
    largest = {name: float((grads[name] - g).abs().max()) / scale_of_all for name, g in expected.items()}
    worst = max(largest, key=lambda name: largest[name])
    found = {"loss": float((fused_loss - loss).abs() / loss), "largest": largest[worst]}
    print(f"  loss {found['loss']:.1e} off, gradients {found['largest']:.1e} of the largest at most ({worst})")
    session.check_target("UNet's gradients, fused against eager, fp32", found["largest"], UNET_PARITY, is_limit=True)
    return found | {"worst": worst}


# Channels and sides: the largest image, one of middle size, the smallest. All are read once (tiles.one_pass_channels).
ONE_PASS_SHAPES = ((128, 256), (512, 64), (512, 8))


def one_pass(session: Session) -> dict[str, Any]:
    """The norms' forward and backward passes in one kernel, whose programs wait for each other: against three launches,
    and twice, bit for bit, bf16. Raises if one is wrong. If it hangs, only the end of the process helps
    (gpu_pending.sh)."""
    is_real, found = session.device.type == "cuda", {}
    shapes = ONE_PASS_SHAPES if is_real else ((32, 4),)
    norms_of = (norm_forward, partial(norm_forward, given=True), norm_backward)
    for case in (norm(4, channels, side) for channels, side in shapes for norm in norms_of):
        given = case.inputs()
        results = (case.contenders[name](*given) for name in ("segdiff", "segdiff", THREE_LAUNCHES))
        one, again, three = ((result,) if isinstance(result, Tensor) else result for result in results)
        if not all(torch.equal(a, b) for a, b in zip(one, again, strict=True)):
            raise RuntimeError(f"{case.name}: a repeat of the one-pass kernel gives other bits")
        pairs = zip(one, three, strict=True)
        found[case.name] = error = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
        print(f"  {case.name}: {error:.1e} of the largest value at most from three launches", flush=True)
        if not error <= PARITY:
            raise RuntimeError(f"{case.name}: the one-pass kernel differs from three launches by {error:.1e}")
    return found


def norms(session: Session) -> list[dict[str, Any]]:
    """group_norm_silu against torch over the UNet's shapes, forward and backward, bf16, channels-last."""
    batch = session.scale.batches[0]
    shapes = session.scale.norm_shapes or kernel_bench.NORM_SHAPES
    rows: list[dict[str, Any]] = []
    for channels, side in shapes:
        for case in (norm_forward(batch, channels, side), norm_backward(batch, channels, side)):
            rows += kernel_bench.measure(case) if session.device.type == "cuda" else called_once(case)
    if session.device.type == "cuda":
        kernel_bench.print_table(rows)
        ceiling = session.record["parts"].get("ceilings", {}).get("found", {}).get("copy_gb_per_s")
        ours = [row for row in rows if row["contender"] == "segdiff"]
        forward = [row["gb_per_s"] for row in ours if row["case"].startswith("forward") and "gb_per_s" in row]
        backward = [row["times_reference"] for row in ours if "times_reference" in row and "backward" in row["case"]]
        if ceiling and forward:
            share = statistics.median(forward) / ceiling
            session.check_target("group_norm_silu forward, of the copy ceiling (median of shapes)", share, 0.92)
        if backward:
            session.check_target(
                "group_norm_silu backward, times torch (median of shapes)", statistics.median(backward), 3.0
            )
    return rows


def norm_forward(batch: int, channels: int, side: int, *, given: bool = False) -> kernel_bench.Case:
    """Bytes of the two-pass algorithm: x is read for its statistics and read again, y is written. `given`: ours gets
    the partial statistics of x. Ours in one launch and in three."""
    from segdiff_kernels.group_norm_silu import group_norm_silu
    from segdiff_kernels.residual_add import residual_add

    groups = min(GROUPS, channels)

    def inputs() -> tuple[Tensor, ...]:
        x_NCHW = _activation(batch, channels, side)
        weight_C, bias_C = (torch.randn(channels, device=x_NCHW.device) for _ in range(2))
        leaves = x_NCHW, weight_C.to(x_NCHW.dtype), bias_C.to(x_NCHW.dtype)
        if not given:
            return leaves
        sum_NCHW, partials = residual_add(x_NCHW, x_NCHW, with_partials=True)
        return sum_NCHW, *leaves[1:], partials

    def ours(x_NCHW: Tensor, weight_C: Tensor, bias_C: Tensor, partials: Tensor | None = None) -> Tensor:
        y_NCHW: Tensor = group_norm_silu(x_NCHW, weight_C, bias_C, groups, partials=partials)
        return y_NCHW

    contenders = {
        "segdiff": ours,
        THREE_LAUNCHES: in_three_launches(ours),
        "torch": lambda x, w, b, *_: F.silu(F.group_norm(x, groups, w, b, 1e-5)),
    }
    name = f"forward  {batch} x {channels} x {side} x {side}" + " with partials" * given
    return kernel_bench.Case(name, 3 * 2 * batch * channels * side**2, inputs, contenders)


def in_three_launches(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, without the kernels whose programs wait for each other."""

    def slower(*args: Any) -> Any:
        before, tiles.PART_BYTES = tiles.PART_BYTES, 0
        try:
            return function(*args)
        finally:
            tiles.PART_BYTES = before

    return slower


def norm_backward(batch: int, channels: int, side: int) -> kernel_bench.Case:
    """Bytes: dy and x are read for the sums, both are read again, dx is written. Ours in one pass and in three
    launches."""
    forward = norm_forward(batch, channels, side)

    def inputs() -> tuple[Any, ...]:
        leaves = [tensor.requires_grad_() for tensor in forward.inputs()]
        outputs = {name: forward.contenders[name](*leaves) for name in ("segdiff", "torch")}
        return outputs, leaves, _activation(batch, channels, side)

    def of(name: str) -> Any:
        return lambda outputs, leaves, dy: torch.autograd.grad(outputs[name], leaves, dy, retain_graph=True)

    name = f"backward {batch} x {channels} x {side} x {side}"
    contenders = {"segdiff": of("segdiff"), THREE_LAUNCHES: in_three_launches(of("segdiff")), "torch": of("torch")}
    return kernel_bench.Case(name, 5 * 2 * batch * channels * side**2, inputs, contenders)


# Channels, and side of the small image, of the UNet's upsampling convolutions.
UPSAMPLED = ((512, 8), (512, 16), (256, 32), (256, 64), (128, 128))


def upsampling(session: Session) -> list[dict[str, Any]]:
    """Nearest upsampling and its 3x3 convolution, forward and backward, bf16: one transposed convolution against two
    operators."""
    batch, is_real = session.scale.batches[0], session.device.type == "cuda"
    cases = [upsampling_case(batch, channels, side) for channels, side in (UPSAMPLED if is_real else ((16, 4),))]
    rows = [row for case in cases for row in (kernel_bench.measure(case) if is_real else called_once(case))]
    if is_real:
        kernel_bench.print_table(rows)
    return rows


def upsampling_case(batch: int, channels: int, side: int) -> kernel_bench.Case:
    """Bytes: the small image and its gradient, the large output and its gradient twice."""
    from segdiff_dist.denoising.fused_convs import sums_of_weights, upsampled_conv

    def inputs() -> tuple[Tensor, ...]:
        x_NCHW, dy_NCHW = _activation(batch, channels, side), _activation(batch, channels, 2 * side)
        weight_OC33 = 0.02 * _activation(channels, channels, 3)
        return x_NCHW.requires_grad_(), weight_OC33.requires_grad_(), sums_of_weights().to(weight_OC33), dy_NCHW

    def step(function: Any) -> Any:
        return lambda x, weight, sums, dy: torch.autograd.grad(function(x, weight, sums), (x, weight), dy)

    def eager(x_NCHW: Tensor, weight_OC33: Tensor, _: Tensor) -> Tensor:
        return F.conv2d(F.interpolate(x_NCHW, scale_factor=2.0, mode="nearest"), weight_OC33, padding=1)

    contenders = {"segdiff": step(upsampled_conv), "torch": step(eager)}
    name = f"upsampling {batch} x {channels} x {side} x {side}"
    return kernel_bench.Case(name, (2 * 1 + 3 * 4) * 2 * batch * channels * side**2, inputs, contenders)


def kernels(session: Session) -> dict[str, Any]:
    """The other kernels, each by its own benchmark, over its real shapes; in a dry run the parity part is enough."""
    found: dict[str, Any] = {}
    if session.device.type != "cuda":
        return found
    for name, script in kernel_benchmarks().items():
        if name == "group_norm_silu":  # see norms
            continue
        try:
            real = kernel_bench.benchmark_of(script).real
            found[name] = [row for case in real() for row in kernel_bench.measure(case)]
        except Exception as error:  # the results of the others are still useful
            found[name] = {"error": describe(error)}
            print(f"  {name}: {found[name]['error']}", flush=True)
            continue
        kernel_bench.print_table(found[name])
    return found


def _activation(batch: int, channels: int, side: int) -> Tensor:
    x_NCHW = torch.randn(batch, channels, side, side, device=kernel_bench.DEVICE, dtype=torch.bfloat16)
    return x_NCHW.contiguous(memory_format=torch.channels_last)


def called_once(case: kernel_bench.Case) -> list[dict[str, Any]]:
    """A dry run: no times, only the differences of the contenders."""
    return [{"case": case.name, "disagreement": kernel_bench.disagreement(case)}]
