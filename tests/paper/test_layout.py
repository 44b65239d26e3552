"""Groups of ranks on paper: who shares what."""

from hypothesis import given
from hypothesis import strategies as st

from deepseek_train.schedule.dualpipe import mirrored
from deepseek_train.schedule.one_f_one_b import straight
from deepseek_train.spec.layout import ParallelLayout


@st.composite
def layouts(draw: st.DrawFn) -> ParallelLayout:
    ep = draw(st.sampled_from([1, 2, 3, 4]))
    return ParallelLayout(pp=draw(st.integers(1, 6)), dp=ep * draw(st.integers(1, 4)), ep=ep)


def is_partition(groups: set[tuple[int, ...]], world: int) -> bool:
    return sorted(rank for group in groups for rank in group) == list(range(world))


@given(layouts())
def test_coordinates_go_round(layout: ParallelLayout) -> None:
    for rank in range(layout.world):
        assert layout.rank_at(layout.pp_rank(rank), layout.dp_rank(rank)) == rank
        assert layout.ep_rank(rank) == layout.dp_rank(rank) % layout.ep
    assert layout.world == layout.pp * layout.dp


@given(layouts())
def test_pipelines_partition_the_ranks(layout: ParallelLayout) -> None:
    groups = {layout.pipeline_group(rank) for rank in range(layout.world)}
    assert len(groups) == layout.dp
    assert is_partition(groups, layout.world)
    for rank in range(layout.world):
        assert layout.pipeline_group(rank)[layout.pp_rank(rank)] == rank


@given(layouts())
def test_expert_groups_partition_the_ranks_in_consecutive_ones(layout: ParallelLayout) -> None:
    groups = {layout.expert_group(rank) for rank in range(layout.world)}
    assert is_partition(groups, layout.world)
    for rank in range(layout.world):
        group = layout.expert_group(rank)
        assert group[layout.ep_rank(rank)] == rank
        assert group == tuple(range(group[0], group[0] + layout.ep))
        assert {layout.pp_rank(other) for other in group} == {layout.pp_rank(rank)}


@given(layouts())
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
    layout = ParallelLayout(2 * half, layout.dp, layout.ep)
    placement = mirrored(layout.pp, 2 * layout.pp)
    for stage in range(placement.num_stages):
        replicas = layout.dense_replicas(placement.holders_of(stage))
        assert {layout.pp_rank(rank) for rank in replicas} == {stage, layout.pp - 1 - stage}
        assert len(replicas) == 2 * layout.dp
        of_experts = [layout.expert_replicas(placement.holders_of(stage), e) for e in range(layout.ep)]
        assert sorted(rank for group in of_experts for rank in group) == list(replicas)
        for ep_rank, group in enumerate(of_experts):
            assert {layout.ep_rank(rank) for rank in group} == {ep_rank}


def test_v3() -> None:
    """PP16 x DP128, EP64 = 8 nodes of 8 (V3 report section 3.1)."""
    layout = ParallelLayout(pp=16, dp=128, ep=64)
    assert layout.world == 2048
    assert layout.expert_group(130) == tuple(range(128, 192))
    assert layout.expert_replicas((0, 15), 3) == (3, 67, 1923, 1987)
