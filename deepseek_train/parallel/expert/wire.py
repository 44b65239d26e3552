"""Rows on the wire: the tensors of a parcel side by side as bytes, so that each hop is one message.

The first tensor holds hidden vectors and travels in a format of its own; what else there is (routing weights, their
gradients) travels as it is. FP8: E4M3 with one power-of-two scale for 128 channels (V3 report section 3.3.1 and 3.2.2:
activations before dispatch, and gradients before the backward of combine), 7224 bytes for 7168 channels.

Legend: N rows, D channels, T tiles of 128 channels, W 8-byte words.
"""

from enum import Enum

import torch
from torch import Tensor
from torch.nn import functional

from deepseek_kernels.formats import TILE
from deepseek_kernels.quant import quantise_rows
from deepseek_train.phases.parcel import Tensors

_WORD = 8  # bytes: every tensor starts at one, whatever its dtype
_MANTISSA = 23  # bits of FP32 below its exponent


class WireFormat(Enum):
    """Of hidden vectors on the wire."""

    SAME = "params"
    BF16 = "bf16"
    FP8 = "fp8"


Fields = tuple[tuple[torch.dtype, int], ...]  # dtype and width of each tensor


def fields_of(tensors: Tensors) -> Fields:
    return tuple((t.dtype, t.shape[1]) for t in tensors)


def encode(tensors: Tensors, format: WireFormat, backend: str = "reference") -> Tensor:
    """One row of words for each row of ``tensors`` (all 2-dimensional): [N, W], int64. ``backend``: who quantises."""
    hidden, *others = tensors
    match format:
        case WireFormat.FP8:
            parts = [*quantise(hidden, backend), *others]
        case WireFormat.BF16:
            parts = [hidden.to(torch.bfloat16), *others]
        case WireFormat.SAME:
            parts = [hidden, *others]
    if len(parts) == 1 and parts[0].shape[1] * parts[0].itemsize % _WORD == 0:
        return parts[0].contiguous().view(torch.int64)
    padded = [_padded(part.contiguous().view(torch.uint8)) for part in parts]
    return torch.cat(padded, 1).view(torch.int64)


def decode(rows_NW: Tensor, fields: Fields, format: WireFormat) -> Tensors:
    """The reverse of ``encode`` for tensors of ``fields``; what travelled as it is are views."""
    (dtype, width), *others = fields
    bytes_NB = rows_NW.view(torch.uint8)
    match format:
        case WireFormat.FP8:
            tiles = -(-width // TILE)
            values, exponents, *rest = _cut(
                bytes_NB, ((torch.float8_e4m3fn, width), (torch.uint8, tiles), *others)
            )
            return (dequantise(values, exponents, dtype), *rest)
        case WireFormat.BF16:
            hidden, *rest = _cut(bytes_NB, ((torch.bfloat16, width), *others))
            return (hidden.to(dtype), *rest)
        case WireFormat.SAME:
            return _cut(bytes_NB, fields)


def _padded(bytes_NB: Tensor) -> Tensor:
    return functional.pad(bytes_NB, (0, -bytes_NB.shape[1] % _WORD))


def _cut(bytes_NB: Tensor, fields: Fields) -> Tensors:
    found, at = [], 0
    for dtype, width in fields:
        size = width * dtype.itemsize
        found.append(bytes_NB[:, at : at + size].view(dtype))
        at += -(-size // _WORD) * _WORD
    return tuple(found)


def quantise(x_ND: Tensor, backend: str = "reference") -> tuple[Tensor, Tensor]:
    """E4M3 values [N, D] and the exponents (biased by 127, one byte: UE8M0) of the scales of each tile [N, T], by the
    one rule that linears follow (``deepseek_kernels.formats``, powers of two): to quantise once more what has arrived
    changes nothing. A tile with an Inf comes back without a finite number; a NaN comes back as one."""
    narrow = x_ND if x_ND.dtype in (torch.bfloat16, torch.float32) else x_ND.float()
    rows = quantise_rows(narrow, pow2=True, backend=backend)
    # The exponent of FP32 is UE8M0; an Inf's is 255, which is UE8M0's NaN.
    exponents_NT = (rows.scales.view(torch.int32) >> _MANTISSA).to(torch.uint8).t().contiguous()
    return rows.values[:, : rows.width], exponents_NT


def dequantise(values_ND: Tensor, exponents_NT: Tensor, dtype: torch.dtype) -> Tensor:
    """values x 2^(exponent - 127), exact in BF16 and wider."""
    scale_NT = torch.ldexp(
        torch.ones_like(exponents_NT, dtype=torch.float32), exponents_NT.to(torch.int32) - 127
    )
    scale_ND = scale_NT.repeat_interleave(TILE, 1)[:, : values_ND.shape[1]]
    return (values_ND.float() * scale_ND).to(dtype)
