"""Schedules of every kind for property-based tests."""

from hypothesis import strategies as st

from deepseek_train.schedule.action import Placement, Schedule
from deepseek_train.schedule.catalog import NAMES, make_schedule, placement_of
from deepseek_train.schedule.forward_only import forward_only

# Two stages a rank, both directions of the "V" of one micro-batch on it: stage 1 -> 2 stays on rank 1.
V_PLACEMENT = Placement(num_ranks=2, num_microbatches=4, ranks_SX=((0,), (1,), (1,), (0,)))


@st.composite
def dualpipe_sizes(draw: st.DrawFn, half_ranks: int = 8, microbatches: int = 64) -> tuple[int, int]:
    """(ranks, micro-batches) that DualPipe accepts."""
    num_ranks = 2 * draw(st.integers(1, half_ranks))
    return num_ranks, 2 * draw(st.integers(num_ranks, max(num_ranks, microbatches // 2)))


@st.composite
def legal_sizes(draw: st.DrawFn, name: str, ranks: int = 16, microbatches: int = 64) -> tuple[int, int, int]:
    """(ranks, micro-batches, stages a rank) that the schedule ``name`` accepts, up to about these sizes."""
    if name == "dualpipe":
        return *draw(dualpipe_sizes(ranks // 2, microbatches)), 2
    num_ranks = draw(st.integers(1, ranks))
    least = 2 * num_ranks if name == "dualpipe_v" else 1
    num_microbatches = draw(st.integers(least, max(least, microbatches)))
    return num_ranks, num_microbatches, draw(st.integers(1, 4)) if name == "interleaved_1f1b" else 2


@st.composite
def training_schedules(draw: st.DrawFn, ranks: int = 16, microbatches: int = 64) -> Schedule:
    """A schedule of the catalog, up to 16 ranks and 64 micro-batches."""
    name = draw(st.sampled_from(NAMES))
    return make_schedule(name, *draw(legal_sizes(name, ranks, microbatches)))


@st.composite
def evaluation_schedules(draw: st.DrawFn, ranks: int = 16, microbatches: int = 64) -> Schedule:
    """Forwards only, over the placement of any schedule; fewer micro-batches than it asks for are legal."""
    name = draw(st.sampled_from(NAMES))
    num_ranks, _, stages_per_rank = draw(legal_sizes(name, ranks, microbatches))
    unit = 2 if name == "dualpipe" else 1
    num_microbatches = unit * draw(st.integers(1, microbatches // unit))
    return forward_only(placement_of(name, num_ranks, num_microbatches, stages_per_rank))


def schedules(ranks: int = 16, microbatches: int = 64) -> st.SearchStrategy[Schedule]:
    """Any schedule of the catalog, or forwards only."""
    return st.one_of(training_schedules(ranks, microbatches), evaluation_schedules(ranks, microbatches))
