"""What FP8 functions are built with: passed down, never global; and the three products of a linear.

Legend: M rows, N outputs, K inputs, E experts; see ``deepseek_kernels.formats``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from deepseek_kernels.choice import Kernels
from deepseek_kernels.formats import Groups, Rows
from deepseek_kernels.gemm import gemm, gemm_add, grouped_gemm, grouped_gemm_add
from deepseek_train.config.schema import Fp8Config
from deepseek_train.fp8.recipe import Recipe
from deepseek_train.fp8.rounding import both
from deepseek_train.fp8.weights import WeightCopies
from deepseek_train.phases.recompute import Recomputation
from deepseek_train.phases.wgrad import Weight, WeightGradQueue


@dataclass(frozen=True)
class Fp8:
    """The recipe, who computes, the copies of this rank's weights, where weight gradients wait, and what is not
    kept."""

    recipe: Recipe
    kernels: Kernels
    copies: WeightCopies
    queue: WeightGradQueue
    recompute: Recomputation

    @staticmethod
    def of(config: Fp8Config, kernels: Kernels, queue: WeightGradQueue, recompute: Recomputation) -> "Fp8":
        recipe = Recipe.of(config, kernels)
        return Fp8(recipe, kernels, WeightCopies(recipe.weights), queue, recompute)

    def forward(self, x: Rows, weight: Weight, dtype: torch.dtype, groups: Groups | None = None) -> Tensor:
        """x W^T: [M, N]; of experts each group's rows by its own W."""
        how, copy = self.recipe.accumulate, self.copies.straight(weight)
        if groups is None:
            return gemm(x, copy, dtype=dtype, backend=self.kernels.gemm, accumulate=how)
        return grouped_gemm(x, copy, groups, dtype=dtype, backend=self.kernels.grouped_gemm, accumulate=how)

    def backward(self, dy: Rows, weight: Weight, dtype: torch.dtype, groups: Groups | None = None) -> Tensor:
        """dy W, the input gradient: [M, K]."""
        how, copy = self.recipe.accumulate, self.copies.transposed(weight)
        if groups is None:
            return gemm(dy, copy, dtype=dtype, backend=self.kernels.gemm, accumulate=how)
        return grouped_gemm(dy, copy, groups, dtype=dtype, backend=self.kernels.grouped_gemm, accumulate=how)

    def add_gradient(self, weight: Weight, dy_t: Rows, x_t: Rows, groups: Groups | None = None) -> None:
        """``main_grad`` += dy^T x, from both transposes [N, M] and [K, M]."""
        into, how = weight.main_grad, self.recipe.accumulate
        if groups is None:
            gemm_add(dy_t, x_t, into, backend=self.kernels.gemm, accumulate=how)
        else:
            grouped_gemm_add(dy_t, x_t, groups, into, backend=self.kernels.grouped_gemm, accumulate=how)

    def gradient_operands(self, dy_MN: Tensor) -> tuple[Rows, Rows]:
        """A gradient for its input gradient, and transposed for its weight gradient."""
        return both(self.recipe.gradients, self.recipe.weight_gradients, dy_MN.contiguous())
