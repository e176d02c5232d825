"""weighted_mse against float64, loss, errors and gradient; one order of summation; what it refuses."""

from __future__ import annotations

import pytest
import torch
from kernels_support import DEVICE, assert_near, fresh_generator, randn
from torch import Tensor

from segdiff_kernels.weighted_mse import BLOCK, num_slices, weighted_mse, weighted_mse_reference

# One element; one block and one more; several blocks with channels; more samples, or slices, than the last sum's tile.
SHAPES = [(1, 1, 1, 1), (2, 1, 3, 683), (3, 4, 32, 37), (17, 1, 1, 3), (1, 1, 1, 64 * BLOCK + 1)]


def inputs(shape: tuple[int, ...], dtype: torch.dtype, target_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = fresh_generator()
    prediction, target = randn(generator, *shape, dtype=dtype), randn(generator, *shape, dtype=target_dtype)
    return prediction.requires_grad_(), target, torch.rand(shape[0], generator=generator).to(DEVICE) + 0.1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("dtype", "target_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)],
)
def test_loss_errors_and_gradient_are_those_of_float64(
    shape: tuple[int, ...], dtype: torch.dtype, target_dtype: torch.dtype
) -> None:
    prediction, target, weight = inputs(shape, dtype, target_dtype)
    exact = prediction.detach().double().requires_grad_()
    expected_loss, expected_error = weighted_mse_reference(exact, target.double(), weight.double())
    expected_loss.backward()

    loss, error = weighted_mse(prediction, target, weight)
    # A gradient as a loss scale gives it: without it float16's would be below its smallest number.
    scale = float(prediction.numel())
    (loss * scale).backward()

    assert loss.dtype == error.dtype == torch.float32
    assert prediction.grad.dtype == dtype
    assert prediction.grad.stride() == prediction.stride()
    assert not error.requires_grad
    assert_near(loss.detach(), expected_loss.detach())
    assert_near(error, expected_error)
    assert_near(prediction.grad, exact.grad * scale)


def test_without_gradient_none_is_written() -> None:
    prediction, target, weight = inputs((2, 1, 8, 8), torch.float32, torch.float32)
    with torch.no_grad():
        loss, error = weighted_mse(prediction, target, weight)
    assert not loss.requires_grad
    assert torch.ops.segdiff.weighted_mse(prediction.detach(), target, weight, False)[2].numel() == 0
    expected_loss, expected_error = weighted_mse_reference(prediction.detach(), target, weight)
    assert_near(loss, expected_loss)
    assert_near(error, expected_error)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    prediction, target, weight = (x.detach() for x in inputs((5, 1, 40, 64), torch.float32, torch.float32))
    _, together = weighted_mse(prediction, target, weight)
    for i in range(5):
        _, alone = weighted_mse(prediction[i : i + 1], target[i : i + 1], weight[i : i + 1])
        assert torch.equal(alone[0], together[i])
    assert torch.equal(weighted_mse(prediction, target, weight)[0], weighted_mse(prediction, target, weight)[0])


def test_an_infinite_prediction_spoils_its_sample_alone() -> None:
    prediction, target, weight = inputs((2, 1, 4, 4), torch.bfloat16, torch.float32)
    prediction.data[1, 0, 2, 2] = torch.inf
    loss, error = weighted_mse(prediction, target, weight)
    assert torch.isinf(loss)
    assert torch.isfinite(error[0])
    assert torch.isinf(error[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_library_finds_nothing_wrong(dtype: torch.dtype) -> None:
    prediction, target, weight = inputs((2, 1, 5, 7), dtype, torch.float32)
    # In float64 finite differences would be tested too; the kernel has none, and float64 is tested above.
    torch.library.opcheck(torch.ops.segdiff.weighted_mse.default, (prediction, target, weight, True))
    difference = prediction.detach()
    torch.library.opcheck(torch.ops.segdiff.weighted_mse_backward.default, (difference, torch.ones((), device=DEVICE)))


def test_meta_tensors_pass() -> None:
    prediction = torch.empty(2, 1, 8, 8, device="meta", dtype=torch.bfloat16, requires_grad=True)
    loss, error = weighted_mse(prediction, torch.empty(2, 1, 8, 8, device="meta"), torch.empty(2, device="meta"))
    loss.backward()
    assert (error.shape, prediction.grad.dtype) == ((2,), torch.bfloat16)


@pytest.mark.parametrize(("numel", "expected"), [(1, 1), (BLOCK, 1), (BLOCK + 1, 2), (256 * 256, 32)])
def test_slices_cover_a_sample(numel: int, expected: int) -> None:
    assert num_slices(numel) == expected


def test_what_it_refuses() -> None:
    p, t, w = (
        torch.zeros(2, 3, 4, 4, device=DEVICE),
        torch.zeros(2, 3, 4, 4, device=DEVICE),
        torch.ones(2, device=DEVICE),
    )
    channels_last = p.contiguous(memory_format=torch.channels_last)
    bad = {
        "target: ": [
            (p, t[:, :, :2], w),
            (p, t.double(), w),
            (channels_last, t, w),
            (p, t.clone().requires_grad_(), w),
        ],
        "prediction: ": [
            (p.double(), t, w),
            (p[:, :, :, ::2], t[:, :, :, ::2], w),
            (p[:0], t[:0], w[:0]),
            (p[0], t, w),
        ],
        "weight: ": [(p, t, w[:1]), (p, t, w.half()), (p, t, w.clone().requires_grad_())],
    }
    for argument, cases in bad.items():
        for case in cases:
            with pytest.raises(ValueError, match=f"weighted_mse: {argument}"):
                weighted_mse(*case)


def test_without_gpu_or_interpreter_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    p = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="weighted_mse: device: Triton's kernels need a GPU, and this is cpu"):
        weighted_mse(p, p, torch.ones(1))
