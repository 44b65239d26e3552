"""Groups of ranks on paper: who shares what."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from deepseek_train.schedule.dualpipe import mirrored
from deepseek_train.schedule.one_f_one_b import straight
from deepseek_train.spec.layout import ParallelLayout, expert_ranks_per_node


@st.composite
def plain_layouts(draw: st.DrawFn) -> ParallelLayout:
    ep = draw(st.sampled_from([1, 2, 3, 4]))
    return ParallelLayout(pp=draw(st.integers(1, 6)), dp=ep * draw(st.integers(1, 4)), ep=ep)


@st.composite
def layouts_across_mirrors(draw: st.DrawFn) -> ParallelLayout:
    half = draw(st.integers(1, 3))
    pp, dp = 2 * draw(st.integers(1, 3)), half * draw(st.integers(1, 4))
    return ParallelLayout(pp, dp, 2 * half, mirrored=True)


def layouts() -> st.SearchStrategy[ParallelLayout]:
    return plain_layouts() | layouts_across_mirrors()


def is_partition(groups: set[tuple[int, ...]], world: int) -> bool:
    return sorted(rank for group in groups for rank in group) == list(range(world))


@given(layouts())
def test_coordinates_go_round(layout: ParallelLayout) -> None:
    for rank in range(layout.world):
        assert layout.rank_at(layout.pp_rank(rank), layout.dp_rank(rank)) == rank
    assert layout.world == layout.pp * layout.dp


@given(layouts())
def test_pipelines_partition_the_ranks(layout: ParallelLayout) -> None:
    groups = {layout.pipeline_group(rank) for rank in range(layout.world)}
    assert len(groups) == layout.dp
    assert is_partition(groups, layout.world)
    for rank in range(layout.world):
        assert layout.pipeline_group(rank)[layout.pp_rank(rank)] == rank


@given(plain_layouts())
def test_expert_groups_partition_the_ranks_in_consecutive_ones(layout: ParallelLayout) -> None:
    groups = {layout.expert_group(rank) for rank in range(layout.world)}
    assert is_partition(groups, layout.world)
    for rank in range(layout.world):
        group = layout.expert_group(rank)
        assert layout.ep_rank(rank) == layout.dp_rank(rank) % layout.ep
        assert group[layout.ep_rank(rank)] == rank
        assert group == tuple(range(group[0], group[0] + layout.ep))
        assert {layout.pp_rank(other) for other in group} == {layout.pp_rank(rank)}


@given(layouts_across_mirrors())
def test_expert_groups_across_mirrors_are_half_on_each(layout: ParallelLayout) -> None:
    """Counted over all ranks: the same half of data-parallel ranks, of a pipeline rank and of its mirror."""
    groups = {layout.expert_group(rank) for rank in range(layout.world)}
    assert is_partition(groups, layout.world)
    half = layout.ep // 2
    for rank in range(layout.world):
        pp, dp = divmod(rank, layout.dp)
        group = tuple(
            other
            for other in range(layout.world)
            if other // layout.dp in (pp, layout.pp - 1 - pp) and other % layout.dp // half == dp // half
        )
        assert layout.expert_group(rank) == group
        assert len(group) == layout.ep
        assert group[layout.ep_rank(rank)] == rank
        assert {layout.dp_rank(other) for other in group[:half]} == {layout.dp_rank(r) for r in group[half:]}
        assert layout.pp_rank(group[0]) < layout.pp_rank(group[-1])


@given(plain_layouts())
def test_replicas_of_a_straight_pipeline_partition_the_ranks(layout: ParallelLayout) -> None:
    placement = straight(layout.pp, 1)
    dense = {layout.dense_replicas(placement.holders_of(s)) for s in range(placement.num_stages)}
    assert is_partition(dense, layout.world)
    experts = {
        layout.expert_replicas(placement.holders_of(s), e)
        for s in range(placement.num_stages)
        for e in range(layout.ep)
    }
    assert is_partition(experts, layout.world)


@given(layouts(), st.integers(1, 3))
def test_mirrored_stages_are_replicas_of_each_other(layout: ParallelLayout, half: int) -> None:
    """DualPipe: ranks r and P - 1 - r hold the same two stages, so a stage lives on both (DESIGN idea 4)."""
    layout = replace(layout, pp=2 * half)
    placement = mirrored(layout.pp, 2 * layout.pp)
    for stage in range(placement.num_stages):
        replicas = layout.dense_replicas(placement.holders_of(stage))
        assert {layout.pp_rank(rank) for rank in replicas} == {stage, layout.pp - 1 - stage}
        assert len(replicas) == 2 * layout.dp
        of_experts = [layout.expert_replicas(placement.holders_of(stage), e) for e in range(layout.ep)]
        assert sorted(rank for group in of_experts for rank in group) == list(replicas)
        for ep_rank, group in enumerate(of_experts):
            assert {layout.ep_rank(rank) for rank in group} == {ep_rank}
            assert len(group) == layout.sharers * (1 if layout.mirrored else 2) // layout.ep


def test_v3() -> None:
    """PP16 x DP128, EP64 = 8 nodes of 8 (V3 report section 3.1)."""
    layout = ParallelLayout(pp=16, dp=128, ep=64)
    assert layout.world == 2048
    assert layout.expert_group(130) == tuple(range(128, 192))
    assert layout.expert_replicas((0, 15), 3) == (3, 67, 1923, 1987)


def test_v3_with_experts_across_mirrors() -> None:
    """Half the expert weights on each rank, and a group on 16 nodes, 8 of each of two pipeline ranks."""
    layout = ParallelLayout(pp=16, dp=128, ep=128, mirrored=True)
    assert layout.expert_group(130) == (*range(128, 192), *range(14 * 128, 14 * 128 + 64))
    assert layout.expert_replicas((0, 15), 3) == (3, 67)
    assert layout.expert_replicas((0, 15), 67) == (1923, 1987)
    assert expert_ranks_per_node(layout, 8) == 8


def test_nodes_across_mirrors_follow_from_global_ranks() -> None:
    nodes_of_2 = {pp: expert_ranks_per_node(ParallelLayout(pp, 1, 2, mirrored=True), 2) for pp in (2, 4, 6)}
    assert nodes_of_2 == {2: 2, 4: 1, 6: None}  # of six, ranks 2 and 3 are on one node, 0 and 5 are not
    assert expert_ranks_per_node(ParallelLayout(4, 2, 4, mirrored=True), 4) == 2
    assert expert_ranks_per_node(ParallelLayout(2, 4, 8, mirrored=True), 8) == 8
