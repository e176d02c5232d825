"""The first convolution by looking labels up, against torch's convolution over the one-hot channels in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernels_support import DEVICE, assert_near, fresh_generator, randn
from torch import Tensor

from segdiff_dist.denoising.conditioning import NULL_MASK, MaskEncoder
from segdiff_kernels.label_conv_in import label_conv_in, label_conv_in_reference

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def case(
    batch: int,
    height: int,
    width: int,
    num_classes: int,
    out_channels: int,
    dtype: torch.dtype = FP32,
    weight_dtype: torch.dtype | None = None,
    soft: bool = False,
) -> dict[str, Any]:
    """Random arguments; some ids are no class, and in the first sample's first row the mask is not shown."""
    generator = fresh_generator()
    mask = torch.randint(0, num_classes + 1, (batch, height, width), generator=generator)
    mask[0, 0] = NULL_MASK
    share = torch.randint(0, 256, (batch, 1, height, width), generator=generator)
    second = torch.randint(0, num_classes + 1, (batch, 1, height, width), generator=generator)
    share[0, :, 0] = 255
    edge = torch.cat((second, share), dim=1).to(DEVICE, torch.uint8)
    weight_dtype = weight_dtype or dtype
    return {
        "x_B1HW": randn(generator, batch, 1, height, width, dtype=dtype).requires_grad_(),
        "mask_BHW": mask.to(DEVICE, torch.uint8),
        "weight_OC33": randn(generator, out_channels, 1 + num_classes, 3, 3, dtype=weight_dtype)
        .contiguous()
        .requires_grad_(),
        "bias_O": randn(generator, out_channels, dtype=weight_dtype).requires_grad_(),
        "edge_B2HW": edge if soft else None,
    }


def in_float64(arguments: dict[str, Any]) -> dict[str, Any]:
    """Leaves of their own, floats in double."""

    def double(value: Any) -> Any:
        is_float = isinstance(value, Tensor) and value.is_floating_point()
        return value.detach().double().requires_grad_() if is_float else value

    return {name: double(value) for name, value in arguments.items()}


def gradients(out: Tensor, arguments: dict[str, Any], dout: Tensor) -> tuple[Tensor, ...]:
    """Of x, weight and bias."""
    leaves = [arguments[name] for name in ("x_B1HW", "weight_OC33", "bias_O")]
    return torch.autograd.grad(out, leaves, dout.to(out.dtype))


@pytest.mark.parametrize(
    ("shape", "dtype", "weight_dtype", "soft"),
    [
        ((2, 13, 9, 17, 24), FP32, FP32, False),
        ((2, 9, 7, 17, 24), FP32, FP32, True),
        ((2, 9, 7, 17, 24), BF16, BF16, True),
        ((1, 6, 11, 17, 128), BF16, FP32, False),
        ((1, 5, 7, 3, 20), FP16, FP16, True),
        ((1, 5, 7, 3, 20), FP16, FP32, False),
        ((2, 4, 4, 3, 8), FP32, BF16, False),
        ((1, 1, 1, 1, 1), FP32, FP32, False),
        ((3, 1, 5, 1, 3), FP32, FP32, True),
        ((1, 7, 3, 40, 130), FP32, FP32, True),  # more classes and channels than a tile holds
    ],
)
def test_output_and_gradients(
    shape: tuple[int, ...], dtype: torch.dtype, weight_dtype: torch.dtype, soft: bool
) -> None:
    arguments = case(*shape, dtype=dtype, weight_dtype=weight_dtype, soft=soft)
    out = label_conv_in(**arguments)
    exact_arguments = in_float64(arguments)
    exact = label_conv_in_reference(**exact_arguments)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert_near(out.detach(), exact.detach())

    dout = randn(fresh_generator(), *out.shape, dtype=dtype)
    found = gradients(out, arguments, dout)
    assert [g.dtype for g in found] == [dtype, weight_dtype, weight_dtype]
    tolerance = 1e-2 if BF16 in (dtype, weight_dtype) else None
    for one, expected in zip(found, gradients(exact, exact_arguments, dout), strict=True):
        assert_near(one, expected, tolerance)


def test_the_reference_is_the_networks_first_convolution() -> None:
    arguments = case(2, 6, 5, 4, 8, soft=True)
    channels = MaskEncoder("onehot", 4, 1)(arguments["mask_BHW"], FP32, arguments["edge_B2HW"])
    conv_in = torch.nn.Conv2d(5, 8, kernel_size=3, padding=1).to(DEVICE)
    conv_in.weight, conv_in.bias = (torch.nn.Parameter(arguments[k].detach()) for k in ("weight_OC33", "bias_O"))
    expected = conv_in(torch.cat((arguments["x_B1HW"], channels), dim=1))
    assert_near(label_conv_in_reference(**arguments).detach(), expected.detach())


