"""Cross-entropy in plain torch, in FP32 (FP64 for FP64): also what CPUs train with. Legend: see ``loss``."""

import torch
from torch import Tensor

from deepseek_kernels.loss import IGNORED


def cross_entropy_(logits_NV: Tensor, labels_N: Tensor, scale: Tensor) -> Tensor:
    count, wide = logits_NV.shape[1], torch.promote_types(logits_NV.dtype, torch.float32)
    ignored_N = labels_N == IGNORED
    wrong_N = ~ignored_N & ((labels_N < 0) | (labels_N >= count))
    labels_N1 = labels_N.clamp(0, count - 1).unsqueeze(-1)
    d_NV = logits_NV.softmax(-1, dtype=wide)
    # By way of the likeliest token: its probability is at least 1 / V, so its logarithm is exact.
    below_N1 = logits_NV.amax(-1, keepdim=True).to(wide) - logits_NV.gather(1, labels_N1)
    loss_N = (below_N1 - d_NV.amax(-1, keepdim=True).log()).squeeze(1)
    d_NV.scatter_add_(1, labels_N1, d_NV.new_full(labels_N1.shape, -1.0))
    logits_NV.copy_(d_NV.mul_(scale))
    logits_NV.index_fill_(0, wrong_N.nonzero().flatten(), torch.nan)
    logits_NV.index_fill_(0, ignored_N.nonzero().flatten(), 0.0)
    return loss_N.masked_fill(wrong_N, torch.nan).masked_fill(ignored_N, 0.0)
