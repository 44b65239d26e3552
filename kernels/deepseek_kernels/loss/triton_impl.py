"""Cross-entropy as a Triton kernel: one program a row, which it reads twice and writes once.

A program fills an SM: all rows in work at a time (132 of 258 KB at V3's vocabulary) fit L2, which so serves the second
reading. Legend: see ``loss``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepseek_kernels.loss import IGNORED as _IGNORED

IGNORED = tl.constexpr(_IGNORED)
LOWEST = tl.constexpr(-3.4e38)  # finite: -inf less -inf would be NaN
BLOCK, LAUNCH = 16384, {"num_warps": 32, "num_stages": 1}


@triton.jit
def cross_entropy_kernel(logit_ptr, label_ptr, scale_ptr, loss_ptr, V, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    row = logit_ptr + n * V
    column = tl.arange(0, BLOCK)
    label = tl.load(label_ptr + n)
    if label == IGNORED:
        tl.store(loss_ptr + n, 0.0)
        for start in range(0, V, BLOCK):
            zeros = tl.zeros((BLOCK,), logit_ptr.dtype.element_ty)
            tl.store(row + start + column, zeros, mask=start + column < V)
    else:
        is_column = (label >= 0) & (label < V)
        chosen = tl.load(row + label, mask=is_column, other=float("nan")).to(tl.float32)
        # Each lane keeps the largest logit it has met, and the sum of exp(logit - largest).
        largest = tl.full((BLOCK,), LOWEST, tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, V, BLOCK):
            x = tl.load(row + start + column, mask=start + column < V, other=float("-inf")).to(tl.float32)
            fading = tl.exp(-tl.abs(x - largest))
            total = tl.where(x > largest, total * fading + 1.0, total + fading)
            largest = tl.maximum(largest, x)
        top = tl.max(largest, axis=0)
        total = tl.sum(total * tl.exp(largest - top), axis=0)
        total = tl.where(is_column, total, float("nan"))
        tl.store(loss_ptr + n, top - chosen + tl.log(total))
        scale = tl.load(scale_ptr)
        share = tl.math.div_rn(1.0, total)
        for start in range(0, V, BLOCK):
            at, inside = row + start + column, start + column < V
            p = tl.exp(tl.load(at, mask=inside, other=0.0).to(tl.float32) - top) * share
            d = tl.where(start + column == label, p - 1.0, p) * scale
            tl.store(at, d.to(logit_ptr.dtype.element_ty), mask=inside)


def cross_entropy_(logits_NV: Tensor, labels_N: Tensor, scale: Tensor) -> Tensor:
    count, size = logits_NV.shape
    loss_N = logits_NV.new_empty(count, dtype=torch.float32)
    if count:
        cross_entropy_kernel[(count,)](logits_NV, labels_N.contiguous(), scale, loss_N, size, BLOCK, **LAUNCH)
    return loss_N
