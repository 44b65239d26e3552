"""One MoE layer of DeepSeek-V3 as one rank of EP64 computes it: 4 of 256 experts with 8192 rows each, and the shared
expert on the rank's own 4096 tokens; forward and backward, weight gradients added to FP32.

Rows arrive once, though some need two of the experts here; half of what is raced is how they are sorted, quantised and
summed again. Legend: R received rows, K experts per token, N tokens, D hidden, F expert size, E experts here, P padded
rows by expert.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from deepseek_kernels.choice import Kernels
from deepseek_kernels.moe import expand, reduce
from deepseek_kernels.swiglu import swiglu, swiglu_backward
from deepseek_train.config.schema import Fp8Config
from deepseek_train.fp8.experts import fp8_experts
from deepseek_train.fp8.feed_forward import fp8_feed_forward
from deepseek_train.fp8.room import Fp8
from deepseek_train.fp8.sorting import Sorting
from deepseek_train.parallel.expert.plan import Arrivals, assign
from deepseek_train.phases.recompute import Recomputation
from deepseek_train.phases.wgrad import Weight, WeightGradQueue, run_works

TOP_K = 8


@dataclass(frozen=True)
class Layer:
    """Sizes of one rank's share; ``doubles``: received rows that two of its experts want."""

    hidden: int = 7168
    inner: int = 2048
    experts: int = 4
    rows: int = 8192  # of each expert
    tokens: int = 4096
    doubles: int = 3072  # a multiple of ``experts``

    @property
    def flops(self) -> int:
        """Forward, input gradients, weight gradients of routed and shared experts."""
        return 6 * 3 * self.hidden * self.inner * (self.experts * self.rows + self.tokens)


@dataclass(frozen=True)
class Given:
    """The same for everybody: inputs, incoming gradients, weights, and who is whose."""

    x_RD: Tensor
    weights_RK: Tensor
    dy_RD: Tensor
    x_ND: Tensor
    dy_ND: Tensor
    arrivals: Arrivals
    gate_up: Weight  # [E, 2F, D]
    down: Weight  # [E, D, F]
    shared_gate_up: Weight
    shared_down: Weight


@dataclass(frozen=True)
class Made:
    """What a pass gives, for comparison."""

    y_RD: Tensor
    y_ND: Tensor
    dx_RD: Tensor
    dx_ND: Tensor


def given(layer: Layer, device: torch.device) -> Given:
    d, f, e = layer.hidden, layer.inner, layer.experts
    ids_RK = _routing(layer)
    arrivals = assign(
        ids_RK.to(device), torch.arange(len(ids_RK), device=device), 0, [layer.rows] * layer.experts
    )

    def drawn(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=device) * std).bfloat16()

    def weight(*shape: int) -> Weight:
        made = Weight(drawn(*shape, std=shape[-1] ** -0.5))
        made.main_grad = torch.zeros(shape, device=device)
        return made

    r, n = len(ids_RK), layer.tokens
    weights_RK = torch.rand(r, TOP_K, device=device) * 0.6
    return Given(
        drawn(r, d), weights_RK, drawn(r, d), drawn(n, d), drawn(n, d), arrivals,
        weight(e, 2 * f, d), weight(e, d, f), weight(2 * f, d), weight(d, f),
    )  # fmt: skip


