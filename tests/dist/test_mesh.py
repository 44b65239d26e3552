"""The mesh's groups are those of the definition, on real ranks; links carry both directions at once, in order.

Who should be in a group is worked out here by going over all ranks, not by the layout's own formulae.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from deepseek_train.parallel.expert.group import Among
from deepseek_train.parallel.mesh import ReplicaGroup, make_mesh
from deepseek_train.parallel.p2p import Links
from deepseek_train.schedule.action import Placement
from deepseek_train.schedule.dataflow import MessageKind
from deepseek_train.schedule.lower import all_queues
from deepseek_train.spec.layout import ParallelLayout
from deepseek_train.spec.stages import split_layers
from tests.dist.grid import Case
from tests.harness import run_ranks

CASES = [
    Case("dualpipe", 4, dp=2, ep=2, mtp=1),
    Case("dualpipe", 2, dp=4, ep=2, mtp=0),
    Case("dualpipe", 2, dp=4, ep=4, mtp=1),
    Case("dualpipe", 2, dp=4, ep=4, mtp=0, mirrored=True),  # experts are replicated over data-parallel ranks
    Case("dualpipe", 4, dp=2, ep=4, mtp=1, mirrored=True),  # and here nowhere
    Case("1f1b", 4, dp=2, ep=1, mtp=1),  # the embedding is on the first and the last pipeline rank
    Case("1f1b", 4, dp=2, ep=2, mtp=0),  # and here on the first only
    Case("1f1b", 1, dp=8, ep=4, mtp=1),
    Case("1f1b", 8, dp=1, ep=1, layers=8, mtp=1),
]


@dataclass(frozen=True)
class Group:
    """A group as its member sees it: the ranks it was told, those torch has in it, and the sum over them."""

    told: tuple[int, ...]
    members: tuple[int, ...]
    total: int  # all-reduced sum of the members' ranks
    same_as: int  # tells process groups apart


@dataclass(frozen=True)
class Seen:
    """The groups of one rank's mesh."""

    expert: list[Group]  # forward and backward
    expert_rank: int
    dense: dict[int, Group]
    experts: dict[int, Group]
    embedding: Group | None


def see_groups(rank: int, _world_size: int, cases: list[Case]) -> list[Seen]:
    return [see(rank, case) for case in cases]


def see(rank: int, case: Case) -> Seen:
    specs = split_layers(case.model, case.pp)
    embeds = tuple(s.index for s in specs if s.embeds)
    mesh = make_mesh(case.layout, case.placement, rank, embeds=embeds, check_splits=False)
    expert = mesh.expert_group
    assert expert.size == case.ep
    lanes = [] if case.ep == 1 else [expert.forward[Among.ALL], expert.backward[Among.ALL]]
    assert len({id(peers.group) for peers in lanes}) == len(lanes)
    return Seen(
        expert=[look(ReplicaGroup((), peers.group)) for peers in lanes],
        expert_rank=expert.rank,
        dense={stage: look(group) for stage, group in mesh.dense.items()},
        experts={stage: look(group) for stage, group in mesh.experts.items()},
        embedding=look(mesh.embedding) if mesh.embedding else None,
    )


def look(replicas: ReplicaGroup) -> Group:
    total = torch.tensor(dist.get_rank())
    dist.all_reduce(total, group=replicas.group)
    members = tuple(dist.get_process_group_ranks(replicas.group))
    return Group(replicas.ranks, members, int(total), id(replicas.group))


@pytest.fixture(scope="module")
def seen() -> dict[Case, list[Seen]]:
    results = run_ranks(see_groups, 8, CASES)
    return {case: list(ranks) for case, *ranks in zip(CASES, *results, strict=True)}


def check_group(group: Group, expected: Callable[[int], bool]) -> None:
    ranks = tuple(rank for rank in range(8) if expected(rank))
    assert group.members == ranks
    assert group.total == sum(ranks)
    assert group.told in (ranks, ())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_groups_are_those_of_the_definition(case: Case, seen: dict[Case, list[Seen]]) -> None:
    def pp(rank: int) -> int:
        return rank // case.dp

    def mirrors(rank: int) -> set[int]:
        return {pp(rank), case.pp - 1 - pp(rank)}

    per_side = case.ep // 2 if case.mirrored else case.ep  # of an expert group, on one pipeline rank

    def share_experts(one: int, other: int) -> bool:
        side = pp(other) in mirrors(one) if case.mirrored else pp(other) == pp(one)
        return side and one % case.dp // per_side == other % case.dp // per_side

    def expert_rank(rank: int) -> int:  # the share of each layer's experts that the rank holds
        return sum(share_experts(rank, lower) for lower in range(rank))

    def holds(rank: int, stage: int) -> bool:
        mirrored = case.schedule == "dualpipe"
        return pp(rank) == stage or (mirrored and case.pp - 1 - pp(rank) == stage)

    embedding_stages = {0, case.pp - 1} if case.mtp else {0}
    for rank, mesh in enumerate(seen[case]):
        assert mesh.expert_rank == expert_rank(rank)
        for group in mesh.expert:
            check_group(group, lambda r, me=rank: share_experts(me, r))  # type: ignore[misc]
        stages = [s for s in range(case.pp) if holds(rank, s)]
        assert list(mesh.dense) == list(mesh.experts) == stages
        share = expert_rank(rank)
        for stage in stages:
            check_group(mesh.dense[stage], lambda r, s=stage: holds(r, s))  # type: ignore[misc]
            check_group(
                mesh.experts[stage],
                lambda r, s=stage, e=share: holds(r, s) and expert_rank(r) == e,  # type: ignore[misc]
            )
        if any(holds(rank, s) for s in embedding_stages):
            assert mesh.embedding is not None
            check_group(mesh.embedding, lambda r: any(holds(r, s) for s in embedding_stages))
        else:
            assert mesh.embedding is None


