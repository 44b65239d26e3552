"""The chunk as torch and DeepSpeed want it: a module of plain autograd operators, its weight gradient in ``.grad``."""

from typing import Any

from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from benchmarks.bubble.work import Sleeper, initial_weight
from deepseek_train.schedule.action import Kind


class _SleepBackward(Function):
    """The identity, whose backward sleeps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sleeper: Sleeper, kind: Kind) -> Tensor:
        ctx.sleeper, ctx.kind = sleeper, kind
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        ctx.sleeper.sleep(ctx.kind)
        return dy, None, None


class SleepingModule(nn.Module):
    """Sleeps for I on the path of the input gradient and for W on the weight's own branch, so that a backward that is
    split by autograd (torch's) does each once, in the half it belongs to."""

    def __init__(self, stage: int, sleeper: Sleeper) -> None:
        super().__init__()
        self.weight = nn.Parameter(initial_weight(stage))
        self.sleeper = sleeper

    def forward(self, x: Tensor) -> Tensor:
        self.sleeper.sleep(Kind.FORWARD)
        weight = _SleepBackward.apply(self.weight, self.sleeper, Kind.BACKWARD_WEIGHT)
        y: Tensor = _SleepBackward.apply(x @ weight.t(), self.sleeper, Kind.BACKWARD_INPUT)
        return y
