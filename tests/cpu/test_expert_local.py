"""Rows copied to assignments and summed again: gradients in BF16 are added in FP32, as results are.

Legend: R received rows, A assignments, K experts per token, D channels.
"""

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from deepseek_kernels.testing import interpreter
from deepseek_train.parallel.expert.local import Dispatched, expand, reduce
from deepseek_train.parallel.expert.plan import Arrivals, assign


def test_copies_and_sums_are_each_others_transpose_rounded_once() -> None:
    copies, rows, top_k, channels = 64, 5, 8, 33
    rows_A = torch.randint(0, rows, (copies,))
    arrivals = Arrivals(rows, rows_A, rows_A * top_k + torch.randint(0, top_k, (copies,)), (copies,), top_k)
    x_RD = torch.randn(rows, channels).bfloat16().requires_grad_()
    weights_RK = torch.rand(rows, top_k)
    x_AD, weights_A = expand(Dispatched(x_RD, weights_RK, arrivals))
    assert torch.equal(x_AD, x_RD[rows_A])
    assert torch.equal(weights_A, weights_RK.flatten()[arrivals.assignment_to_slot_A])

    dy_AD = torch.randn(copies, channels).bfloat16()
    x_AD.backward(dy_AD)
    wide = torch.zeros(rows, channels).index_add_(0, rows_A, dy_AD.float())
    assert x_RD.grad is not None
    assert torch.equal(x_RD.grad, wide.bfloat16())
    assert torch.equal(reduce(dy_AD, arrivals), wide.bfloat16())
    rounded_each_time = torch.zeros(rows, channels, dtype=torch.bfloat16)
    for row, dy_D in zip(rows_A, dy_AD, strict=True):
        rounded_each_time[row] += dy_D
    assert not torch.equal(x_RD.grad, rounded_each_time)  # the test can tell


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="a GPU's machine compiles kernels")
def test_kernels_give_the_same_rows_and_gradients() -> None:
    """Experts 3 to 5 of 8; some rows have none here. Sums differ by the order of at most 4 terms in FP32, before both
    are rounded to BF16 once: by one step of that where it falls on a tie's other side."""
    interpreter.install()
    ids_RK = torch.rand(6, 8).topk(4, -1).indices
    mine = (ids_RK >= 3) & (ids_RK < 6)
    arrivals = assign(ids_RK, torch.arange(6), 3, [int((ids_RK == e).sum()) for e in (3, 4, 5)])
    assert int(mine.sum()) == len(arrivals.assignment_to_row_A)
    x_RD, weights_RK = torch.randn(6, 128).bfloat16(), torch.rand(6, 4)
    dy_AD, dy_RD = (torch.randn(n, 128).bfloat16() for n in (int(mine.sum()), 6))

    def ways(backend: str) -> Iterator[Tensor]:
        x = x_RD.clone().requires_grad_()
        x_AD, weights_A = expand(Dispatched(x, weights_RK, arrivals), backend)
        yield from (x_AD.detach(), weights_A, *torch.autograd.grad(x_AD, x, dy_AD))
        y_AD = dy_AD.clone().requires_grad_()
        y_RD = reduce(y_AD, arrivals, backend)
        yield from (y_RD.detach(), *torch.autograd.grad(y_RD, y_AD, dy_RD))

    copies, sums = (0, 1, 4), (2, 3)
    plain, kernels = list(ways("reference")), list(ways("triton"))
    assert all(torch.equal(plain[i], kernels[i]) for i in copies)
    for i in sums:
        assert torch.allclose(plain[i], kernels[i], rtol=2.0**-7, atol=0.0)
