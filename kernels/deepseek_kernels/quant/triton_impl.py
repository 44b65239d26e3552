"""Quantisation by Triton: allocation and launches of ``row_kernels``, ``column_kernels`` and ``e5m6_kernels``.

Grids have one axis: the others end at 65535. Rows may lie apart (a slice of columns). A transposed view is not copied
either: its rows are the columns of what it views.
"""

import torch
import triton
from torch import Tensor

from deepseek_kernels.formats import E4M3, TILE, new_tiles, padded
from deepseek_kernels.quant import column_kernels as columns
from deepseek_kernels.quant import e5m6_kernels as e5m6
from deepseek_kernels.quant import row_kernels as rows


def _row_major(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _is_transposed(x: Tensor) -> bool:
    return x.stride(1) != 1 and x.stride(0) == 1


def quantise_rows(x_MK: Tensor, pow2: bool) -> tuple[Tensor, Tensor]:
    return _columns(x_MK.t(), pow2) if _is_transposed(x_MK) else _rows(_row_major(x_MK), pow2)


def quantise_columns(x_MK: Tensor, pow2: bool) -> tuple[Tensor, Tensor]:
    return _rows(x_MK.t(), pow2) if _is_transposed(x_MK) else _columns(_row_major(x_MK), pow2)


def _rows(x_MK: Tensor, pow2: bool) -> tuple[Tensor, Tensor]:
    m, k = x_MK.shape
    values, scales = new_tiles(x_MK, m, k)
    if values.numel():
        kp = values.shape[1]
        grid = (triton.cdiv(m, rows.ROWS) * (kp // TILE),)
        rows.rows_kernel[grid](
            x_MK, values, scales, m, k, x_MK.stride(0), kp, pow2, rows.ROWS, **rows.ROWS_LAUNCH
        )
    return values, scales


def _columns(x_MK: Tensor, pow2: bool) -> tuple[Tensor, Tensor]:
    m, k = x_MK.shape
    values, scales = new_tiles(x_MK, k, m)
    if values.numel():
        mp = values.shape[1]
        grid = (mp // TILE * triton.cdiv(k, columns.COLUMNS[0]),)
        columns.columns_kernel[grid](
            x_MK,
            values,
            scales,
            m,
            k,
            x_MK.stride(0),
            mp,
            pow2,
            *columns.COLUMNS,
            **columns.COLUMNS_LAUNCH,
        )
    return values, scales


def quantise_both(x_MK: Tensor, pow2: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if _is_transposed(x_MK):
        values_t, scales_t, values, scales = quantise_both(x_MK.t(), pow2)
        return values, scales, values_t, scales_t
    x_MK = _row_major(x_MK)
    m, k = x_MK.shape
    values, scales = new_tiles(x_MK, m, k)
    values_t, scales_t = new_tiles(x_MK, k, m)
    if x_MK.numel():
        mp, kp = padded(m), padded(k)
        columns.both_kernel[(mp // TILE * (kp // TILE),)](
            x_MK,
            values,
            scales,
            values_t,
            scales_t,
            m,
            k,
            x_MK.stride(0),
            kp,
            mp,
            pow2,
            *columns.BOTH,
            columns.both_vector(x_MK.element_size()),
            **columns.both_launch(x_MK.element_size(), pow2),
        )
    return values, scales, values_t, scales_t


def requantise_columns(values: Tensor, scales: Tensor, width: int, pow2: bool) -> tuple[Tensor, Tensor]:
    values, scales = values.contiguous(), scales.contiguous()
    m, kp = values.shape
    values_t, scales_t = new_tiles(values, width, m)
    if values_t.numel():
        mp = values_t.shape[1]
        columns.requantise_kernel[(mp // TILE * triton.cdiv(width, columns.REQUANTISE[0]),)](
            values,
            scales,
            values_t,
            scales_t,
            m,
            width,
            kp,
            mp,
            pow2,
            *columns.REQUANTISE,
            **columns.REQUANTISE_LAUNCH,
        )
    return values_t, scales_t


def quantise_blocks(w: Tensor, pow2: bool) -> tuple[Tensor, Tensor]:
    w = w.contiguous()
    n, k = w.shape[-2:]
    np, kp = padded(n), padded(k)
    values = w.new_empty(*w.shape[:-2], np, kp, dtype=E4M3)
    scales = w.new_empty(*w.shape[:-2], np // TILE, kp // TILE, dtype=torch.float32)
    if values.numel():
        rows.blocks_kernel[(scales.numel(),)](w, values, scales, n, k, np, kp, pow2, **rows.BLOCKS_LAUNCH)
    return values, scales


def transpose_values(values: Tensor) -> Tensor:
    values = values.contiguous()
    n, k = values.shape[-2:]
    turned = values.new_empty(*values.shape[:-2], k, n)
    if values.numel():
        grid = (values.numel() // (TILE * columns.TRANSPOSE[0]),)
        columns.transpose_kernel[grid](
            values.view(torch.uint8),
            turned.view(torch.uint8),
            values.numel() // (TILE * k),
            n,
            k,
            *columns.TRANSPOSE,
            **columns.TRANSPOSE_LAUNCH,
        )
    return turned


def dequantise(values: Tensor, scales: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    values, scales = values.contiguous(), scales.contiguous()
    m, kp = values.shape
    y_MK = values.new_empty(m, width, dtype=dtype)
    if y_MK.numel():
        grid = (triton.cdiv(m, rows.ROWS) * (kp // TILE),)
        rows.dequantise_kernel[grid](values, scales, y_MK, m, width, kp, rows.ROWS, **rows.DEQUANTISE_LAUNCH)
    return y_MK


def pack_e5m6(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    x_MK = _row_major(x_MK)
    m, k = x_MK.shape
    tiles = padded(k) // TILE
    words = x_MK.new_empty(m, tiles * e5m6.WORDS, dtype=torch.int32)
    scales = x_MK.new_empty(tiles, m, dtype=torch.float32)
    if words.numel():
        grid = (triton.cdiv(m, e5m6.PACK_ROWS) * tiles,)
        e5m6.pack_kernel[grid](
            x_MK, words, scales, m, k, x_MK.stride(0), tiles, e5m6.PACK_ROWS, **e5m6.PACK_LAUNCH
        )
    return words, scales


def unpack_e5m6(words: Tensor, scales: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    words, scales = words.contiguous(), scales.contiguous()
    m, tiles = len(words), len(scales)
    y_MK = words.new_empty(m, width, dtype=dtype)
    if y_MK.numel():
        grid = (triton.cdiv(m, e5m6.UNPACK_ROWS) * tiles,)
        e5m6.unpack_kernel[grid](words, scales, y_MK, m, width, tiles, e5m6.UNPACK_ROWS, **e5m6.UNPACK_LAUNCH)
    return y_MK
