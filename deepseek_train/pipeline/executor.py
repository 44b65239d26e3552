"""Folds one rank's share of a schedule over its stages: the interpreter that really runs.

Programs come from ``schedule.lower``, the order inside an overlapped pair from ``schedule.overlap``; the
weight-gradient queue and the links are given. What an action is, says ``passage``.
"""

from collections.abc import Callable, Mapping

from deepseek_train.parallel.p2p import Links
from deepseek_train.phases.values import MicroBatch
from deepseek_train.phases.wgrad import WeightGradQueue
from deepseek_train.pipeline.mail import Mail
from deepseek_train.pipeline.passage import Pass, StageRows
from deepseek_train.pipeline.trace import Reporting, Trace, Untraced
from deepseek_train.pipeline.values import Boundary, LossScales, PipelineStage, Ran
from deepseek_train.schedule.action import Action, Placement, Schedule
from deepseek_train.schedule.lower import Program, lower
from deepseek_train.schedule.overlap import FIGURE_4, Order
from deepseek_train.schedule.windows import send_windows
from deepseek_train.watch.whereabouts import Whereabouts


class PreparedSchedule:
    """A schedule with its communication written out for one rank."""

    def __init__(self, schedule: Schedule, pp_rank: int) -> None:
        self.pp_rank = pp_rank
        self.placement: Placement = schedule.placement
        self.program: Program = lower(schedule)[pp_rank]
        self.windows = {link: n for link, n in send_windows(schedule).items() if link[0] == pp_rank}


class StepFailed(RuntimeError):
    """Something went wrong in one action of a schedule; the message names it."""


class Executor:
    """Runs prepared schedules. ``stages`` are this rank's, by index, as they are now; ``order`` is that
    of overlapped pairs; ``where`` is told of every phase and message."""

    def __init__(
        self,
        stages: Mapping[int, PipelineStage],
        links: Links,
        queue: WeightGradQueue,
        boundary: Boundary,
        order: Order = FIGURE_4,
        where: Whereabouts | None = None,
    ) -> None:
        self._stages = StageRows.of(stages, queue, order)
        self._links, self._boundary, self._where = links, boundary, where or Whereabouts.unseen()
        self._failed = False

    def run(
        self,
        prepared: PreparedSchedule,
        batch_of: Callable[[int], MicroBatch],
        scales: LossScales | None,
        trace: Trace | None = None,
    ) -> Ran:
        """One pass: a training step's forwards and backwards, or, with ``scales`` None, an evaluation's forwards.
        ``batch_of(m)`` gives micro-batch m; it is asked where m enters and where its loss is computed. Weight
        gradients are in ``main_grad`` afterwards. Raises ``StepFailed``; ranks are out of step then, and this executor
        runs no more."""
        if self._failed:
            raise StepFailed("an earlier pass failed half-way: start again from a checkpoint")
        mail = Mail(self._links, self._boundary, prepared.windows, self._where)
        recorder = Reporting(self._where, trace or Untraced())
        one = Pass(self._stages, prepared.placement, mail, batch_of, scales, recorder)
        try:
            for instruction in prepared.program:
                one.perform(instruction)
            mail.drain()
        except Exception as error:
            self._failed = True
            raise StepFailed(_failed(prepared.pp_rank, one.doing, error)) from error
        return one.ran


def _failed(pp_rank: int, doing: Action | None, error: Exception) -> str:
    where = "before its first action"
    if doing is not None:
        where = (
            f"{doing} ({doing.kind.name.lower()} of micro-batch {doing.microbatch} in stage {doing.stage})"
        )
    return f"pipeline rank {pp_rank}, {where}: {type(error).__name__}: {error}"
