"""FP8 operands as plain numbers, and how far they may be from what they were made of."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from deepseek_kernels.choice import ON_CPU
from deepseek_kernels.formats import TILE, Blocks, Rows
from deepseek_train.config.schema import Fp8Config, TilesConfig
from deepseek_train.fp8.room import Fp8
from deepseek_train.phases.recompute import Recomputation
from deepseek_train.phases.wgrad import Weight, WeightGradQueue

FP32 = 2.0**-24  # of a rounded operation
COARSE = ("128x128", "tensor")


def room(recompute: Recomputation | None = None, queue: WeightGradQueue | None = None, **recipe: Any) -> Fp8:
    """V3's recipe but for what ``recipe`` says."""
    queue = WeightGradQueue() if queue is None else queue
    return Fp8.of(Fp8Config(**recipe), ON_CPU, queue, recompute or Recomputation())


def coarse(tile: Any) -> dict[str, TilesConfig]:
    """A recipe in which activations and gradients share scales over ``tile``."""
    names = ("activations", "gradients", "weight_gradients", "expert_inputs", "expert_gradients")
    return {name: TilesConfig(tile) for name in names}


def numbers(quantised: Rows | Blocks) -> Tensor:
    """FP64, without padding."""
    values, scales = quantised.values.double(), quantised.scales.double()
    if isinstance(quantised, Rows):
        return (values * scales.t().repeat_interleave(TILE, 1))[:, : quantised.width]
    spread = scales.repeat_interleave(TILE, -1).repeat_interleave(TILE, -2)
    return (values * spread)[..., : quantised.rows, : quantised.width]


def weight(*shape: int, dtype: torch.dtype = torch.float32) -> Weight:
    made = Weight((torch.randn(shape) * shape[-1] ** -0.5).to(dtype))
    made.main_grad = torch.zeros(shape, requires_grad=False)
    return made


def slack(x: Tensor) -> Tensor:
    """How far E4M3 in tiles of 128 along the last axis may be off: 3 bits behind the point, steps of 2^-9 below 2^-6,
    and a scale of at most twice amax / 448."""
    tiles = functional.pad(x.double().abs(), (0, -x.shape[-1] % TILE)).unflatten(-1, (-1, TILE))
    largest = tiles.amax(-1).repeat_interleave(TILE, -1)[..., : x.shape[-1]]
    return torch.maximum(x.double().abs() / 16, largest / 448 / 512)


def product_slack(a: Tensor, b: Tensor) -> Tensor:
    """How far a b^T may be off when both are E4M3, rounded once each."""
    x, y = a.double().abs(), b.double().abs()
    return slack(a) @ y.t() + x @ slack(b).t() + slack(a) @ slack(b).t()


def apart(found: Tensor, wanted: Tensor) -> float:
    """Relative distance in the Frobenius norm."""
    one, other = found.detach().double(), wanted.detach().double()
    return float((one - other).norm() / other.norm())
