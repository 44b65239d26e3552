"""The router's choice by torch's ``topk``: it does not sort what is not chosen, and does not say which of equals it
takes. Rows: as the reference. Legend: see ``moe``; G groups, C experts of a group."""

import torch
from torch import Tensor

from deepseek_kernels.moe.reference import SMALLEST_SUM, expand, expand_rows, reduce

__all__ = ["expand", "expand_rows", "gate", "gate_backward", "reduce"]


def gate(
    scores_NE: Tensor, bias_E: Tensor, groups: int, groups_kept: int, top_k: int, routed_scale: float
) -> tuple[Tensor, Tensor]:
    biased_NE = scores_NE + bias_E
    no_number_NE = biased_NE.isnan()
    biased_NE.masked_fill_(no_number_NE, -torch.inf)
    if groups_kept < groups:
        biased_NGC = biased_NE.unflatten(1, (groups, -1))
        counts_NG = biased_NGC.topk(top_k // groups_kept, -1).values.sum(-1)
        kept = counts_NG.topk(groups_kept, -1).indices
        closed_NG = torch.ones_like(biased_NGC[..., 0], dtype=torch.bool).scatter_(1, kept, False)
        biased_NE = biased_NGC.masked_fill(closed_NG.unsqueeze(-1), -torch.inf).flatten(1)
    ids_NK = biased_NE.topk(top_k, -1).indices
    chosen_NK = scores_NE.gather(1, ids_NK)
    weights_NK = chosen_NK / chosen_NK.sum(-1, keepdim=True).clamp(min=SMALLEST_SUM) * routed_scale
    return ids_NK, weights_NK.masked_fill_(no_number_NE.any(-1, keepdim=True), torch.nan)


def gate_backward(d_weights_NK: Tensor, scores_NE: Tensor, ids_NK: Tensor, routed_scale: float) -> Tensor:
    chosen_NK = scores_NE.gather(1, ids_NK)
    sum_N1 = chosen_NK.sum(-1, keepdim=True)
    floored_N1 = sum_N1.clamp(min=SMALLEST_SUM)
    mean_N1 = (d_weights_NK * chosen_NK).sum(-1, keepdim=True) / floored_N1
    mean_N1.masked_fill_(sum_N1 < SMALLEST_SUM, 0.0)  # the floor is a constant
    d_chosen_NK = (d_weights_NK - mean_N1) / floored_N1 * routed_scale
    return scores_NE.new_zeros(scores_NE.shape).scatter_(1, ids_NK, d_chosen_NK)
