"""A pipeline stage of MoE layers whose computations sleep for set times and whose transfers are real.

A layer is x -> (x + 3 x) / 2, its second term by way of the other ranks, so after L layers a loss has grown 2^L-fold.

Legend: B sequences, T positions, D hidden, N = B T rows.
"""

import time
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from benchmarks.overlap.network import Shaped, Wire
from benchmarks.overlap.times import F, I, LayerTimes, W
from deepseek_train.parallel.expert.group import Among, ExpertGroup
from deepseek_train.parallel.expert.journey import UNCHANGED, Hop, Journey, Sum
from deepseek_train.phases.parcel import Parcel
from deepseek_train.phases.phase import Move, Phase, Row
from deepseek_train.phases.values import Hidden, Ledger, MicroBatch
from deepseek_train.phases.wgrad import WeightGradQueue
from deepseek_train.schedule.overlap import Role
from deepseek_train.spec.stages import StageSpec


class _Computes(Function):
    """``factor`` times x, in the time of ``role``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, factor: float, role: Role, times: LayerTimes, queue: WeightGradQueue
    ) -> Tensor:
        time.sleep(times.of(role, F))
        ctx.factor, ctx.role, ctx.times, ctx.queue = factor, role, times, queue
        return x * factor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None, None]:
        time.sleep(ctx.times.of(ctx.role, I))
        ctx.queue.add(partial(time.sleep, ctx.times.of(ctx.role, W)))
        return dy * ctx.factor, None, None, None, None


def computes(x: Tensor, factor: float, role: Role, times: LayerTimes, queue: WeightGradQueue) -> Tensor:
    result: Tensor = _Computes.apply(x, factor, role, times, queue)  # type: ignore[no-untyped-call]
    return result


class SleepingStage:
    """A ``PipelineStage``. ``shape_BTD``: of a micro-batch; each of its N rows goes to one rank of ``group`` (N is
    divisible by its size), and comes back."""

    def __init__(
        self,
        spec: StageSpec,
        shape_BTD: tuple[int, int, int],
        times: LayerTimes,
        group: ExpertGroup,
        queue: WeightGradQueue,
        wire: Wire,
    ) -> None:
        self.spec, self._shape_BTD, self._times, self._queue = spec, shape_BTD, times, queue
        b, t, d = shape_BTD
        per_byte = 1 / (b * t * d * 4)  # all rows of a micro-batch, in FP32, take the set time
        rows_P = [b * t // group.size] * group.size
        rows_S = torch.arange(b * t)
        hop = Hop(Among.ALL, rows_S, (Sum(rows_S, b * t),), rows_P, rows_P)
        exchange = Journey((hop,), group, UNCHANGED, remote_pairs=0)
        self._there, self._and_back = (
            Shaped(exchange, wire, times.of(role, F) * per_byte, times.of(role, I) * per_byte)
            for role in (Role.DISPATCH, Role.COMBINE)
        )
        layer = (
            Phase("attend", Role.ATTEND, self._attend),
            Move("dispatch", Role.DISPATCH),
            Phase("experts", Role.EXPERTS, self._experts),
            Move("combine", Role.COMBINE),
            Phase("unpack", Role.COMBINE, self._unpack),
        )
        self.phases: Row = layer * len(spec.layers)
        if spec.last:
            self.phases = (*self.phases[:-1], Phase("unpack", Role.COMBINE, self._unpack_with_loss))

    def _attend(self, value: MicroBatch | Hidden) -> Parcel:
        if isinstance(value, MicroBatch):
            tokens_BT1 = value.tokens.unsqueeze(-1).float()
            value = Hidden(tokens_BT1.expand(self._shape_BTD).contiguous().requires_grad_())
        x_BTD = computes(value.x_BTD, 1.0, Role.ATTEND, self._times, self._queue)
        return Parcel(value.moved_to(x_BTD), (x_BTD.flatten(0, 1),), self._there)

    def _experts(self, sent: Parcel) -> Parcel:
        (x_ND,) = sent.moves
        y_ND = computes(x_ND, 3.0, Role.EXPERTS, self._times, self._queue)
        return Parcel(sent.stays, (y_ND,), self._and_back)

    def _unpack(self, computed: Parcel) -> Hidden:
        hidden, (y_ND,) = computed.stays, computed.moves
        result: Hidden = hidden.moved_to((hidden.x_BTD + y_ND.view(self._shape_BTD)) / 2)
        return result

    def _unpack_with_loss(self, computed: Parcel) -> Hidden:
        hidden = self._unpack(computed)
        return Hidden(hidden.x_BTD, ledger=Ledger(main=hidden.x_BTD.mean()))
