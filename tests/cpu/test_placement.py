"""Expert placement: what holds for every load, what greedy guarantees, and what it does not."""

import random
from dataclasses import dataclass, replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_train.parallel.expert.placement import Placement, place_experts

TOLERANCE = 1e-9  # relative: sums in different orders
calm = settings(max_examples=60, deadline=None)  # a busy machine is no failure


@dataclass(frozen=True)
class Case:
    load_LE: list[list[int]]
    replicas: int
    groups: int
    nodes: int
    gpus: int

    @property
    def grouped(self) -> bool:
        return self.groups % self.nodes == 0

    def place(self) -> Placement:
        return place_experts(
            self.load_LE, replicas=self.replicas, groups=self.groups, nodes=self.nodes, gpus=self.gpus
        )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    nodes, gpus_per_node = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    groups, group_size = draw(st.integers(1, 8)), draw(st.integers(1, 4))
    experts, gpus = groups * group_size, nodes * gpus_per_node
    slots = -(-experts // gpus) + draw(st.integers(0, 3))
    load_E = st.lists(st.integers(0, 10_000) | st.integers(0, 3), min_size=experts, max_size=experts)
    return Case(draw(st.lists(load_E, min_size=1, max_size=3)), slots * gpus, groups, nodes, gpus)


def shares_of_gpus(case: Case, placement: Placement, layer: int) -> list[list[float]]:
    """Of each GPU, the load of each copy on it, read off physical_to_logical alone."""
    held_P = placement.physical_to_logical_LP[layer]
    slots = case.replicas // case.gpus
    share_P = [case.load_LE[layer][expert] / held_P.count(expert) for expert in held_P]
    return [share_P[first : first + slots] for first in range(0, case.replicas, slots)]


@calm
@given(cases())
def test_every_expert_is_somewhere_and_the_maps_are_inverse(case: Case) -> None:
    placement = case.place()
    for layer in range(len(case.load_LE)):
        held_P, copies_E = placement.physical_to_logical_LP[layer], placement.copies_LE[layer]
        assert len(held_P) == sum(copies_E) == case.replicas
        assert min(copies_E) >= 1
        assert all(held_P.count(expert) == copies for expert, copies in enumerate(copies_E))
        for expert, places_C in enumerate(placement.logical_to_physical_LEC[layer]):
            places = [place for place, held in enumerate(held_P) if held == expert]
            assert places_C == (*places, *[-1] * (len(places_C) - len(places)))
    widths = {len(places_C) for places_EC in placement.logical_to_physical_LEC for places_C in places_EC}
    assert widths == {max(map(max, placement.copies_LE))}


@calm
@given(cases())
def test_loads_of_gpus_are_those_of_the_maps(case: Case) -> None:
    placement = case.place()
    for layer, load_E in enumerate(case.load_LE):
        after_G = [sum(shares) for shares in shares_of_gpus(case, placement, layer)]
        assert placement.load_after_LG[layer] == pytest.approx(after_G)
        assert sum(placement.load_after_LG[layer]) == pytest.approx(sum(load_E))
        assert sum(placement.load_before_LG[layer]) == sum(load_E)
        mean = sum(load_E) / case.gpus
        assert placement.max_over_mean_after()[layer] == pytest.approx(max(after_G) / mean if mean else 1)


@calm
@given(cases())
def test_groups_stay_on_one_node_where_they_divide(case: Case) -> None:
    placement = case.place()
    assert placement.grouped == case.grouped
    group_size = len(case.load_LE[0]) // case.groups
    per_node = case.replicas // case.nodes
    for held_P in placement.physical_to_logical_LP if case.grouped else ():
        of_nodes = [
            {expert // group_size for expert in held_P[first : first + per_node]}
            for first in range(0, case.replicas, per_node)
        ]
        assert sorted(group for groups in of_nodes for group in groups) == list(range(case.groups))
        assert {len(groups) for groups in of_nodes} == {case.groups // case.nodes}


@calm
@given(cases())
def test_packs_differ_by_no_more_than_the_heaviest_item(case: Case) -> None:
    """Greedy's guarantee: nodes by the heaviest group, GPUs of a node by the heaviest copy on it; so at most
    mean + (1 - 1/packs) * heaviest."""
    placement = case.place()
    nodes = case.nodes if case.grouped else 1
    size = len(case.load_LE[0]) // case.groups
    per_node = case.gpus // nodes
    for layer, load_E in enumerate(case.load_LE):
        slack = TOLERANCE * sum(load_E)
        after_G, shares_G = placement.load_after_LG[layer], shares_of_gpus(case, placement, layer)
        of_nodes = [sum(after_G[first : first + per_node]) for first in range(0, case.gpus, per_node)]
        heaviest = max(sum(load_E[first : first + size]) for first in range(0, len(load_E), size))
        assert max(of_nodes) - min(of_nodes) <= (heaviest if nodes > 1 else 0) + slack
        for first in range(0, case.gpus, per_node):
            here = after_G[first : first + per_node]
            copy = max(share for shares in shares_G[first : first + per_node] for share in shares)
            assert max(here) - min(here) <= copy + slack
            assert max(here) <= sum(here) / per_node + (1 - 1 / per_node) * copy + slack


@calm
@given(st.lists(st.integers(0, 50), min_size=1, max_size=4), st.integers(0, 5))
def test_copies_are_as_good_as_any(load_E: list[int], redundant: int) -> None:
    """No other number of copies has a lighter heaviest copy: against all of them."""
    replicas = len(load_E) + redundant
    copies_E = place_experts([load_E], replicas=replicas, groups=1, nodes=1, gpus=1).copies_LE[0]
    every = [c for c in product(range(1, redundant + 2), repeat=len(load_E)) if sum(c) == replicas]
    best = min(max(load / n for load, n in zip(load_E, copies, strict=True)) for copies in every)
    assert max(load / n for load, n in zip(load_E, copies_E, strict=True)) == best


@calm
@given(cases())
def test_the_heaviest_copy_is_at_most_the_load_over_the_redundant(case: Case) -> None:
    placement = place_experts(case.load_LE, replicas=case.replicas, groups=1, nodes=1, gpus=case.gpus)
    redundant = case.replicas - len(case.load_LE[0])
    for load_E, copies_E in zip(case.load_LE, placement.copies_LE, strict=True):
        heaviest = max(load / copies for load, copies in zip(load_E, copies_E, strict=True))
        assert heaviest * redundant <= sum(load_E) * (1 + TOLERANCE)


@calm
@given(cases())
def test_layers_do_not_touch_one_another_and_nothing_is_random(case: Case) -> None:
    together = case.place()
    assert case.place() == together
    for layer, load_E in enumerate(case.load_LE):
        alone = Case([load_E], case.replicas, case.groups, case.nodes, case.gpus).place()
        assert alone.physical_to_logical_LP[0] == together.physical_to_logical_LP[layer]


def test_a_placement_by_hand() -> None:
    """Groups weigh 15 3 4 16: node 0 gets the groups 1 and 3, node 1 the groups 0 and 2.

    Node 0, experts 2 3 6 7 with 2 1 12 4: both copies go to expert 6, which becomes 4 4 4.
    Node 1, experts 0 1 4 5 with 9 6 3 1: one copy to expert 0, 4.5 4.5, then one to expert 1, 3 3.
    """
    placement = place_experts([[9, 6, 2, 1, 3, 1, 12, 4]], replicas=12, groups=4, nodes=2, gpus=4)
    assert placement.copies_LE == ((2, 2, 1, 1, 1, 1, 3, 1),)
    # Node 0: 4 4 4 4 by turns, 2 to GPU 0, 1 to GPU 1. Node 1: 4.5 4.5 3 3 by turns, 3 to GPU 2, 1 to GPU 3.
    assert placement.load_after_LG == ((10, 9, 10.5, 8.5),)
    assert placement.physical_to_logical_LP == ((2, 6, 6, 3, 6, 7, 0, 1, 4, 0, 1, 5),)
    assert placement.logical_to_physical_LEC[0][6] == (1, 2, 4)
    assert placement.logical_to_physical_LEC[0][0] == (6, 9, -1)
    assert placement.load_before_LG == ((15, 3, 4, 16),)


def test_ties_go_to_the_fewest_copies_and_the_lowest_index() -> None:
    placement = place_experts([[5] * 4, [0] * 4], replicas=6, groups=2, nodes=1, gpus=2)
    assert placement.copies_LE == ((2, 2, 1, 1), (2, 2, 1, 1))
    # 5 5 (experts 2, 3), then 2.5 2.5 2.5 2.5, by turns; without load the first GPU is filled first
    assert placement.physical_to_logical_LP == ((0, 1, 2, 0, 1, 3), (0, 0, 1, 1, 2, 3))
    assert placement.max_over_mean_before() == placement.max_over_mean_after() == (1, 1)


def test_groups_that_do_not_divide_are_forgotten() -> None:
    load_LE = [[8, 1, 1, 1, 1, 1]]
    spread = place_experts(load_LE, replicas=9, groups=2, nodes=3, gpus=3)
    anywhere = place_experts(load_LE, replicas=9, groups=1, nodes=1, gpus=3)
    assert spread == replace(anywhere, grouped=False)


def test_more_gpus_than_experts() -> None:
    """As in V3's decoding; before, some GPUs have no expert."""
    placement = place_experts([[6, 2, 2, 2]], replicas=6, groups=2, nodes=3, gpus=6)
    assert sorted(placement.load_after_LG[0]) == [2] * 6
    assert (placement.max_over_mean_before(), placement.max_over_mean_after()) == ((3,), (1,))


def zipf(exponent: float, layers: int, seed: int) -> list[list[float]]:
    popularity = [1e6 / rank**exponent for rank in range(1, 257)]
    draw = random.Random(seed)
    return [draw.sample(popularity, k=256) for _ in range(layers)]


@pytest.mark.parametrize(("exponent", "most"), [(0.5, 1.2), (0.8, 1.5), (1.0, 2.0)])
def test_v3_prefill_gains_on_skewed_loads(exponent: float, most: float) -> None:
    placement = place_experts(zipf(exponent, 8, seed=1), replicas=288, groups=8, nodes=4, gpus=32)
    before, after = placement.max_over_mean_before(), placement.max_over_mean_after()
    assert all(a < b for a, b in zip(after, before, strict=True))
    assert max(after) < most < min(before) * 1.2


def test_a_lucky_order_is_better_than_greedy() -> None:
    """Never worse than experts in their order: not true, with and without copies. This holds what we say of it."""
    lucky = place_experts([[3, 3, 0, 2, 2, 2]], replicas=6, groups=1, nodes=1, gpus=2)
    assert (lucky.load_before_LG, lucky.load_after_LG) == (((6, 6),), ((7, 5),))
    lucky = place_experts([[0, 3, 2, 1]], replicas=6, groups=1, nodes=1, gpus=2)
    assert (lucky.load_before_LG, lucky.load_after_LG) == (((3, 3),), ((3.5, 2.5),))


@calm
@given(cases())
def test_never_worse_where_one_expert_outweighs_two_gpus_and_all_heavy_ones_are_copied(case: Case) -> None:
    """What is true of skewed loads, without groups: say the busiest expert has at least twice a GPU's mean load, and
    no copy has more than half of it. Then after <= mean + heaviest copy <= the busiest expert <= before."""
    placement = place_experts(case.load_LE, replicas=case.replicas, groups=1, nodes=1, gpus=case.gpus)
    for layer, load_E in enumerate(case.load_LE):
        heaviest = max(n / c for n, c in zip(load_E, placement.copies_LE[layer], strict=True))
        if max(load_E) >= max(2 * sum(load_E) / case.gpus, 2 * heaviest):
            before, after = placement.max_over_mean_before()[layer], placement.max_over_mean_after()[layer]
            assert after <= before * (1 + TOLERANCE)


V3 = {"experts": 256, "replicas": 288, "groups": 8, "nodes": 4, "gpus": 32}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"replicas": 255},
            "replicas=255: there are 256 experts, and each needs a place; write replicas=256",
        ),
        ({"replicas": 290}, "256 experts + 34 redundant are not equally many on each of 32 GPUs"),
        ({"replicas": 290}, "write redundant=32 or redundant=64"),
        ({"replicas": 257}, "write redundant=0 or redundant=32"),
        ({"gpus": 320, "replicas": 256}, "on each of 320 GPUs; write redundant=64"),
        (
            {"gpus": 36, "nodes": 8},
            "gpus=36: 8 nodes do not hold equally many of them; write gpus=32 or gpus=40",
        ),
        ({"gpus": 4, "nodes": 8}, "gpus=4: 8 nodes do not hold equally many of them; write gpus=8"),
        ({"groups": 7}, "groups=7: 256 experts are no 7 groups of one size; write groups=4 or groups=8"),
        ({"groups": 512}, "groups=512: 256 experts are no 512 groups of one size; write groups=256"),
        ({"nodes": 0}, "nodes=0: write 1 or more"),
        ({"gpus": -1}, "gpus=-1: write 1 or more"),
    ],
)
def test_sizes_that_do_not_fit_are_explained(sizes: dict[str, int], message: str) -> None:
    asked = V3 | sizes
    with pytest.raises(ValueError) as caught:
        place_experts([[1.0] * asked.pop("experts")], **asked)
    assert message in str(caught.value)


