"""What each schedule keeps alive, in chunks: peaks for every size, from the published counts."""

from itertools import accumulate

from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_train.schedule.action import Kind, Schedule
from deepseek_train.schedule.catalog import make_schedule
from deepseek_train.schedule.dataflow import actions_of
from deepseek_train.schedule.interleaved import group_sizes
from deepseek_train.schedule.simulate import peak_activations, peak_weight_queue
from tests.paper.schedules import legal_sizes


def _peak_until_weights(schedule: Schedule) -> list[int]:
    """For each rank the most chunks between their forward and the end of their weight gradient."""
    change = {Kind.FORWARD: 1, Kind.BACKWARD: -1, Kind.BACKWARD_INPUT: 0, Kind.BACKWARD_WEIGHT: -1}
    rows = [[change[a.kind] for step in row for a in actions_of(step)] for row in schedule.steps_R]
    return [max(accumulate(changes)) for changes in rows]


def _queues_nothing(schedule: Schedule) -> bool:
    return set(peak_weight_queue(schedule)) == {0}


@settings(max_examples=30, deadline=None)
@given(legal_sizes("1f1b"))
def test_1f1b_keeps_the_ranks_behind_it_gpipe_everything(sizes: tuple[int, int, int]) -> None:
    num_ranks, num_microbatches, _ = sizes
    schedule = make_schedule("1f1b", *sizes)
    assert peak_activations(schedule) == tuple(min(num_ranks - r, num_microbatches) for r in range(num_ranks))
    assert peak_activations(make_schedule("gpipe", *sizes)) == (num_microbatches,) * num_ranks
    assert _queues_nothing(schedule)


@settings(max_examples=30, deadline=None)
@given(legal_sizes("zb_h1"))
def test_zb_h1_keeps_on_every_rank_what_1f1b_keeps_on_its_first(sizes: tuple[int, int, int]) -> None:
    num_ranks, num_microbatches, _ = sizes
    schedule = make_schedule("zb_h1", *sizes)
    assert peak_activations(schedule) == peak_activations(make_schedule("1f1b", *sizes))
    assert _peak_until_weights(schedule) == [min(num_ranks, num_microbatches)] * num_ranks
    queued = [max(1, min(r + (num_microbatches > r), num_microbatches)) for r in range(num_ranks)]
    assert list(peak_weight_queue(schedule)) == queued


@settings(max_examples=30, deadline=None)
@given(legal_sizes("zb_v", ranks=10, microbatches=40))
def test_zb_v_keeps_no_more_than_one_microbatch_a_rank(sizes: tuple[int, int, int]) -> None:
    """2 P chunks of half a rank's layers: the memory of 1F1B's first rank, weight gradients included."""
    num_ranks, num_microbatches, _ = sizes
    peaks = _peak_until_weights(make_schedule("zb_v", *sizes))
    assert max(peaks) <= 2 * min(num_ranks, num_microbatches)
    if num_microbatches >= 2 * num_ranks:
        assert peaks == [2 * num_ranks] * num_ranks


@settings(max_examples=30, deadline=None)
@given(legal_sizes("interleaved_1f1b"))
def test_interleaved_keeps_a_group_for_each_further_stage(sizes: tuple[int, int, int]) -> None:
    num_ranks, num_microbatches, stages_per_rank = sizes
    schedule = make_schedule("interleaved_1f1b", *sizes)
    group = group_sizes(num_ranks, num_microbatches)[0]
    hops = [(num_ranks - 1 - r) * (1 if stages_per_rank == 1 else 2) for r in range(num_ranks)]
    most = stages_per_rank * num_microbatches
    expected = tuple(min(most, (stages_per_rank - 1) * group + hop + 1) for hop in hops)
    assert peak_activations(schedule) == expected
    assert _queues_nothing(schedule)


@settings(max_examples=20, deadline=None)
@given(legal_sizes("dualpipe"))
def test_dualpipe_keeps_one_more_than_there_are_stages(sizes: tuple[int, int, int]) -> None:
    num_ranks = sizes[0]
    schedule = make_schedule("dualpipe", *sizes)
    assert peak_activations(schedule) == (num_ranks + 1,) * num_ranks
    from_end = tuple(min(rank, num_ranks - 1 - rank) + 1 for rank in range(num_ranks))
    assert peak_weight_queue(schedule) == from_end


@settings(max_examples=20, deadline=None)
@given(legal_sizes("dualpipe_v", ranks=12))
def test_dualpipe_v_keeps_one_chunk_more_than_there_are_stages(sizes: tuple[int, int, int]) -> None:
    num_ranks = sizes[0]
    schedule = make_schedule("dualpipe_v", *sizes)
    assert peak_activations(schedule) == (2 * num_ranks + 1,) * num_ranks
    assert peak_weight_queue(schedule) == tuple(rank + 1 for rank in range(num_ranks))


@given(st.integers(1, 20), st.integers(1, 200))
def test_groups_of_microbatches_are_as_equal_as_possible_and_fill_the_ring(ranks: int, count: int) -> None:
    sizes = group_sizes(ranks, count)
    assert sum(sizes) == count
    assert sizes[0] - sizes[-1] in (0, 1)
    assert sizes[-1] >= ranks or sizes == (count,)
    assert count % ranks or set(sizes) == {ranks}