def _routing(layer: Layer) -> Tensor:
    """Expert ids [R, K] in a random order of rows; -1: on another rank. Every expert gets ``rows``."""
    e, doubles = layer.experts, layer.doubles
    firsts = torch.arange(doubles) % e
    alone = torch.arange(e).repeat_interleave(layer.rows - 2 * doubles // e)
    ids_RK = torch.full((doubles + len(alone), TOP_K), -1)
    ids_RK[:doubles, 0], ids_RK[:doubles, 1] = firsts, (firsts + 1) % e
    ids_RK[doubles:, 0] = alone
    return ids_RK[torch.randperm(len(ids_RK))]


def fp8_pass(g: Given, kernels: Kernels) -> Callable[[], Made]:
    """As a model in FP8 runs it. FP8 copies of weights are there: a step makes them once, whatever its length."""
    queue = WeightGradQueue()
    fp8 = Fp8.of(Fp8Config(), kernels, queue, Recomputation())
    x_RD, weights_RK, x_ND = (t.clone().requires_grad_() for t in (g.x_RD, g.weights_RK, g.x_ND))

    def call() -> Made:
        rows, top_k = weights_RK.shape
        slots = g.arrivals.assignment_to_slot_A
        sorting = Sorting.of(slots, g.arrivals.rows_E, rows, top_k, kernels.moe)
        y_RD = fp8_experts(x_RD, weights_RK, sorting, g.gate_up, g.down, fp8)
        y_ND = fp8_feed_forward(x_ND, g.shared_gate_up, g.shared_down, fp8, fp8.recipe.expert_inputs)
        inputs = (x_RD, weights_RK, x_ND)
        dx_RD, _, dx_ND = torch.autograd.grad((y_RD, y_ND), inputs, (g.dy_RD, g.dy_ND))
        run_works(queue.take_open())
        return Made(y_RD.detach(), y_ND.detach(), dx_RD, dx_ND)

    return call


def bf16_pass(g: Given, kernels: Kernels) -> Callable[[], Made]:
    """The best that BF16 has: torch's grouped products, cuBLAS, and our kernels for all that is moved. What SwiGLU gave
    is kept, not computed again."""

    @torch.no_grad()
    def call() -> Made:
        rows, top_k = g.weights_RK.shape
        slots = g.arrivals.assignment_to_slot_A
        sorting = Sorting.of(slots, g.arrivals.rows_E, rows, top_k, kernels.moe)
        y_RD, dx_RD = _experts(g, sorting, kernels)
        y_ND, dx_ND = _shared(g, kernels)
        return Made(y_RD, y_ND, dx_RD, dx_ND)

    return call


def _experts(g: Given, sorting: Sorting, kernels: Kernels) -> tuple[Tensor, Tensor]:
    order, ends = sorting.order, sorting.groups.starts[1:]
    weights_P = sorting.to_padded(g.weights_RK)
    x_PD = expand(g.x_RD, order.padded_to_row_P, backend=kernels.moe)
    gate_up = torch._grouped_mm(x_PD, g.gate_up.mT, offs=ends)
    h_PF = swiglu(gate_up, weights_P, backend=kernels.swiglu)
    y_RD = reduce(torch._grouped_mm(h_PF, g.down.mT, offs=ends), order.row_to_padded_RK, backend=kernels.moe)
    dy_PD = expand(g.dy_RD, order.padded_to_row_P, backend=kernels.moe)
    dh_PF = torch._grouped_mm(dy_PD, g.down, offs=ends)
    d_gate_up, d_weights_P = swiglu_backward(dh_PF, gate_up, weights_P, backend=kernels.swiglu)
    assert d_weights_P is not None
    sorting.from_padded(d_weights_P)
    dx_PD = torch._grouped_mm(d_gate_up, g.gate_up, offs=ends)
    g.down.main_grad.add_(torch._grouped_mm(dy_PD.t(), h_PF, offs=ends))
    g.gate_up.main_grad.add_(torch._grouped_mm(d_gate_up.t(), x_PD, offs=ends))
    return y_RD, reduce(dx_PD, order.row_to_padded_RK, backend=kernels.moe)


def _shared(g: Given, kernels: Kernels) -> tuple[Tensor, Tensor]:
    gate_up = functional.linear(g.x_ND, g.shared_gate_up)
    h_NF = swiglu(gate_up, None, backend=kernels.swiglu)
    y_ND = functional.linear(h_NF, g.shared_down)
    d_gate_up, _ = swiglu_backward(g.dy_ND @ g.shared_down, gate_up, None, backend=kernels.swiglu)
    _add_product(g.shared_down.main_grad, g.dy_ND, h_NF)
    _add_product(g.shared_gate_up.main_grad, d_gate_up, g.x_ND)
    return y_ND, d_gate_up @ g.shared_gate_up


def _add_product(into: Tensor, dy: Tensor, x: Tensor) -> None:
    if into.is_cuda:
        into.add_(torch.mm(dy.t(), x, out_dtype=torch.float32))
    else:
        into.add_(torch.mm(dy.t(), x))
