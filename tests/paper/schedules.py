"""Schedules of every kind for property-based tests."""

from hypothesis import strategies as st

from deepseek_train.schedule.action import Placement, Schedule
from deepseek_train.schedule.catalog import make_schedule, placement_of
from deepseek_train.schedule.forward_only import forward_only

# Two stages a rank, both directions of the "V" of one micro-batch on it: stage 1 -> 2 stays on rank 1.
V_PLACEMENT = Placement(num_ranks=2, num_microbatches=4, ranks_SX=((0,), (1,), (1,), (0,)))


@st.composite
def dualpipe_sizes(draw: st.DrawFn) -> tuple[int, int]:
    """(ranks, micro-batches) that DualPipe accepts."""
    num_ranks = 2 * draw(st.integers(1, 8))
    return num_ranks, 2 * draw(st.integers(num_ranks, 32))


@st.composite
def training_schedules(draw: st.DrawFn) -> Schedule:
    """DualPipe or 1F1B, up to 16 ranks and 64 micro-batches."""
    if draw(st.booleans()):
        return make_schedule("dualpipe", *draw(dualpipe_sizes()))
    return make_schedule("1f1b", draw(st.integers(1, 16)), draw(st.integers(1, 64)))


@st.composite
def evaluation_schedules(draw: st.DrawFn) -> Schedule:
    """Forwards only, over DualPipe's or 1F1B's placement."""
    if draw(st.booleans()):
        sizes = 2 * draw(st.integers(1, 8)), 2 * draw(st.integers(1, 32))
        return forward_only(placement_of("dualpipe", *sizes))
    return forward_only(placement_of("1f1b", draw(st.integers(1, 16)), draw(st.integers(1, 64))))


def schedules() -> st.SearchStrategy[Schedule]:
    """Any schedule of the catalog."""
    return st.one_of(training_schedules(), evaluation_schedules())
