"""Published idle time of each schedule, for pipelines long filled and messages that take no time.

F, I and W are seconds of one chunk, B = I + W, F&B an overlapped pair. Where a form is exact and where the
schedule is better or worse: docs/schedules.md, tests/paper/test_schedule_closed_forms.py.
"""

from collections.abc import Callable
from dataclasses import dataclass

from deepseek_train.schedule.simulate import Durations


@dataclass(frozen=True)
class _Times:
    f: float
    i: float
    w: float
    pair: float

    @property
    def b(self) -> float:
        return self.i + self.w


def _one_f_one_b(stages: int, _: int, t: _Times) -> float:
    """(PP - 1)(F + B), of GPipe too (V3 report table 2)."""
    return (stages - 1) * (t.f + t.b)


def _interleaved(stages: int, stages_per_rank: int, t: _Times) -> float:
    """(P - 1)(F + B) with P ranks and times of a chunk (arXiv 2104.04473, section 2.2)."""
    return (stages // stages_per_rank - 1) * (t.f + t.b)


def _zb_h1(stages: int, _: int, t: _Times) -> float:
    """(PP - 1)(F + B - 2W) (V3 report table 2)."""
    return (stages - 1) * (t.f + t.b - 2 * t.w)


def _zb_v(stages: int, _: int, t: _Times) -> float | None:
    """(P - 1) F with P = PP / 2 ranks, for F = I = W: the last rank waits for its first forward, and that is all.
    For other times nothing better than this bound is known.
    """
    return (stages // 2 - 1) * t.f if t.f == t.i == t.w else None


def _dualpipe(stages: int, _: int, t: _Times) -> float:
    """(PP/2 - 1)(F&B + B - 3W), of DualPipeV too (V3 report table 2)."""
    return (stages // 2 - 1) * (t.pair + t.b - 3 * t.w)


_FORMS: dict[str, Callable[[int, int, _Times], float | None]] = {
    "gpipe": _one_f_one_b,
    "1f1b": _one_f_one_b,
    "interleaved_1f1b": _interleaved,
    "zb_h1": _zb_h1,
    "zb_v": _zb_v,
    "dualpipe": _dualpipe,
    "dualpipe_v": _dualpipe,
}


def idle_seconds(name: str, num_stages: int, durations: Durations, stages_per_rank: int = 2) -> float | None:
    """Idle seconds of each rank in one step of the schedule ``name`` (canonical) over ``num_stages`` stages of the
    model copy; None where no closed form is known, such as for stages of different times.
    """
    seconds = durations.forward, durations.backward_input, durations.backward_weight, durations.overlapped
    match seconds:
        case (float() | int(), float() | int(), float() | int(), float() | int()):
            return _FORMS[name](num_stages, stages_per_rank, _Times(*seconds))
        case _:
            return None
