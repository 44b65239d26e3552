"""The router's choice as Triton kernels: a warp has a token, or a few, and all experts in registers.

Legend: see ``moe``; G groups, C experts of a group. ``_P``: padded to a power of two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepseek_kernels.moe.reference import SMALLEST_SUM as _SMALLEST_SUM

SMALLEST_SUM = tl.constexpr(_SMALLEST_SUM)
NEVER = tl.constexpr(-(2**31))  # below every key
NOWHERE = tl.constexpr(2**31 - 1)
# Without fusion products are rounded before they are added, as the reference does.
# A warp waits for every step of a token's choice: many warps of one token each hide that. Its gradient has no steps.
TOKENS, BACKWARD_TOKENS, LAUNCH = 1, 4, {"num_warps": 1, "num_stages": 1, "enable_fp_fusion": False}


@triton.jit
def key_of(x):
    """An int32 that compares as x does, NaN as -inf: a warp finds the largest of its integers by one instruction."""
    x = tl.where(x != x, float("-inf"), tl.where(x == 0.0, 0.0, x))  # -0 is 0
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def value_of(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def first_of_largest(key, index):
    """Along the last axis: the largest key and, of those who have it, the lowest index."""
    last: tl.constexpr = len(key.shape) - 1
    best = tl.max(key, axis=last)
    return best, tl.min(tl.where(key == tl.expand_dims(best, last), index, NOWHERE), axis=last)


@triton.jit
def at_least_smallest(x):
    """NaN stays NaN."""
    return tl.where(x < SMALLEST_SUM, SMALLEST_SUM, x)


@triton.jit
def gate_kernel(
    score_ptr,
    bias_ptr,
    id_ptr,
    weight_ptr,
    N,
    routed_scale,
    G: tl.constexpr,
    C: tl.constexpr,
    KEPT: tl.constexpr,
    K: tl.constexpr,
    G_P: tl.constexpr,
    C_P: tl.constexpr,
    K_P: tl.constexpr,
    R: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    # Experts lie flat, so that what is reduced lies in neighbouring lanes (Triton 3.6 is wrong where it does not).
    place, group, member = tl.arange(0, G_P * C_P), tl.arange(0, G_P), tl.arange(0, C_P)
    if C == C_P:
        expert = place[None, :]
        real = expert < G * C
    else:
        expert = (place // C_P * C + place % C_P)[None, :]
        real = ((place // C_P < G) & (place % C_P < C))[None, :]
    row = score_ptr + n[:, None] * (G * C)
    score = tl.load(row + expert, mask=(n < N)[:, None] & real, other=0.0)
    biased = score + tl.load(bias_ptr + expert, mask=real, other=0.0)
    poisoned = tl.max((biased != biased).to(tl.int32), axis=1)[:, None]
    key = tl.where(real, key_of(biased), NEVER)
    if KEPT < G:
        counts = tl.zeros((R, G_P), tl.float32)
        rest = tl.reshape(key, (R, G_P, C_P))
        for _ in tl.static_range(K // KEPT):
            best, at = first_of_largest(rest, member[None, None, :])
            counts += value_of(best)
            rest = tl.where(member[None, None, :] == at[:, :, None], NEVER, rest)
        left = tl.where((group < G)[None, :], key_of(counts), NEVER)
        for _ in tl.static_range(KEPT):
            _, at = first_of_largest(left, group[None, :])
            left = tl.where(group[None, :] == at[:, None], NEVER, left)
        closed = tl.broadcast_to((left != NEVER)[:, :, None], (R, G_P, C_P))
        key = tl.where(real & tl.reshape(closed, (R, G_P * C_P)), key_of(float("-inf")), key)
    slot = tl.arange(0, K_P)[None, :]
    ids = tl.zeros((R, K_P), tl.int32)
    chosen = tl.zeros((R, K_P), tl.float32)
    total = tl.zeros((R, 1), tl.float32)
    for k in tl.static_range(K):
        _, at = first_of_largest(key, expert)
        key = tl.where(expert == at[:, None], NEVER, key)
        one = tl.load(row + at[:, None], mask=(n < N)[:, None], other=0.0)
        total += one
        ids = tl.where(slot == k, at[:, None], ids)
        chosen = tl.where(slot == k, one, chosen)
    weight = tl.math.div_rn(chosen, at_least_smallest(total)) * routed_scale
    weight = tl.where(poisoned != 0, float("nan"), weight)
    to, inside = n[:, None] * K + slot, (n < N)[:, None] & (slot < K)
    tl.store(id_ptr + to, ids.to(tl.int64), mask=inside)
    tl.store(weight_ptr + to, weight, mask=inside)


@triton.jit
def gate_backward_kernel(
    d_weight_ptr,
    score_ptr,
    id_ptr,
    d_score_ptr,
    N,
    routed_scale,
    E: tl.constexpr,
    K: tl.constexpr,
    E_P: tl.constexpr,
    R: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    inside = n < N
    total = tl.zeros((R,), tl.float32)
    along = tl.zeros((R,), tl.float32)
    for k in tl.static_range(K):
        expert = tl.load(id_ptr + n * K + k, mask=inside, other=0)
        one = tl.load(score_ptr + n * E + expert, mask=inside, other=0.0)
        total += one
        along += tl.load(d_weight_ptr + n * K + k, mask=inside, other=0.0) * one
    floored = at_least_smallest(total)
    mean = tl.where(total < SMALLEST_SUM, 0.0, tl.math.div_rn(along, floored))
    e = tl.arange(0, E_P)[None, :]
    d_score = tl.zeros((R, E_P), tl.float32)
    for k in tl.static_range(K):
        expert = tl.load(id_ptr + n * K + k, mask=inside, other=0)
        d_weight = tl.load(d_weight_ptr + n * K + k, mask=inside, other=0.0)
        d_one = tl.math.div_rn(d_weight - mean, floored) * routed_scale
        d_score = tl.where(e == expert[:, None], d_one[:, None], d_score)
    tl.store(d_score_ptr + n[:, None] * E + e, d_score, mask=inside[:, None] & (e < E))


def gate(
    scores_NE: Tensor, bias_E: Tensor, groups: int, groups_kept: int, top_k: int, routed_scale: float
) -> tuple[Tensor, Tensor]:
    scores_NE = scores_NE.contiguous()
    count, experts = scores_NE.shape
    ids_NK = scores_NE.new_empty(count, top_k, dtype=torch.int64)
    weights_NK = scores_NE.new_empty(count, top_k)
    if count:
        sizes = groups, experts // groups, groups_kept, top_k
        rounded = (triton.next_power_of_2(size) for size in (groups, experts // groups, top_k))
        gate_kernel[(triton.cdiv(count, TOKENS),)](
            scores_NE,
            bias_E.contiguous(),
            ids_NK,
            weights_NK,
            count,
            routed_scale,
            *sizes,
            *rounded,
            TOKENS,
            **LAUNCH,
        )
    return ids_NK, weights_NK


def gate_backward(d_weights_NK: Tensor, scores_NE: Tensor, ids_NK: Tensor, routed_scale: float) -> Tensor:
    scores_NE = scores_NE.contiguous()
    count, experts = scores_NE.shape
    d_scores_NE = torch.empty_like(scores_NE)
    if count:
        gate_backward_kernel[(triton.cdiv(count, BACKWARD_TOKENS),)](
            d_weights_NK.contiguous(),
            scores_NE,
            ids_NK.contiguous(),
            d_scores_NE,
            count,
            routed_scale,
            experts,
            ids_NK.shape[1],
            triton.next_power_of_2(experts),
            BACKWARD_TOKENS,
            **LAUNCH,
        )
    return d_scores_NE