def test_stages_with_the_same_holders_share_a_group(seen: dict[Case, list[Seen]]) -> None:
    """Else their weights could not be reduced in one buffer."""
    for case in CASES:
        for mesh in seen[case]:
            groups = {g.same_as: g.members for g in mesh.dense.values()}
            assert len(groups) == len(set(groups.values()))
            if case.schedule == "dualpipe":
                assert len(mesh.dense) == 2
                assert len(groups) == 1
                assert mesh.embedding is None or mesh.embedding.same_as in groups


def test_ranks_with_unequal_numbers_of_stages_are_refused() -> None:
    """They would create unequal numbers of groups."""
    placement = Placement(num_ranks=2, num_microbatches=1, ranks_SX=((0,), (0,), (1,)))
    with pytest.raises(AssertionError, match="unequal"):
        make_mesh(ParallelLayout(2, 1, 1), placement, 0, embeds=(0,), check_splits=False)


def test_ranks_that_share_experts_but_not_stages_are_refused() -> None:
    straight = Case("1f1b", 2).placement
    with pytest.raises(AssertionError, match="shared by different stages"):
        make_mesh(ParallelLayout(2, 1, 2, mirrored=True), straight, 0, embeds=(0,), check_splits=False)


def lose_patience(rank: int, _world_size: int, case: Case, done: Path) -> None:
    """Rank 1 does not come."""
    mesh = make_mesh(case.layout, case.placement, rank, embeds=(0,), check_splits=False, timeout_seconds=0.5)
    if rank == 0:
        with pytest.raises(RuntimeError, match="(?i)timed out"):
            dist.all_reduce(torch.ones(1), group=mesh.dense[0].group)
        with pytest.raises(RuntimeError, match="(?i)timed out"):
            mesh.links.receive((1,), torch.float32, torch.device("cpu"), 1, KIND).wait()
        done.touch()
    while not done.exists():
        time.sleep(0.01)


def test_groups_have_the_patience_that_was_asked_for(tmp_path: Path) -> None:
    run_ranks(lose_patience, 2, Case("dualpipe", 2, dp=1, ep=1, mtp=0), tmp_path / "done")


# --- links ----------------------------------------------------------------------------------------------------

KIND = MessageKind.ACTIVATION
MESSAGES, ELEMENTS = 20, 50_000
PATIENCE = 0.3  # seconds that a receiver is late, each time


def links_of(rank: int, world_size: int) -> Links:
    ranks = list(range(world_size))
    return Links({queue: dist.new_group(ranks) for queue in all_queues()}, tuple(ranks), rank)


def message(source: int, number: int) -> torch.Tensor:
    return torch.full((ELEMENTS,), float(100 * source + number))


def talk_both_ways(rank: int, world_size: int) -> None:
    """Every rank sends all its messages to its neighbours before it receives any."""
    links = links_of(rank, world_size)
    peers = [p for p in (rank - 1, rank + 1) if 0 <= p < world_size]
    sent = []
    for number in range(MESSAGES):
        for peer in peers:
            tensor = message(rank, number)
            links.send(tensor, peer, KIND, window=MESSAGES)
            sent.append(tensor)
    for number in range(MESSAGES):
        arriving = [
            links.receive((ELEMENTS,), torch.float32, torch.device("cpu"), peer, KIND) for peer in peers
        ]
        for peer, one in reversed(list(zip(peers, arriving, strict=True))):
            assert torch.equal(one.wait(), message(peer, number)), (rank, peer, number)
    links.drain()
    for tensor in sent:
        tensor.zero_()  # all have left: this reaches nobody


def test_links_carry_both_directions_in_order() -> None:
    run_ranks(talk_both_ways, 3)


def post_first(rank: int, world_size: int) -> None:
    """Receives are posted before anything is sent: what a window of 0 says."""
    links = links_of(rank, world_size)
    arriving = [
        links.receive((ELEMENTS,), torch.float32, torch.device("cpu"), 1 - rank, KIND) for _ in range(3)
    ]
    dist.barrier()
    for number in range(3):
        links.send(message(rank, number), 1 - rank, KIND, window=0)
    for number, one in enumerate(arriving):
        assert torch.equal(one.wait(), message(1 - rank, number))
    links.drain()


def test_a_window_of_none_sends_one_by_one() -> None:
    run_ranks(post_first, 2)


def keep_waiting(rank: int, world_size: int, folder: Path) -> None:
    """A window of two, four messages, and a receiver that is late; files say how far each side has come."""
    links = links_of(rank, world_size)
    two_sent, receiving, last = (folder / name for name in ("two_sent", "receiving", "last"))
    if rank == 0:
        links.send(message(0, 0), 1, KIND, window=2)
        links.send(message(0, 1), 1, KIND, window=2)
        two_sent.touch()  # nobody receives before this
        links.send(message(0, 2), 1, KIND, window=2)
        assert receiving.exists()
        links.send(message(0, 3), 1, KIND, window=2)
        links.drain()
        assert last.exists()
        return
    while not two_sent.exists():
        time.sleep(0.01)
    for number in range(4):
        time.sleep(PATIENCE)
        (receiving if number < 3 else last).touch()
        arriving = links.receive((ELEMENTS,), torch.float32, torch.device("cpu"), 0, KIND)
        assert torch.equal(arriving.wait(), message(0, number))


def test_a_full_window_waits_for_its_oldest_send(tmp_path: Path) -> None:
    run_ranks(keep_waiting, 2, tmp_path)
