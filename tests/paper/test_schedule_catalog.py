"""Every schedule of the catalog, at every legal size: what must hold for all of them."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_train.schedule.action import Kind, Placement, Schedule
from deepseek_train.schedule.catalog import (
    NAMES,
    canonical,
    make_schedule,
    placement_of,
    problems,
    stages_per_rank_of,
)
from deepseek_train.schedule.check import check
from deepseek_train.schedule.dataflow import actions_of
from tests.paper.schedules import legal_sizes

every_name = pytest.mark.parametrize("name", NAMES)


@every_name
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_every_legal_size_passes_the_checks(name: str, data: st.DataObject) -> None:
    check(make_schedule(name, *data.draw(legal_sizes(name, ranks=10, microbatches=32))))


@every_name
def test_all_small_sizes_pass_the_checks(name: str) -> None:
    """Corners that a random search may miss: fewer micro-batches than ranks, one of each, remainders."""
    sizes = [(ranks, count) for ranks in (1, 2, 3, 4, 5) for count in range(1, 13)]
    legal = [size for size in sizes if not problems(name, *size)]
    assert len(legal) == {"dualpipe": 5 + 3, "dualpipe_v": 11 + 9 + 7 + 5 + 3}.get(name, len(sizes))
    for size in legal:
        check(make_schedule(name, *size))


@every_name
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_the_catalog_makes_what_it_promises(name: str, data: st.DataObject) -> None:
    sizes = data.draw(legal_sizes(name))
    schedule = make_schedule(name, *sizes)
    assert problems(name, *sizes) == []
    assert schedule.name == name
    assert schedule.placement == placement_of(name, *sizes)
    assert schedule.placement.num_stages == sizes[0] * stages_per_rank_of(name, sizes[2])
    assert schedule.placement.num_directions == (2 if name == "dualpipe" else 1)


@every_name
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_every_chunk_runs_once(name: str, data: st.DataObject) -> None:
    schedule = make_schedule(name, *data.draw(legal_sizes(name)))
    counts = Counter(_actions(schedule))
    chunks = schedule.placement.num_stages * schedule.placement.num_microbatches
    assert max(counts.values()) == 1
    kinds = Counter(kind for kind, _, _ in counts)
    assert kinds[Kind.FORWARD] == kinds[Kind.BACKWARD] + kinds[Kind.BACKWARD_INPUT] == chunks
    assert kinds[Kind.BACKWARD_INPUT] == kinds[Kind.BACKWARD_WEIGHT]
    splits_all, splits_none = name.startswith("zb"), name in ("gpipe", "1f1b", "interleaved_1f1b")
    assert not (splits_all and kinds[Kind.BACKWARD])
    assert not (splits_none and kinds[Kind.BACKWARD_INPUT])


@every_name
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_microbatches_pass_each_stage_in_order(name: str, data: st.DataObject) -> None:
    """Forwards, backwards and weight gradients alike: what data loading and random states may rely on."""
    schedule = make_schedule(name, *data.draw(legal_sizes(name)))
    last: dict[tuple[Kind, int, int], int] = {}
    for kind, stage, microbatch in _actions(schedule):
        kind = Kind.BACKWARD if kind is Kind.BACKWARD_INPUT else kind
        line = (kind, stage, schedule.placement.direction_of(microbatch))
        assert last.get(line, -1) < microbatch
        last[line] = microbatch


def _actions(schedule: Schedule) -> list[tuple[Kind, int, int]]:
    return [
        (a.kind, a.stage, a.microbatch) for row in schedule.steps_R for step in row for a in actions_of(step)
    ]


@pytest.mark.parametrize(
    ("name", "sizes", "mends"),
    [
        ("dualpipe", (5, 7), ["use 4 or 6 ranks", "use 8", "use 10 or more"]),
        ("dualpipe_v", (4, 7), ["use 8 or more, 3 ranks or fewer, or zb_v"]),
        ("dualpipe_v", (3, 1), ["use 6 or more, or zb_v"]),
        ("dualpipe_v", (0, 0), ["pipeline rank, got 0: use 1 or more", "micro-batch, got 0"]),
        ("gpipe", (0, 0), ["GPipe needs at least one pipeline rank, got 0: use 1", "micro-batch, got 0"]),
        ("1f1b", (2, 0), ["1F1B needs at least one micro-batch, got 0: use 1 or more"]),
        ("interleaved_1f1b", (2, 1, 0), ["at least one stage a rank, got 0: use 1 or more"]),
        ("zb_h1", (-1, 3), ["ZB-H1 needs at least one pipeline rank, got -1"]),
        ("zb_v", (4, 0), ["ZB-V needs at least one micro-batch, got 0"]),
    ],
)
def test_sizes_it_cannot_run_are_refused_with_all_mends(
    name: str, sizes: tuple[int, ...], mends: list[str]
) -> None:
    found = problems(name, *sizes)
    assert len(found) == len(mends)
    assert all(mend in problem for mend, problem in zip(mends, found, strict=True))
    with pytest.raises(ValueError) as refused:
        make_schedule(name, *sizes)
    assert str(refused.value) == "; ".join(found)


@pytest.mark.parametrize("name", ["gpipe", "interleaved_1f1b", "zb_v", "dualpipe"])
def test_a_placement_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="got 0"):
        placement_of(name, 0, 4)


@pytest.mark.parametrize(
    ("written", "meant"),
    [("DualPipeV", "dualpipe_v"), ("ZB-V", "zb_v"), ("ZB1P", "zb_h1"), ("Interleaved", "interleaved_1f1b")],
)
def test_names_are_found_however_they_are_written(written: str, meant: str) -> None:
    assert canonical(written) == meant
    assert make_schedule(written, 2, 4) == make_schedule(meant, 2, 4)


@pytest.mark.parametrize(("written", "nearest"), [("zbh", "zb_h1"), ("dual", "dualpipe"), ("f1b1", "1f1b")])
def test_an_unknown_name_is_refused_with_the_nearest(written: str, nearest: str) -> None:
    message = f"no schedule is named '{written}': did you mean {nearest}\\? There are gpipe, 1f1b"
    for call in (make_schedule, placement_of):
        with pytest.raises(ValueError, match=message):
            call(written, 4, 8)
    with pytest.raises(ValueError, match=message):
        stages_per_rank_of(written)
    assert [message.replace("\\", "") in problem for problem in problems(written, 4, 8)] == [True]


def test_placement_knows_the_copies_of_a_stage() -> None:
    placement: Placement = placement_of("dualpipe", 4, 8)
    assert placement.holders_of(1) == (1, 2)
    assert placement.stages_of(3) == (0, 3)


def test_placements_of_two_stages_a_rank() -> None:
    assert placement_of("interleaved_1f1b", 3, 1).stages_of(1) == (1, 4)
    assert placement_of("dualpipe_v", 3, 1).stages_of(1) == placement_of("zb_v", 3, 1).stages_of(1) == (1, 4)
    assert placement_of("zb_v", 3, 1).stages_of(2) == (2, 3)
