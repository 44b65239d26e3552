"""Rows copied to assignments and summed again: gradients in BF16 are added in FP32, as results are.

Legend: R received rows, A assignments, K experts per token, D channels.
"""

import torch

from deepseek_train.parallel.expert.local import Dispatched, expand, reduce
from deepseek_train.parallel.expert.plan import Arrivals


def test_copies_and_sums_are_each_others_transpose_rounded_once() -> None:
    copies, rows, top_k, channels = 64, 5, 8, 33
    rows_A = torch.randint(0, rows, (copies,))
    arrivals = Arrivals(rows, rows_A, rows_A * top_k + torch.randint(0, top_k, (copies,)), (copies,))
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
