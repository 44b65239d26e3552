"""Cross-entropy in plain torch. Legend: see ``loss``."""

import torch
from torch import Tensor

from deepseek_kernels.loss import IGNORED


def cross_entropy_(logits_NV: Tensor, labels_N: Tensor, scale: Tensor) -> Tensor:
    count = logits_NV.shape[1]
    ignored_N = labels_N == IGNORED
    wrong_N = ~ignored_N & ((labels_N < 0) | (labels_N >= count))
    logits = logits_NV.float().masked_fill(wrong_N.unsqueeze(-1), torch.nan)
    labels_N1 = labels_N.clamp(0, count - 1).unsqueeze(-1)
    log_p_NV = logits.log_softmax(-1)
    loss_N = -log_p_NV.gather(1, labels_N1).squeeze(1)
    d_NV = log_p_NV.exp()
    d_NV.scatter_add_(1, labels_N1, -torch.ones_like(loss_N).unsqueeze(-1))
    logits_NV.copy_((d_NV * scale).masked_fill(ignored_N.unsqueeze(-1), 0.0))
    return loss_N.masked_fill(ignored_N, 0.0)
