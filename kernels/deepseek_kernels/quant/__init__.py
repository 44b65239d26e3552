"""Quantisation to E4M3 in tiles (V3 report section 3.3.2), and back. Formats and the scale rule: ``formats``.

Legend: see ``formats``.
"""

import torch
from torch import Tensor

from deepseek_kernels.formats import E4M3, TILE, Rows, padded
from deepseek_kernels.registry import define


def _fake_rows(x_MK: Tensor, pow2: bool) -> tuple[Tensor, Tensor]:
    m, k = x_MK.shape[0], padded(x_MK.shape[1])
    return x_MK.new_empty(m, k, dtype=E4M3), x_MK.new_empty(k // TILE, m, dtype=torch.float32)


_quantise_rows = define(
    __name__,
    "quantise_rows(Tensor x, bool pow2, *, str backend) -> (Tensor, Tensor)",
    _fake_rows,
    ("reference", "triton"),
)


def quantise_rows(x_MK: Tensor, *, pow2: bool, backend: str) -> Rows:
    """BF16 or FP32 [M, K] in tiles of 1 x 128. K is padded with zeros to a multiple of 128; M may be 0."""
    values, scales = _quantise_rows(x_MK, pow2, backend=backend)
    return Rows(values, scales, x_MK.shape[1])
