"""The training schedules of a job: made once for each number of micro-batches, one for the whole world.

Only rank 0 reads files and searches; the others are told. A search compares sums of times, which another processor or
C library may round differently: ranks that searched for themselves might run schedules that do not fit together.
"""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from deepseek_train.config.schema import ScheduleConfig
from deepseek_train.pipeline.executor import PreparedSchedule
from deepseek_train.schedule.simulate import Durations
from deepseek_train.schedule.text import from_text, to_text
from deepseek_train.train.schedule_plan import schedule_for

_KEPT = 8  # batch sizes come back step after step; those of a ramp do not

T = TypeVar("T")


def told_by_rank_0(make: Callable[[], T]) -> T:
    """What ``make`` gives on the world's rank 0 (collective). Where that raises ValueError or OSError, all ranks do."""
    told: list[T | ValueError | OSError | None] = [None]
    if dist.get_rank() == 0:
        try:
            told = [make()]
        except (ValueError, OSError) as error:
            told = [error]
    dist.broadcast_object_list(told, src=0)
    found = told[0]
    if isinstance(found, ValueError | OSError):
        raise found
    return found  # type: ignore[return-value]


class ScheduleStore:
    """Prepared schedules of one pipeline rank by their number of micro-batches."""

    def __init__(self, config: ScheduleConfig, pp: int, pp_rank: int, durations: Durations) -> None:
        """``durations``: of each stage, used on the world's rank 0 alone."""
        self._config, self._pp, self._pp_rank, self._durations = config, pp, pp_rank, durations
        self._prepared: dict[int, PreparedSchedule] = {}

    def of(self, num_microbatches: int) -> PreparedSchedule:
        """The schedule of a step. With schedule=auto a new number of micro-batches is a collective of the world, while
        rank 0 searches (some seconds): all ranks enter it at the same step, as all have as many micro-batches, and have
        kept, and forgotten, the same schedules.
        """
        if num_microbatches not in self._prepared:
            if len(self._prepared) == _KEPT:
                del self._prepared[next(iter(self._prepared))]
            self._prepared[num_microbatches] = self._prepare(num_microbatches)
        return self._prepared[num_microbatches]

    def _prepare(self, num_microbatches: int) -> PreparedSchedule:
        config, pp, durations = self._config, self._pp, self._durations
        if config.name == "auto":
            text = told_by_rank_0(lambda: to_text(schedule_for(config, pp, num_microbatches, durations)))
            return PreparedSchedule(from_text(text), self._pp_rank)
        return PreparedSchedule(schedule_for(config, pp, num_microbatches, durations), self._pp_rank)
