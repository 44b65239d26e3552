"""The order of an overlapped pair: figure 4 phase by phase, and what holds for chunks of any shape."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_train.schedule.action import Kind
from deepseek_train.schedule.overlap import (
    FIGURE_4,
    PROFILE,
    ROUTERS_FIRST,
    Issue,
    Lane,
    Order,
    Part,
    Piece,
    Role,
    interleave,
)

F, I, W = Kind.FORWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT  # noqa: E741
Row = tuple[Part, ...]

EMBED = HEAD = (Part(Role.ATTEND),)
DENSE = (Part(Role.ATTEND), Part(Role.EXPERTS))
MOE = (
    Part(Role.ATTEND),
    Part(Role.ATTEND, moves=True),  # announce
    Part(Role.DISPATCH),  # plan
    Part(Role.DISPATCH, moves=True, weights=Role.EXPERTS),  # the shared expert beside it
    Part(Role.EXPERTS),
    Part(Role.COMBINE, moves=True),
    Part(Role.COMBINE),  # add
)
MTP = (Part(Role.ATTEND), *MOE, Part(Role.ATTEND))  # projection, block, loss
NAMES = ("attend", "announce", "plan", "dispatch", "experts", "combine", "add")
both_orders = pytest.mark.parametrize("order", [FIGURE_4, PROFILE], ids=["FIGURE_4", "PROFILE"])


@st.composite
def rows(draw: st.DrawFn) -> Row:
    """A stage: dense and MoE layers, with or without embedding, head and MTP modules."""
    layers = draw(st.lists(st.sampled_from([DENSE, MOE]), min_size=0, max_size=5))
    row = draw(st.sampled_from([(), EMBED])) + sum(layers, ())
    ends = draw(st.sampled_from([(), HEAD, HEAD + MTP, HEAD + MTP + MTP]))
    return row + ends or DENSE


@st.composite
def orders(draw: st.DrawFn) -> Order:
    """Any unit in which every phase of either half is issued; weight gradients may be left to the end."""
    needed = [Issue(role, kind) for role in Role for kind in (F, I)]
    weights = draw(st.lists(st.sampled_from([Issue(Role.ATTEND, W), Issue(Role.EXPERTS, W)]), unique=True))
    return tuple(draw(st.permutations([*needed, *weights])))


@settings(max_examples=200, deadline=None)
@given(rows(), rows(), st.one_of(st.sampled_from([FIGURE_4, PROFILE]), orders()))
def test_every_phase_comes_once_and_in_its_turn(forward: Row, backward: Row, order: Order) -> None:
    pieces = interleave(forward, backward, order)
    of_kind = {kind: [p.index for p in pieces if p.kind is kind] for kind in (F, I, W)}
    assert of_kind[F] == list(range(len(forward)))
    assert of_kind[I] == list(range(len(backward)))[::-1]
    assert sorted(of_kind[W]) == list(range(len(backward)))
    for index in range(len(backward)):
        assert pieces.index(Piece(W, index)) > pieces.index(Piece(I, index))


@both_orders
@settings(max_examples=60, deadline=None)
@given(row=rows())
def test_a_chunk_beside_nothing_runs_alone(order: Order, row: Row) -> None:
    assert interleave(row, (), order) == tuple(Piece(F, index) for index in range(len(row)))
    alone = interleave((), row, order)
    assert [p.index for p in alone if p.kind is I] == list(range(len(row)))[::-1]


def test_one_layer_is_figure_4() -> None:
    """Both chunks one layer: what starts before the forward's dispatch and ends after the backward's attention is the
    end of the unit, which the next layers' unit would hide."""
    assert spelled(FIGURE_4, MOE) == [
        "add(I)",
        "combine(I)",  # the first: under attend(F)
        "attend(F)",
        "announce(F)",
        "plan(F)",
        "dispatch(F)",  # under experts(I), and the shared expert
        "experts(I)",
        "dispatch(I)",  # under experts(W), experts(F)
        "experts(W)",
        "dispatch(W)",  # the shared expert's
        "experts(F)",
        "combine(F)",  # under attend(I)
        "plan(I)",
        "announce(I)",  # nothing
        "attend(I)",
        "attend(W)",
        "add(F)",
    ]


def test_the_profile_issues_as_deepseek_does() -> None:
    assert spelled(PROFILE, MOE) == [
        "add(I)",
        "combine(I)",
        "attend(F)",
        "announce(F)",
        "experts(I)",
        "plan(F)",
        "dispatch(F)",
        "dispatch(I)",
        "experts(W)",
        "dispatch(W)",
        "experts(F)",
        "plan(I)",
        "announce(I)",
        "attend(I)",
        "attend(W)",
        "combine(F)",
        "add(F)",
    ]