def test_pixels_summed_in_several_parts() -> None:
    # Ten tiles in three parts, the last tile and the last part not full.
    arguments = case(1, 20, 30, 2, 4, dtype=BF16, weight_dtype=FP32)
    dout = randn(fresh_generator(), 1, 4, 20, 30, dtype=BF16)
    exact_arguments = in_float64(arguments)
    exact = gradients(label_conv_in_reference(**exact_arguments), exact_arguments, dout)
    operator = torch.ops.segdiff.label_conv_in_weight_gradient
    dweight, dbias = operator(dout, arguments["x_B1HW"].detach(), arguments["mask_BHW"], None, 3)
    assert_near(dweight, exact[1])  # float32 sums of products that bfloat16 holds: to float32's tolerance
    assert_near(dbias, exact[2])


def test_a_mask_that_is_not_shown_adds_nothing() -> None:
    arguments = case(2, 6, 6, 5, 8)
    arguments["mask_BHW"] = torch.full_like(arguments["mask_BHW"], NULL_MASK)
    image_only = torch.nn.functional.conv2d(
        arguments["x_B1HW"], arguments["weight_OC33"][:, :1], arguments["bias_O"], padding=1
    )
    assert_near(label_conv_in(**arguments).detach(), image_only.detach().double())


def test_a_gradient_of_any_layout_and_only_those_asked_for() -> None:
    arguments = case(2, 5, 6, 3, 8)
    arguments["x_B1HW"] = arguments["x_B1HW"].detach()
    out = label_conv_in(**arguments)
    out.sum().backward()  # its gradient is one number, expanded
    assert_near(arguments["bias_O"].grad, torch.full((8,), 60.0, dtype=torch.float64))
    assert arguments["x_B1HW"].grad is None


def test_the_operators_are_ones_that_torch_can_trace() -> None:
    soft = tuple(case(1, 3, 4, 2, 8, soft=True).values())
    torch.library.opcheck(torch.ops.segdiff.label_conv_in.default, soft)
    x, mask, weight, bias, edge = (t.detach() for t in soft)
    dout = randn(fresh_generator(), 1, 8, 3, 4)
    for operator, arguments in (
        (torch.ops.segdiff.label_conv_in.default, (x, mask, weight, bias, None)),
        (torch.ops.segdiff.label_conv_in_weight_gradient.default, (dout, x, mask, edge, 3)),
        (torch.ops.segdiff.label_conv_in_weight_gradient.default, (dout, x, mask, None, 3)),
        (torch.ops.segdiff.label_conv_in_input_gradient.default, (dout, weight)),
    ):
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"x_B1HW": torch.zeros(2, 1, 4, 6, dtype=torch.float64)}, "x: float64"),
        ({"x_B1HW": torch.zeros(2, 2, 4, 6)}, "x: shape"),
        ({"x_B1HW": torch.zeros(2, 1, 6, 4).mT}, "x: strides"),
        ({"mask_BHW": torch.zeros(2, 4, 6, dtype=torch.int64)}, "mask: int64"),
        ({"mask_BHW": torch.zeros(2, 6, 4, dtype=torch.uint8)}, r"mask: \(2, 6, 4\)"),
        ({"mask_BHW": torch.zeros(2, 6, 4, dtype=torch.uint8).mT}, "mask: strides"),
        ({"edge_B2HW": torch.zeros(2, 1, 4, 6, dtype=torch.uint8)}, "edge"),
        ({"weight_OC33": torch.zeros(8, 4, 1, 1)}, "weight: shape"),
        ({"weight_OC33": torch.zeros(8, 1, 3, 3)}, "weight: shape"),
        ({"weight_OC33": torch.zeros(8, 257, 3, 3)}, "weight: shape"),
        ({"weight_OC33": torch.zeros(8, 4, 3, 3, dtype=torch.int8)}, "weight: int8"),
        ({"bias_O": torch.zeros(7)}, r"bias: \(7,\)"),
        ({"bias_O": torch.zeros(8, device="meta")}, "bias: meta"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changed: dict[str, Tensor], named: str) -> None:
    on_device = {name: tensor if tensor.is_meta else tensor.to(DEVICE) for name, tensor in changed.items()}
    with pytest.raises(ValueError, match=f"label_conv_in: {named}"):
        label_conv_in(**(case(2, 4, 6, 3, 8) | on_device))


def test_without_an_engine_it_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cuda":
        pytest.skip("there is a GPU")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="need a GPU"):
        label_conv_in(**case(1, 4, 4, 2, 8))
