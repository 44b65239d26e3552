"""Around the experts in plain torch. Legend: see ``moe``; G groups, C experts of a group."""

import torch
from torch import Tensor

from deepseek_kernels.quant.reference import scale_of

SMALLEST_SUM = 1e-20  # of the chosen scores


def expand(x_RD: Tensor, padded_to_row_P: Tensor) -> Tensor:
    there = padded_to_row_P >= 0
    y_PD = x_RD.new_zeros(len(there), x_RD.shape[1])
    y_PD[there] = x_RD[padded_to_row_P[there]]
    return y_PD


def expand_rows(
    values_RD: Tensor, scales_GR: Tensor, padded_to_row_P: Tensor, pow2: bool
) -> tuple[Tensor, Tensor]:
    there = padded_to_row_P >= 0
    values = expand(values_RD.view(torch.uint8), padded_to_row_P).view(values_RD.dtype)
    nothing = scale_of(scales_GR.new_zeros(()), pow2)
    scales_GP = nothing.repeat(len(scales_GR), len(there))
    scales_GP[:, there] = scales_GR[:, padded_to_row_P[there]]
    return values, scales_GP


def reduce(y_PD: Tensor, row_to_padded_RK: Tensor) -> Tensor:
    wide = torch.promote_types(y_PD.dtype, torch.float32)
    x_RD = y_PD.new_zeros(len(row_to_padded_RK), y_PD.shape[1], dtype=wide)
    for padded_R in row_to_padded_RK.unbind(1):
        there = padded_R >= 0
        x_RD[there] += y_PD[padded_R[there]].to(wide)
    return x_RD.to(y_PD.dtype)


def gate(
    scores_NE: Tensor, bias_E: Tensor, groups: int, groups_kept: int, top_k: int, routed_scale: float
) -> tuple[Tensor, Tensor]:
    biased_NE = scores_NE + bias_E
    poisoned_N = biased_NE.isnan().any(-1)
    biased_NE = _comparable(biased_NE)
    if groups_kept < groups:
        biased_NGC = biased_NE.unflatten(1, (groups, -1))
        best_NGK = biased_NGC.sort(dim=-1, descending=True).values[..., : top_k // groups_kept]
        kept = _first(_comparable(_sum_in_order(best_NGK)), groups_kept)
        closed_NG = torch.ones_like(biased_NGC[..., 0], dtype=torch.bool).scatter_(1, kept, False)
        biased_NE = biased_NGC.masked_fill(closed_NG.unsqueeze(-1), -torch.inf).flatten(1)
    ids_NK = _first(biased_NE, top_k).contiguous()
    chosen_NK = scores_NE.gather(1, ids_NK)
    weights_NK = chosen_NK / _at_least_smallest(_sum_in_order(chosen_NK)).unsqueeze(-1) * routed_scale
    return ids_NK, weights_NK.masked_fill(poisoned_N.unsqueeze(-1), torch.nan)


def gate_backward(d_weights_NK: Tensor, scores_NE: Tensor, ids_NK: Tensor, routed_scale: float) -> Tensor:
    chosen_NK = scores_NE.gather(1, ids_NK)
    sum_N1 = _sum_in_order(chosen_NK).unsqueeze(-1)
    floored_N1 = _at_least_smallest(sum_N1)
    mean_N1 = _sum_in_order(d_weights_NK * chosen_NK).unsqueeze(-1) / floored_N1
    mean_N1 = mean_N1.masked_fill(sum_N1 < SMALLEST_SUM, 0.0)  # the floor is a constant
    d_chosen_NK = (d_weights_NK - mean_N1) / floored_N1 * routed_scale
    return scores_NE.new_zeros(scores_NE.shape).scatter_(1, ids_NK, d_chosen_NK)


def _comparable(x: Tensor) -> Tensor:
    return x.masked_fill(x.isnan(), -torch.inf)


def _first(x: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` largest, the lowest first among equals."""
    return x.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def _sum_in_order(x: Tensor) -> Tensor:
    total = x.new_zeros(x.shape[:-1])
    for one in x.unbind(-1):
        total = total + one
    return total


def _at_least_smallest(x: Tensor) -> Tensor:
    """NaN stays NaN."""
    return x.masked_fill(x < SMALLEST_SUM, SMALLEST_SUM)
