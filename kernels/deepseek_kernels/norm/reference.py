"""RMSNorm in plain torch."""

import torch
from torch import Tensor

from deepseek_kernels.quant.reference import quantise_rows


def _normed(x_MD: Tensor, scale_M: Tensor) -> Tensor:
    return x_MD.float() * scale_M.unsqueeze(-1)


def rms_norm(x_MD: Tensor, gain_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    scale_M = 1.0 / (x_MD.float().square().mean(-1) + eps).sqrt()
    y_MD = _normed(x_MD, scale_M).to(x_MD.dtype).float() * gain_D.float()
    return y_MD.to(x_MD.dtype), scale_M


def rms_norm_quantise(
    x_MD: Tensor, gain_D: Tensor, eps: float, pow2: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y_MD, scale_M = rms_norm(x_MD, gain_D, eps)
    return y_MD, scale_M, *quantise_rows(y_MD, pow2)


def rms_norm_backward(dy_MD: Tensor, x_MD: Tensor, scale_M: Tensor, gain_D: Tensor) -> Tensor:
    normed_MD, d_normed_MD = _normed(x_MD, scale_M), dy_MD.float() * gain_D.float()
    along_M = (d_normed_MD * normed_MD).mean(-1, keepdim=True)
    return ((d_normed_MD - normed_MD * along_M) * scale_M.unsqueeze(-1)).to(x_MD.dtype)


def rms_norm_gain_gradient(dy_MD: Tensor, x_MD: Tensor, scale_M: Tensor, into_D: Tensor) -> None:
    into_D += (dy_MD.float() * _normed(x_MD, scale_M).to(x_MD.dtype).float()).sum(0, dtype=torch.float32)
