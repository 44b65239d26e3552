"""The sigmoid router with bias-only balancing and node-limited selection (V3 report 2.1.2, V3_SPEC A.5, A.6).

Legend: B sequences, T positions, N = B T tokens, D hidden, E experts, G groups, K experts per token.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from deepseek_kernels.moe import gate, gate_backward
from deepseek_train.config.schema import ModelConfig
from deepseek_train.model.context import ModelContext
from deepseek_train.model.linear import linear
from deepseek_train.model.norm import wide
from deepseek_train.parallel.expert.announce import TokenRouting


class Router(nn.Module):
    """Scores every expert, selects with the balance bias, weighs without it."""

    bias: Tensor

    def __init__(self, context: ModelContext) -> None:
        super().__init__()
        m = self.m = context.model
        self.context, self.queue = context, context.queue
        self.weight = context.weight(m.num_routed_experts, m.hidden_size)
        self.register_buffer("bias", torch.zeros(m.num_routed_experts, device=context.device))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Scores in (0, 1), FP32 [B, T, E]."""
        wide_BTD = self.context.recompute.region("norm", lambda x: x.to(wide(x.dtype)), x_BTD)
        return linear(wide_BTD, self.weight, self.queue, self.context.kernels.wgrad).sigmoid()

    def route(self, scores_BTE: Tensor) -> TokenRouting:
        """Top-K by score + bias among the kept groups; weights are the selected scores, normalised and scaled."""
        return TokenRouting(
            *_Gate.apply(scores_BTE.flatten(0, 1), self.bias, self.m, self.context.kernels.moe)
        )


class _Gate(Function):
    @staticmethod
    def forward(
        ctx: Any, scores_NE: Tensor, bias_E: Tensor, m: ModelConfig, backend: str
    ) -> tuple[Tensor, Tensor]:
        ids_NK, weights_NK = gate(
            scores_NE,
            bias_E,
            m.num_expert_groups,
            m.expert_groups_per_token,
            m.experts_per_token,
            m.routed_scale,
            backend=backend,
        )
        ctx.save_for_backward(scores_NE, ids_NK)
        ctx.mark_non_differentiable(ids_NK)
        ctx.routed_scale, ctx.backend = m.routed_scale, backend
        return ids_NK, weights_NK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, d_weights_NK: Tensor) -> tuple[Tensor, None, None, None]:
        scores_NE, ids_NK = ctx.saved_tensors
        d_scores_NE = gate_backward(d_weights_NK, scores_NE, ids_NK, ctx.routed_scale, backend=ctx.backend)
        return d_scores_NE, None, None, None


def balance_loss(scores_BTE: Tensor, top_k: int) -> Tensor:
    """Sequence-wise balance loss, mean over sequences: sum_i f_i P_i, f_i = E / (K T) times how often expert i is among
    the top K of the unbiased scores, P_i the mean normalised score (V3 report eq. 17-20, without alpha)."""
    batch, length, num_experts = scores_BTE.shape
    top = scores_BTE.detach().topk(top_k, -1).indices.flatten(1)
    ones = torch.ones((), dtype=scores_BTE.dtype, device=scores_BTE.device).expand_as(top)
    counts_BE = scores_BTE.new_zeros(batch, num_experts).scatter_add_(1, top, ones)
    frequency_BE = counts_BE * (num_experts / (top_k * length))
    share_BE = (scores_BTE / scores_BTE.sum(-1, keepdim=True)).mean(1)
    return (frequency_BE * share_BE).sum(-1).mean()
