"""FP8 training's attention: the core and the linear behind it, and what of the result waits for both backwards."""

from typing import Any

import pytest
import torch
from torch import Tensor

from deepseek_kernels.quant import pack_e5m6, quantise_columns, unpack_e5m6
from deepseek_train.fp8.attention import fp8_attend
from deepseek_train.fp8.linear import fp8_linear
from deepseek_train.model.attention import attend
from deepseek_train.phases.wgrad import Weight, run_works
from tests.helpers.fp8 import apart, numbers, room, weight

HEADS = 3


def heads(dtype: torch.dtype) -> tuple[Tensor, ...]:
    q, k = (torch.randn(2, 20, HEADS, 24).to(dtype).requires_grad_() for _ in range(2))
    return q, k, torch.randn(2, 20, HEADS, 16).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("storage", "allowed"), [("e5m6", 2.0**-6), ("fp8", 2.0**-3), ("params", 2.0**-20)])
def test_attention_and_its_linear(storage: Any, allowed: float, dtype: torch.dtype) -> None:
    """Against torch's attention and the same linear: the result is that, gradients feel how the result was kept."""
    fp8, w, leaves = room(attention_output=storage), weight(40, HEADS * 16, dtype=dtype), heads(dtype)
    dy = torch.randn(2, 20, 40).to(dtype)
    y = fp8_attend(*leaves, w, fp8, scale=0.2, nope=16)
    gradients = torch.autograd.grad(y, leaves, dy)
    assert not w.main_grad.any()
    run_works(fp8.queue.take_open())

    copies = [t.detach().float().requires_grad_() for t in leaves]
    out = attend(*copies, scale=0.2, nope=16, backend="torch").flatten(-2)
    same, alone = Weight(w.detach()), room()
    same.main_grad = torch.zeros_like(w.main_grad)
    wanted = fp8_linear(out.to(dtype), same, alone)
    half = 2.0**-8 if dtype is torch.bfloat16 else 0.0
    assert apart(y, wanted) < (2.0**-5 if half else 1e-5)  # a few numbers fall to other FP8 neighbours
    for found, expected in zip(gradients, torch.autograd.grad(wanted, copies, dy), strict=True):
        assert apart(found, expected) < allowed + 4 * half
    match storage:
        case "e5m6":
            kept = unpack_e5m6(
                pack_e5m6(out.to(dtype).flatten(0, 1), backend="reference"), dtype, backend="reference"
            )
        case "fp8":
            kept = numbers(fp8.recipe.activations.rows(out.detach().to(dtype).flatten(0, 1))).float()
        case _:
            kept = out.detach().to(dtype).flatten(0, 1)
    dy_t = numbers(quantise_columns(dy.flatten(0, 1), pow2=False, backend="reference"))
    x_t = numbers(quantise_columns(kept, pow2=False, backend="reference"))
    assert apart(w.main_grad, dy_t @ x_t.t()) < (2e-2 if half else 2e-3)


def test_attention_keeps_its_result_once_in_twelve_bits() -> None:
    fp8, w, (q, k, v) = room(), weight(40, HEADS * 16, dtype=torch.bfloat16), heads(torch.bfloat16)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fp8_attend(q, k, v, w, fp8, scale=0.2, nope=16)
    rows, padded = 2 * 20, 128  # 48 channels in a tile of 128
    inputs = [t.nbytes for t in (q, k, v)]
    assert sorted(t.nbytes for t in saved) == sorted(
        [*inputs, rows * HEADS * 4, rows * padded * 12 // 8, rows * 4]
    )
