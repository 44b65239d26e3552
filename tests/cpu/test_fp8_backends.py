"""The FP8 room on Triton's kernels (interpreted where there is no GPU) is the FP8 room on the reference."""

from dataclasses import replace

import torch
from torch import Tensor

from deepseek_kernels.choice import Kernels
from deepseek_train.config.schema import Fp8Config
from deepseek_train.fp8.attention import fp8_attend
from deepseek_train.fp8.experts import fp8_experts
from deepseek_train.fp8.feed_forward import fp8_feed_forward
from deepseek_train.fp8.linear import fp8_linears
from deepseek_train.fp8.room import Fp8
from deepseek_train.fp8.sorting import Sorting
from deepseek_train.parallel.expert.plan import assign
from deepseek_train.phases.recompute import Recomputation
from deepseek_train.phases.wgrad import Weight, WeightGradQueue, run_works
from tests.gpu.setting import DEVICE, ON_GPU
from tests.helpers.fp8 import apart, weight

TRITON = Kernels(**dict.fromkeys(("quant", "gemm", "grouped_gemm", "swiglu", "moe", "attention"), "triton"))
M, D, F, E, HEADS = 20, 136, 72, 3, 2


def everything(kernels: Kernels, inputs: list[Tensor], weights: list[Weight]) -> list[Tensor]:
    """A linear, attention, a feed-forward network and experts one after another, and all gradients."""
    fp8 = Fp8.of(Fp8Config(), kernels, WeightGradQueue(), Recomputation())
    x, routing = (t.detach().clone().requires_grad_() for t in inputs[:2])
    w_qkv, w_o, w1, w2, e1, e2 = weights
    for w in weights:
        w.main_grad = torch.zeros(w.shape, device=DEVICE)
    (qkv,) = fp8_linears(x, (w_qkv,), fp8)
    q, k, v = qkv.view(1, M, HEADS, 3 * 64).split([64, 64, 64], -1)
    h = fp8_attend(q, k, v, w_o, fp8, scale=0.125, nope=32).flatten(0, 1)
    h = h + fp8_feed_forward(h, w1, w2, fp8, fp8.recipe.inputs)
    ids = (torch.arange(2 * M, device=DEVICE) % E).view(M, 2)
    rows_E = [int((ids == e).sum()) for e in range(E)]
    arrivals = assign(ids, torch.arange(M, device=DEVICE), 0, rows_E)
    sorting = Sorting.of(arrivals.assignment_to_slot_A, arrivals.rows_E, M, 2, kernels.moe)
    y = h + fp8_experts(h, routing, sorting, e1, e2, fp8)
    y.backward(inputs[2])
    run_works(fp8.queue.take_open())
    assert x.grad is not None
    assert routing.grad is not None
    return [y, x.grad, routing.grad, *(w.main_grad for w in weights)]


def test_triton_computes_what_the_reference_computes() -> None:
    shapes = ((HEADS * 192, D), (D, HEADS * 64), (2 * F, D), (D, F), (E, 2 * F, D), (E, D, F))
    weights = [Weight(weight(*shape).detach().bfloat16().to(DEVICE)) for shape in shapes]
    inputs = [torch.randn(M, D).bfloat16(), torch.rand(M, 2), torch.randn(M, D).bfloat16()]
    inputs = [t.to(DEVICE) for t in inputs]
    wanted = everything(Kernels(), inputs, weights)
    for found, expected in zip(
        everything(replace(TRITON, attention="reference"), inputs, weights), wanted, strict=True
    ):
        # Interpreted it is the same bits but for sums in another order, which may send a number to its neighbour.
        assert apart(found, expected) < (0.02 if ON_GPU else 2e-3)
    for found, expected in zip(everything(TRITON, inputs, weights), wanted, strict=True):
        assert found.isfinite().all()
        # Attention in blocks differs by a BF16 rounding, which sends some numbers to other FP8 neighbours.
        assert apart(found, expected) < 0.1
