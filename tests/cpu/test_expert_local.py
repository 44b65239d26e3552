"""Rows copied to assignments and summed again: gradients in BF16 are added in FP32, as results are.

Legend: R received rows, A assignments, K experts per token, D channels.
"""

import pytest
import torch

from deepseek_train.parallel.expert.local import ByIndex, ByKernel, Dispatched, copies_of, expand, reduce
from deepseek_train.parallel.expert.plan import Arrivals


@pytest.mark.parametrize(("backend", "kind"), [("torch", ByIndex), ("reference", ByKernel)])
def test_copies_and_sums_are_each_others_transpose_rounded_once(backend: str, kind: type) -> None:
    rows, top_k, channels = 12, 8, 33
    chosen = torch.rand(rows, top_k) < 0.7  # by experts of this rank
    slots_A = chosen.flatten().nonzero().flatten()
    slots_A = slots_A[torch.randperm(len(slots_A))]
    rows_A = slots_A // top_k
    arrivals = Arrivals(rows, rows_A, slots_A, (len(slots_A),))
    x_RD = torch.randn(rows, channels).bfloat16().requires_grad_()
    dispatched = Dispatched(x_RD, torch.rand(rows, top_k), arrivals)
    copies = copies_of(dispatched, backend)
    assert isinstance(copies, kind)
    x_AD, weights_A = expand(dispatched, copies)
    assert torch.equal(x_AD, x_RD[rows_A])
    assert torch.equal(weights_A, dispatched.weights_RK.flatten()[slots_A])

    # Eighths: FP32 adds them exactly, in any order.
    dy_AD = (torch.randint(-255, 256, (len(slots_A), channels)) / 8).bfloat16().requires_grad_()
    x_AD.backward(dy_AD.detach())
    wide = torch.zeros(rows, channels).index_add_(0, rows_A, dy_AD.detach().float())
    assert x_RD.grad is not None
    assert torch.equal(x_RD.grad, wide.bfloat16())
    sums = reduce(dy_AD, copies)
    assert torch.equal(sums, wide.bfloat16())
    sums.backward(x_RD.detach())
    assert dy_AD.grad is not None
    assert torch.equal(dy_AD.grad, x_RD[rows_A])
    rounded_each_time = torch.zeros(rows, channels, dtype=torch.bfloat16)
    for row, dy_D in zip(rows_A, dy_AD.detach(), strict=True):
        rounded_each_time[row] += dy_D
    assert not torch.equal(x_RD.grad, rounded_each_time)  # the test can tell
