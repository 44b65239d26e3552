"""FP8 copies of weights, made when a step first asks for them and forgotten when the weights have changed."""

from torch import Tensor

from deepseek_kernels.formats import Blocks
from deepseek_kernels.quant import transpose_blocks
from deepseek_train.fp8.rounding import Rounding


class WeightCopies:
    """The copies of one rank's weights. Whoever changes weights calls ``forget``: after every optimizer step, and when
    a checkpoint has been read. Until then each weight is quantised once, whatever the number of micro-batches."""

    def __init__(self, rounding: Rounding) -> None:
        self._rounding = rounding
        # By identity (of a weight that is held here, so it stays its own).
        self._straight: dict[int, tuple[Tensor, Blocks]] = {}
        self._transposed: dict[int, Blocks] = {}

    def straight(self, weight: Tensor) -> Blocks:
        """W, for forward products: [N, K], or [E, N, K] of experts."""
        found = self._straight.get(id(weight))
        if found is None:
            found = self._straight[id(weight)] = weight, self._rounding.blocks(weight.detach())
        return found[1]

    def transposed(self, weight: Tensor) -> Blocks:
        """W^T, for input gradients: exactly ``straight``, transposed."""
        found = self._transposed.get(id(weight))
        if found is None:
            found = transpose_blocks(self.straight(weight), backend=self._rounding.backend)
            self._transposed[id(weight)] = found
        return found

    def forget(self) -> None:
        """The weights are no longer what they were."""
        self._straight.clear()
        self._transposed.clear()

    def __len__(self) -> int:
        """Weights that have copies."""
        return len(self._straight)
