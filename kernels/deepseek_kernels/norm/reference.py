"""RMSNorm in plain torch, in FP32 (FP64 for FP64): also what CPUs train with, so steps that can are done in place."""

import torch
from torch import Tensor

from deepseek_kernels.quant.reference import quantise_rows


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def rms_norm(x_MD: Tensor, gain_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    length_M1 = torch.linalg.vector_norm(x_MD, dim=-1, keepdim=True, dtype=_wide(x_MD.dtype))
    scale_M1 = (length_M1.square_() / x_MD.shape[-1]).add_(eps).rsqrt_()
    return (x_MD * scale_M1).to(x_MD.dtype).mul_(gain_D), scale_M1.squeeze(-1)


def rms_norm_quantise(
    x_MD: Tensor, gain_D: Tensor, eps: float, pow2: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y_MD, scale_M = rms_norm(x_MD, gain_D, eps)
    return y_MD, scale_M, *quantise_rows(y_MD, pow2)


def rms_norm_backward(dy_MD: Tensor, x_MD: Tensor, scale_M: Tensor, gain_D: Tensor) -> Tensor:
    scale_M1 = scale_M.unsqueeze(-1)
    normed_MD, d_normed_MD = x_MD * scale_M1, dy_MD * gain_D.to(scale_M.dtype)
    along_M1 = (d_normed_MD * normed_MD).mean(-1, keepdim=True)
    return d_normed_MD.addcmul_(normed_MD, along_M1, value=-1.0).mul_(scale_M1).to(x_MD.dtype)


def rms_norm_gain_gradient(dy_MD: Tensor, x_MD: Tensor, scale_M: Tensor, into_D: Tensor) -> None:
    normed_MD = (x_MD * scale_M.unsqueeze(-1)).to(x_MD.dtype)
    into_D += (normed_MD.to(scale_M.dtype).mul_(dy_MD)).sum(0, dtype=into_D.dtype)
