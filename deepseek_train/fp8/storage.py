"""How activations wait for the backward pass: in FP8, in E5M6, or as they are (V3 report section 3.3.3).

Legend: see ``deepseek_kernels.formats``.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from deepseek_kernels.formats import Packed, Rows
from deepseek_kernels.quant import dequantise, pack_e5m6, unpack_e5m6
from deepseek_train.fp8.rounding import Rounding

Kept = tuple[Tensor, ...]


class Storage(Protocol):
    """What is kept of a matrix [M, K], and what it is good for afterwards."""

    def keep(self, x_MK: Tensor) -> Kept: ...

    def rows(self, kept: Kept, x_MK: Tensor) -> Rows:
        """The FP8 operand of the forward product, where ``x_MK`` is still at hand."""

    def columns(self, kept: Kept, width: int) -> Rows:
        """The FP8 operand of the weight gradient; ``width``: K."""

    def held(self, kept: Kept, width: int) -> Rows | Tensor:
        """For kernels that read either."""

    def restored(self, kept: Kept, width: int, dtype: torch.dtype) -> Tensor:
        """The numbers, as near as was kept, in ``dtype``: what they were."""


@dataclass(frozen=True)
class InFp8:
    """The forward operand itself is kept."""

    rounding: Rounding
    transposed: Rounding

    def keep(self, x_MK: Tensor) -> Kept:
        rows = self.rounding.rows(x_MK)
        return rows.values, rows.scales

    def rows(self, kept: Kept, x_MK: Tensor) -> Rows:
        return self.of(kept, x_MK.shape[1])

    def columns(self, kept: Kept, width: int) -> Rows:
        return self.transposed.columns_of(self.of(kept, width))

    def held(self, kept: Kept, width: int) -> Rows:
        return self.of(kept, width)

    def restored(self, kept: Kept, width: int, dtype: torch.dtype) -> Tensor:
        return dequantise(self.of(kept, width), dtype, backend=self.rounding.backend)

    @staticmethod
    def of(kept: Kept, width: int) -> Rows:
        values, scales = kept
        return Rows(values, scales, width)


@dataclass(frozen=True)
class InE5M6:
    """12 bits an element; for what attention's backward pass uses as well."""

    rounding: Rounding
    transposed: Rounding

    def keep(self, x_MK: Tensor) -> Kept:
        packed = pack_e5m6(x_MK, backend=self.rounding.backend)
        return packed.words, packed.scales

    def rows(self, kept: Kept, x_MK: Tensor) -> Rows:
        return self.rounding.rows(x_MK)

    def columns(self, kept: Kept, width: int) -> Rows:
        return self.transposed.columns(self.held(kept, width))

    def held(self, kept: Kept, width: int) -> Tensor:
        return self.restored(kept, width, torch.bfloat16)  # exact

    def restored(self, kept: Kept, width: int, dtype: torch.dtype) -> Tensor:
        words, scales = kept
        return unpack_e5m6(Packed(words, scales, width), dtype, backend=self.rounding.backend)


@dataclass(frozen=True)
class AsIs:
    """Nothing is rounded that waits."""

    rounding: Rounding
    transposed: Rounding

    def keep(self, x_MK: Tensor) -> Kept:
        return (x_MK,)

    def rows(self, kept: Kept, x_MK: Tensor) -> Rows:
        return self.rounding.rows(x_MK)

    def columns(self, kept: Kept, width: int) -> Rows:
        return self.transposed.columns(kept[0])

    def held(self, kept: Kept, width: int) -> Tensor:
        return kept[0]

    def restored(self, kept: Kept, width: int, dtype: torch.dtype) -> Tensor:
        return kept[0]
