"""Quantisation to E4M3 in tiles (V3 report section 3.3.2), and back. Formats and the scale rule: ``formats``.

Legend: see ``formats``; MP rows padded to a multiple of 128; W 32-bit words.
"""

import torch
from torch import Tensor

from deepseek_kernels.formats import E4M3, TILE, Blocks, Packed, Rows, new_tiles, padded
from deepseek_kernels.registry import define
from deepseek_kernels.shapes import NUMBERS, check_axes, check_dtype


def _fake_rows(x: Tensor, pow2: bool) -> tuple[Tensor, Tensor]:
    return new_tiles(x, *x.shape)


def _fake_columns(x: Tensor, pow2: bool) -> tuple[Tensor, Tensor]:
    return _fake_rows(x.t(), pow2)


def _fake_both(x: Tensor, pow2: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *_fake_rows(x, pow2), *_fake_columns(x, pow2)


def _fake_requantise(values: Tensor, scales: Tensor, width: int, pow2: bool) -> tuple[Tensor, Tensor]:
    return _fake_rows(values.new_empty(width, len(values)), pow2)


def _fake_blocks(w: Tensor, pow2: bool) -> tuple[Tensor, Tensor]:
    n, k = padded(w.shape[-2]), padded(w.shape[-1])
    scales = w.new_empty(*w.shape[:-2], n // TILE, k // TILE, dtype=torch.float32)
    return w.new_empty(*w.shape[:-2], n, k, dtype=E4M3), scales


def _fake_transpose(values: Tensor) -> Tensor:
    return torch.empty_like(values.mT, memory_format=torch.contiguous_format)


def _fake_dequantise(values: Tensor, scales: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    return values.new_empty(len(values), width, dtype=dtype)


def _fake_pack(x: Tensor) -> tuple[Tensor, Tensor]:
    m, k = x.shape[0], padded(x.shape[1])
    return x.new_empty(m, k // 8 * 3, dtype=torch.int32), x.new_empty(k // TILE, m, dtype=torch.float32)


_BACKENDS = ("reference", "triton", "cuda")
_TWO = "-> (Tensor, Tensor)"
_quantise_rows = define(
    __name__, f"quantise_rows(Tensor x, bool pow2, *, str backend) {_TWO}", _fake_rows, _BACKENDS
)
_quantise_columns = define(
    __name__, f"quantise_columns(Tensor x, bool pow2, *, str backend) {_TWO}", _fake_columns, _BACKENDS
)
_quantise_both = define(
    __name__,
    "quantise_both(Tensor x, bool pow2, *, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_both,
    _BACKENDS,
)
_requantise_columns = define(
    __name__,
    f"requantise_columns(Tensor values, Tensor scales, int width, bool pow2, *, str backend) {_TWO}",
    _fake_requantise,
    _BACKENDS,
)
_quantise_blocks = define(
    __name__, f"quantise_blocks(Tensor w, bool pow2, *, str backend) {_TWO}", _fake_blocks, _BACKENDS
)
_transpose_values = define(
    __name__, "transpose_values(Tensor values, *, str backend) -> Tensor", _fake_transpose, _BACKENDS
)
_dequantise = define(
    __name__,
    "dequantise(Tensor values, Tensor scales, int width, ScalarType dtype, *, str backend) -> Tensor",
    _fake_dequantise,
    _BACKENDS,
)
_pack_e5m6 = define(__name__, f"pack_e5m6(Tensor x, *, str backend) {_TWO}", _fake_pack, _BACKENDS)
_unpack_e5m6 = define(
    __name__,
    "unpack_e5m6(Tensor words, Tensor scales, int width, ScalarType dtype, *, str backend) -> Tensor",
    _fake_dequantise,
    _BACKENDS,
)


def quantise_rows(x_MK: Tensor, *, pow2: bool, backend: str) -> Rows:
    """BF16 or FP32 [M, K] in tiles of 1 x 128. K is padded with zeros to a multiple of 128; M may be 0."""
    _check_matrix("quantise_rows", x_MK)
    values, scales = _quantise_rows(x_MK, pow2, backend=backend)
    return Rows(values, scales, x_MK.shape[1])


def quantise_columns(x_MK: Tensor, *, pow2: bool, backend: str) -> Rows:
    """The transpose of ``x`` in tiles of 128 x 1: rows of x^T [K, MP], as weight gradients contract over tokens."""
    _check_matrix("quantise_columns", x_MK)
    values, scales = _quantise_columns(x_MK, pow2, backend=backend)
    return Rows(values, scales, x_MK.shape[0])


def quantise_both(x_MK: Tensor, *, pow2: bool, backend: str) -> tuple[Rows, Rows]:
    """``quantise_rows`` and ``quantise_columns``, reading ``x`` once."""
    _check_matrix("quantise_both", x_MK)
    values, scales, values_t, scales_t = _quantise_both(x_MK, pow2, backend=backend)
    return Rows(values, scales, x_MK.shape[1]), Rows(values_t, scales_t, x_MK.shape[0])


def requantise_columns(rows: Rows, *, pow2: bool, backend: str) -> Rows:
    """From tiles of 1 x 128 to the transpose in tiles of 128 x 1, by way of FP32 (V3_SPEC D.3)."""
    values, scales = _requantise_columns(rows.values, rows.scales, rows.width, pow2, backend=backend)
    return Rows(values, scales, len(rows.values))


def quantise_blocks(w: Tensor, *, pow2: bool, backend: str) -> Blocks:
    """A weight [N, K] or [E, N, K] in blocks of 128 x 128."""
    check_axes("quantise_blocks", "w", w, "N, K", "E, N, K")
    check_dtype("quantise_blocks", "w", w.dtype, *NUMBERS)
    values, scales = _quantise_blocks(w, pow2, backend=backend)
    return Blocks(values, scales, w.shape[-2], w.shape[-1])


def transpose_blocks(blocks: Blocks, *, backend: str) -> Blocks:
    """The transposed weight, exactly: blocks keep their scales (V3_SPEC D.3)."""
    values = _transpose_values(blocks.values, backend=backend)
    return Blocks(values, blocks.scales.mT.contiguous(), blocks.width, blocks.rows)


def dequantise(rows: Rows, dtype: torch.dtype, *, backend: str) -> Tensor:
    """value * scale in FP32, rounded to ``dtype``: [M, K]."""
    return _dequantise(rows.values, rows.scales, rows.width, dtype, backend=backend)


def pack_e5m6(x_MK: Tensor, *, backend: str) -> Packed:
    """BF16 or FP32 [M, K] in 12 bits an element, with a power-of-two scale for 1 x 128 (V3 report section
    3.3.3: what is kept of the attention output). A NaN stays one."""
    _check_matrix("pack_e5m6", x_MK)
    words, scales = _pack_e5m6(x_MK, backend=backend)
    return Packed(words, scales, x_MK.shape[1])


def unpack_e5m6(packed: Packed, dtype: torch.dtype, *, backend: str) -> Tensor:
    """[M, K] in ``dtype``, BF16 or wider: exact, but for what its least exponent cuts off."""
    return _unpack_e5m6(packed.words, packed.scales, packed.width, dtype, backend=backend)


def _check_matrix(function: str, x_MK: Tensor) -> None:
    check_axes(function, "x", x_MK, "M, K")
    check_dtype(function, "x", x_MK.dtype, *NUMBERS)