def test_all_that_is_wrong_is_told_at_once() -> None:
    load_LE = [[1, 2, 3, 4], [1, -1, float("nan"), 4], [1, 2, 3], [float("inf"), -1, -2, -3]]
    with pytest.raises(ValueError) as caught:
        place_experts(load_LE, replicas=3, groups=3, nodes=2, gpus=5)
    assert str(caught.value).splitlines() == [
        "load of layer 1: expert 1 has -1, expert 2 has nan; tokens are counted: write numbers of 0 or more",
        "load of layer 2 lists 3 experts: layer 0 has 4, and all layers have as many; list 4",
        "load of layer 3: expert 0 has inf, expert 1 has -1, expert 2 has -2 and 1 more are as wrong; "
        "tokens are counted: write numbers of 0 or more",
        "replicas=3: there are 4 experts, and each needs a place; write replicas=4 or more",
        "groups=3: 4 experts are no 3 groups of one size; write groups=2 or groups=4",
        "gpus=5: 2 nodes do not hold equally many of them; write gpus=4 or gpus=6",
    ]


@pytest.mark.parametrize(("load_LE", "message"), [([], "has no layers"), ([[], []], "layer 0 is empty")])
def test_no_loads_are_explained(load_LE: list[list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        place_experts(load_LE, replicas=4, groups=1, nodes=1, gpus=2)
