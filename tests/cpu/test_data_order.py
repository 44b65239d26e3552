"""The order of samples: a permutation each epoch, another one each, the same for any number of ranks."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_train.data.order import SampleOrder

SIZES = st.integers(1, 700)
SEEDS = st.integers(0, 1 << 40)


@given(size=SIZES, seed=SEEDS, epoch=st.integers(0, 1 << 20))
@settings(max_examples=60, deadline=None)
def test_every_epoch_visits_each_sample_once(size: int, seed: int, epoch: int) -> None:
    order = SampleOrder(size, seed, "hash")
    visited = [order.sample(epoch * size + position) for position in range(size)]
    assert sorted(visited) == list(range(size))


@given(seed=SEEDS)
@settings(max_examples=20, deadline=None)
def test_epochs_seeds_and_manifests_have_orders_of_their_own(seed: int) -> None:
    def epoch(order: SampleOrder, number: int) -> tuple[int, ...]:
        return tuple(order.sample(number * 100 + position) for position in range(100))

    order = SampleOrder(100, seed, "hash")
    orders = [epoch(order, 0), epoch(order, 1), epoch(order, 2), tuple(range(100))]
    orders += [epoch(SampleOrder(100, seed + 1, "hash"), 0), epoch(SampleOrder(100, seed, "other"), 0)]
    assert len(set(orders)) == len(orders)


@given(
    size=SIZES,
    batches=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    dp=st.sampled_from([1, 2, 3, 4, 8]),
)
@settings(max_examples=40, deadline=None)
def test_global_batches_do_not_depend_on_the_number_of_ranks(size: int, batches: list[int], dp: int) -> None:
    order = SampleOrder(size, 7, "hash")
    alone = [order.sample(k) for k in range(sum(batches) * dp)]
    consumed = 0
    for per_rank in batches:
        fresh = SampleOrder(size, 7, "hash")  # a run that was just resumed
        by_rank = [
            [fresh.sample(consumed + rank * per_rank + i) for i in range(per_rank)]
            for rank in reversed(range(dp))
        ]
        together = [sample for ranks in reversed(by_rank) for sample in ranks]
        assert together == alone[consumed : consumed + per_rank * dp]
        consumed += per_rank * dp


@pytest.mark.parametrize("size", [2, 7, 65])
def test_each_sample_is_as_likely_at_each_position(size: int) -> None:
    epochs = 3000
    order = SampleOrder(size, 1, "hash")
    first = Counter(order.sample(epoch * size) for epoch in range(epochs))
    expected = epochs / size
    assert max(abs(first[sample] - expected) for sample in range(size)) < 5 * expected**0.5


def test_neighbours_are_scattered() -> None:
    order = SampleOrder(1000, 3, "hash")
    visited = [order.sample(k) for k in range(1000)]
    steps = Counter((b - a) % 1000 for a, b in zip(visited, visited[1:], strict=False))
    assert steps.most_common(1)[0][1] < 15  # a shuffled deck: Poisson with mean 1


def test_a_huge_split_is_reached_at_random() -> None:
    size = 3_800_000_000
    order = SampleOrder(size, 0, "hash")
    picked = [order.sample(5 * size + k) for k in range(0, size, size // 50)]
    assert len(set(picked)) == len(picked)
    assert all(0 <= sample < size for sample in picked)


def test_the_order_of_version_1_never_changes() -> None:
    order = SampleOrder(1000, 42, "0123abcd")
    assert [order.sample(k) for k in (0, 1, 2, 999, 1000, 123_456_789)] == FROZEN


def test_a_negative_number_is_refused() -> None:
    with pytest.raises(ValueError, match="number 0"):
        SampleOrder(10, 0, "hash").sample(-1)


FROZEN = [376, 685, 211, 65, 478, 144]
