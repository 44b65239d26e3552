"""What the tests of block-scaled products share: operands, the product in float64, and how far FP32 may be from it.

Legend: see ``deepseek_kernels.formats``; E experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from deepseek_kernels.formats import TILE, Blocks, Groups, Rows, padded
from deepseek_kernels.quant import quantise_blocks, quantise_rows
from tests.gpu.setting import DEVICE, ON_GPU, backends, randn

# cuBLAS's product needs a GPU whatever the build of torch.
BACKENDS = [name for name in backends("triton", "torch", "cuda") if ON_GPU or name == "triton"]
GROUPED_BACKENDS = [name for name in BACKENDS if name != "torch"]


def rows(m: int, k: int) -> Rows:
    return quantise_rows(randn(m, k, spread=1.0), pow2=False, backend="reference")


def blocks(*shape: int) -> Blocks:
    return quantise_blocks(randn(*shape, spread=1.0), pow2=False, backend="reference")


def grouped_rows(width: int, groups: Groups) -> Rows:
    """Rows by expert, padding rows zero."""
    x = torch.zeros(groups.padded, width, device=DEVICE)
    for start, count in zip(groups.starts.tolist(), groups.rows_E, strict=False):
        x[start : start + count] = randn(count, width, spread=1.0)
    return quantise_rows(x, pow2=False, backend="reference")


def grouped_columns(m: int, groups: Groups) -> Rows:
    """[m, A], columns by expert: the transpose in tiles along what is now the contraction."""
    x = torch.zeros(m, groups.padded, device=DEVICE)
    for start, count in zip(groups.starts.tolist(), groups.rows_E, strict=False):
        x[:, start : start + count] = randn(m, count, spread=1.0)
    return quantise_rows(x, pow2=False, backend="reference")


def plain(matrix: Rows | Blocks) -> Tensor:
    """The matrix in float64, its padding along K included."""
    values = matrix.values.float().double()
    if isinstance(matrix, Rows):
        return values * matrix.scales.double().t().repeat_interleave(TILE, 1)
    scales = matrix.scales.double().repeat_interleave(TILE, -2).repeat_interleave(TILE, -1)
    return (values * scales)[..., : matrix.rows, :]


@dataclass(frozen=True)
class Exact:
    """a b^T in float64; the same of magnitudes, which bounds every sum on the way."""

    product: Tensor
    magnitude: Tensor
    width: int

    @staticmethod
    def of(a: Tensor, b: Tensor) -> "Exact":
        return Exact(a @ b.t(), a.abs() @ b.abs().t(), a.shape[1])

    def limit(self, backend: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """The most that each element may be off.

        FP32 rounds each addition to 2^-24 of a partial sum, 128 of them in a tile and one for each tile, and each of
        three multiplications by scales. Tensor cores cut the 32 products of an instruction, and the sum so far, to 13
        fraction bits of the largest of them (V3_SPEC D.1): 4 instructions a tile, 33 numbers each."""
        unit = (TILE + padded(self.width) // TILE + 3) * 2.0**-24
        if ON_GPU and backend != "reference":
            unit += 4 * 33 * 2.0**-13
        off = unit * self.magnitude
        if dtype is torch.bfloat16:
            off = off + 2.0**-8 * (self.product.abs() + off)
        return off

    def off(self, found: Tensor, backend: str) -> float:
        """The largest error as a share of its limit: at most 1; infinite where anything is NaN."""
        error = (found.double() - self.product).abs()
        limit = self.limit(backend, found.dtype)
        share = torch.where(error == 0, 0.0, error / limit)
        return float(torch.nan_to_num(share, nan=torch.inf).max()) if share.numel() else 0.0


def added(exact: Exact, into: Tensor) -> Exact:
    """Of ``into`` + the product, whose one rounding is counted by the magnitude of ``into``."""
    return Exact(into.double() + exact.product, into.double().abs() + exact.magnitude, exact.width)
