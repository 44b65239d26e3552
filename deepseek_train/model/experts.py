"""The routed experts this rank holds.

Legend: A assignments grouped by expert, R received rows, D hidden, F feed-forward size.
"""

from torch import Tensor, nn

from deepseek_train.fp8.experts import fp8_experts
from deepseek_train.fp8.sorting import Sorting
from deepseek_train.model.context import ModelContext
from deepseek_train.model.linear import grouped_linear
from deepseek_train.model.swiglu import forgettable_swiglu
from deepseek_train.parallel.expert.local import Dispatched, copies_of, expand, reduce


class Experts(nn.Module):
    """An equal share of the routed experts, consecutive, as two grouped matrices."""

    def __init__(self, context: ModelContext) -> None:
        super().__init__()
        d, f = context.model.hidden_size, context.model.expert_ffn_size
        count = context.model.num_routed_experts // context.dispatcher.group.size
        self.context, self.queue = context, context.queue
        self.gate_up = context.weight(count, 2 * f, d)
        self.down = context.weight(count, d, f)

    def forward(self, dispatched: Dispatched) -> Tensor:
        """Weighted sum over this rank's experts for every received row: y_RD."""
        arrivals, fp8 = dispatched.arrivals, self.context.fp8
        rows_E = arrivals.rows_E
        if fp8 is not None:
            x_RD, weights_RK = dispatched.x_RD, dispatched.weights_RK
            slots_A, (num_rows, top_k) = arrivals.assignment_to_slot_A, weights_RK.shape
            sorting = Sorting.of(slots_A, rows_E, num_rows, top_k, fp8.kernels.moe)
            return fp8_experts(x_RD, weights_RK, sorting, self.gate_up, self.down, fp8)
        wgrad = self.context.kernels.wgrad
        copies = copies_of(dispatched, self.context.kernels.moe)
        x_AD, weights_A = expand(dispatched, copies)
        gate_up_AF = grouped_linear(x_AD, self.gate_up, rows_E, self.queue, wgrad)
        h_AF = forgettable_swiglu(self.context, gate_up_AF, weights_A)
        return reduce(grouped_linear(h_AF, self.down, rows_E, self.queue, wgrad), copies)
