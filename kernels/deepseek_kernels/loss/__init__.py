"""Cross-entropy over a large vocabulary, in the memory of its logits.

Legend: N tokens, V vocabulary, D hidden.

The loss of a projection, some rows at a time, so that the wide logits of all rows never exist at once, and the weight
gradient is left to whoever queues it:

    for x_ND, labels_N, dx_ND in ...:                        # e.g. 1024 rows each
        logits_NV = x_ND @ weight_VD.t()
        loss_N = cross_entropy_(logits_NV, labels_N, 1 / tokens, backend=backend)
        torch.mm(logits_NV, weight_VD, out=dx_ND)            # logits_NV is now the gradient of the logits
        queue(logits_NV, x_ND)                               # later: weight gradient += logits_NV.t() @ x_ND

To keep all chunks for later, let ``logits_NV`` be the rows of one BF16 buffer of [all N, V].
"""

import torch
from torch import Tensor

from deepseek_kernels.registry import define
from deepseek_kernels.shapes import check_axes, check_dtype

IGNORED = -100


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _fake_cross_entropy_(logits_NV: Tensor, labels_N: Tensor, scale: Tensor) -> Tensor:
    return logits_NV.new_empty(len(logits_NV), dtype=_wide(logits_NV.dtype))


_cross_entropy_ = define(
    __name__,
    "cross_entropy_(Tensor(a!) logits, Tensor labels, Tensor scale, *, str backend) -> Tensor",
    _fake_cross_entropy_,
    ("reference", "triton"),
)


def cross_entropy_(logits_NV: Tensor, labels_N: Tensor, scale: Tensor | float, *, backend: str) -> Tensor:
    """The loss of each row, logsumexp - logit[label], FP32 [N], without ``scale``. Overwrites ``logits`` (BF16 or FP32,
    contiguous) with the gradient of ``scale`` times that: (softmax - one-hot) * scale. Computed in FP32. (The reference
    also takes FP64, and computes in it.)

    ``labels``: int64; a row labelled -100 does not count: loss and gradient are 0, whatever its logits are. ``scale``:
    a number, or one element FP32 on the device. A row with a NaN or +Inf, and one whose label is no column, has a loss
    and gradient of NaN. Raises ValueError where logits are not contiguous or labels do not fit.
    """
    check_axes("cross_entropy_", "logits", logits_NV, "N, V")
    check_dtype("cross_entropy_", "labels", labels_N.dtype, torch.int64)
    if not logits_NV.is_contiguous():
        raise ValueError(f"logits must be contiguous to be overwritten, strides are {logits_NV.stride()}")
    if labels_N.shape != logits_NV.shape[:1]:
        raise ValueError(f"labels {tuple(labels_N.shape)} do not fit logits {tuple(logits_NV.shape)}")
    if not isinstance(scale, Tensor):
        scale = torch.full((), scale, dtype=_wide(logits_NV.dtype), device=logits_NV.device)
    elif scale.numel() != 1:
        raise ValueError(f"cross_entropy_: scale is {list(scale.shape)}, must be one element")
    return _cross_entropy_(logits_NV, labels_N, scale, backend=backend)