def spelled(order: Order, row: Row) -> list[str]:
    """Of a layer beside its like, without the weight gradients of phases that have none."""
    pieces = interleave(row, row, order)
    none = [Piece(W, i) for i, part in enumerate(row) if part.moves or part.role.lane is Lane.COMMUNICATION]
    none = [piece for piece in none if not row[piece.index].weights]
    return [f"{NAMES[p.index]}({p.kind.value})" for p in pieces if p not in none]


def waits(forward: Row, backward: Row, pieces: tuple[Piece, ...]) -> list[tuple[Piece, tuple[Piece, ...]]]:
    """Each transfer, and what is computed between its start and the first phase that needs what it brings (or the end
    of the pair, for the forward's last)."""
    row_of = {F: forward, I: backward, W: backward}
    found = []
    for position, piece in enumerate(pieces):
        part = row_of[piece.kind][piece.index]
        if piece.kind is W or not part.moves or (piece.kind is I and part.role is Role.ATTEND):
            continue  # decisions have no gradient
        later = range(position + 1, len(pieces))
        needs = next((n for n in later if pieces[n].kind is piece.kind), len(pieces))
        hiding = [p for p in pieces[position + 1 : needs] if computes(row_of[p.kind][p.index])]
        found.append((piece, tuple(hiding)))
    return found


def computes(part: Part) -> bool:
    return part.role.lane is Lane.COMPUTE and not part.moves


@pytest.mark.parametrize("layers", [2, 3, 4, 8])
@pytest.mark.parametrize("edge", [(), EMBED], ids=["a middle stage", "the first stage"])
def test_no_transfer_is_waited_for_at_once(layers: int, edge: Row) -> None:
    """Of two equal chunks every transfer has a computation of the other half or a weight gradient to hide under; but
    for what routers have decided, which ``ROUTERS_FIRST`` hides too, after the first of a pair."""
    row = edge + MOE * layers
    for order in (FIGURE_4, ROUTERS_FIRST):
        found = waits(row, row, interleave(row, row, order))
        announced = [t for t, _ in found if NAMES[(t.index - len(edge)) % len(MOE)] == "announce"]
        assert len(found) == 5 * layers
        bare = announced if order == FIGURE_4 else announced[:1]
        for transfer, hiding in found:
            assert transfer in bare or [p for p in hiding if p.kind is not transfer.kind], transfer


@pytest.mark.parametrize("layers", [2, 4])
def test_inside_the_pair_figure_4_hides_what_it_says(layers: int) -> None:
    """By name, for every layer: the forward's layer beside the backward's in the same unit."""
    row = MOE * layers
    units = 0
    for transfer, hiding in waits(row, row, interleave(row, row, FIGURE_4)):
        name = f"{NAMES[transfer.index % len(MOE)]}({transfer.kind.value})"
        under = {f"{NAMES[p.index % len(MOE)]}({p.kind.value})" for p in hiding}
        first = name == "combine(I)" and transfer.index // len(MOE) == layers - 1
        assert (
            under
            >= {
                "dispatch(F)": {"experts(I)"},
                "dispatch(I)": {"experts(W)", "experts(F)"},
                "combine(F)": {"attend(I)"},
                "combine(I)": {"attend(F)"} if first else {"attend(F)", "attend(W)"},
                "announce(F)": set(),
            }[name]
        )
        units += 1
    assert units == 5 * layers


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.booleans(), st.booleans())
def test_a_head_or_a_dense_layer_leaves_no_transfer_bare_while_both_halves_have_work(
    forward_layers: int, backward_layers: int, head: bool, dense: bool
) -> None:
    """Unequal chunks: whatever transfer has nothing to hide under, starts after the other half has run out of
    computations."""
    forward = (DENSE if dense else ()) + MOE * forward_layers + (HEAD if head else ())
    backward = MOE * backward_layers + (HEAD + MTP if head else ())
    pieces = interleave(forward, backward, FIGURE_4)
    rows_ = {F: forward, I: backward}
    for transfer, hiding in waits(forward, backward, pieces):
        other = I if transfer.kind is F else F
        left = [
            p
            for p in pieces[pieces.index(transfer) + 1 :]
            if p.kind is other and computes(rows_[other][p.index])
        ]
        if rows_[transfer.kind][transfer.index].role is Role.ATTEND:
            continue  # decisions
        assert [p for p in hiding if p.kind is not transfer.kind] or not left, (transfer, left[:1])


def test_the_input_gradient_is_there_before_the_last_weight_gradients() -> None:
    """Its message to the stage before has those to hide under."""
    row = MOE * 3
    pieces = interleave(row, row, FIGURE_4)
    last_input = pieces.index(Piece(I, 0))
    assert Piece(W, 0) in pieces[last_input:]


def test_an_order_that_leaves_out_a_role_is_refused() -> None:
    with pytest.raises(AssertionError, match="gap"):
        interleave(MOE, MOE, tuple(issue for issue in FIGURE_4 if issue.role is not Role.COMBINE))


def test_orders_repeat_nothing() -> None:
    for order in (FIGURE_4, ROUTERS_FIRST, PROFILE):
        assert len(set(order)) == len(order) == 10
