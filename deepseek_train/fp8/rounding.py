"""From numbers to FP8 and back by one rule: which elements share a scale, and whether scales are powers of two.

Tiles of 1 x 128 are the kernels'. Coarser ones, which experiments compare with, are plain torch: a larger tile's scale
is written to every 1 x 128 in it, so products are the same code. Legend: see ``deepseek_kernels.formats``.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from deepseek_kernels.formats import TILE, Blocks, Rows
from deepseek_kernels.quant import (
    dequantise,
    quantise_blocks,
    quantise_both,
    quantise_columns,
    quantise_rows,
    requantise_columns,
)
from deepseek_kernels.quant.reference import amax_of, scale_of, to_e4m3

Tile = Literal["1x128", "128x128", "tensor"]


@dataclass(frozen=True)
class Rounding:
    """The rule for one class of tensors, and the backend that follows it."""

    tile: Tile = "1x128"
    pow2: bool = False
    backend: str = "reference"

    def rows(self, x_MK: Tensor) -> Rows:
        """Of a matrix whose rows are contracted along K."""
        if self.tile == "1x128":
            return quantise_rows(x_MK, pow2=self.pow2, backend=self.backend)
        return _coarse_rows(x_MK, self.tile, self.pow2)

    def columns(self, x_MK: Tensor) -> Rows:
        """The transpose, whose rows are contracted along M."""
        if self.tile == "1x128":
            return quantise_columns(x_MK, pow2=self.pow2, backend=self.backend)
        return _coarse_rows(x_MK.t(), self.tile, self.pow2)

    def columns_of(self, rows: Rows) -> Rows:
        """``columns`` of what is FP8 already."""
        if self.tile == "1x128":
            return requantise_columns(rows, pow2=self.pow2, backend=self.backend)
        return self.columns(dequantise(rows, torch.float32, backend=self.backend))

    def blocks(self, w: Tensor) -> Blocks:
        """Of a weight, or of a weight for each expert."""
        if self.tile == "128x128":
            return quantise_blocks(w, pow2=self.pow2, backend=self.backend)
        return _one_block(w, self.pow2)


def both(rows: Rounding, columns: Rounding, x_MK: Tensor) -> tuple[Rows, Rows]:
    """``rows.rows`` and ``columns.columns`` of one matrix, which is read once where both follow one rule."""
    if rows == columns and rows.tile == "1x128":
        return quantise_both(x_MK, pow2=rows.pow2, backend=rows.backend)
    return rows.rows(x_MK), columns.columns(x_MK)


def _coarse_rows(x_MK: Tensor, tile: Tile, pow2: bool) -> Rows:
    m, k = x_MK.shape
    padded = functional.pad(x_MK, (0, -k % TILE, 0, -m % TILE))
    blocks = padded.unflatten(1, (padded.shape[1] // TILE, TILE)).unflatten(
        0, (padded.shape[0] // TILE, TILE)
    )
    amax = amax_of(blocks, (1, 3))  # [M / 128, K / 128]
    if tile == "tensor" and amax.numel():
        amax = amax.amax().expand_as(amax)
    scale_GM = scale_of(amax, pow2).t().repeat_interleave(TILE, 1)[:, :m]
    values = to_e4m3(padded[:m], scale_GM.t().repeat_interleave(TILE, 1))
    return Rows(values.contiguous(), scale_GM.contiguous(), k)  # of a transposed x they would be transposed


def _one_block(w: Tensor, pow2: bool) -> Blocks:
    n, k = w.shape[-2:]
    padded = functional.pad(w, (0, -k % TILE, 0, -n % TILE))
    scale = scale_of(amax_of(w, (-2, -1)), pow2)[..., None, None]  # of each expert
    shape = *w.shape[:-2], padded.shape[-2] // TILE, padded.shape[-1] // TILE
    return Blocks(to_e4m3(padded, scale).contiguous(), scale.expand(shape).contiguous(), n, k)
