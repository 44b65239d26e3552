"""In which order the phases of an overlapped forward-backward pair are issued (V3 report figure 4, V3_SPEC B.1).

A chunk is a row of phases, each with a role: ``attend -> dispatch -> experts -> combine`` once per layer. The backward
chunk runs the same row from its end, and splits the compute phases into input gradients (I) and weight gradients (W).
An order is one repeating unit of (role, half of the pair): data that ``interleave`` spreads over two real chunks.
"""

from dataclasses import dataclass
from enum import Enum

from deepseek_train.schedule.action import Kind


class Lane(Enum):
    """Where a phase runs: the rank's arithmetic, or the network beside it."""

    COMPUTE = "compute"
    COMMUNICATION = "communication"


class Role(Enum):
    """What a phase is to the order of a pair. Everything computed between a combine and the next dispatch (embedding,
    norms, router, head, losses) attends; everything between a dispatch and its combine, or in a dense layer's
    feed-forward network, is the experts' part."""

    ATTEND = "attend"
    DISPATCH = "dispatch"
    EXPERTS = "experts"
    COMBINE = "combine"

    @property
    def lane(self) -> Lane:
        communicates = self in (Role.DISPATCH, Role.COMBINE)
        return Lane.COMMUNICATION if communicates else Lane.COMPUTE


F, I, W = Kind.FORWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT  # noqa: E741


@dataclass(frozen=True)
class Issue:
    """One entry of an order: a communication is started, a computation is run."""

    role: Role
    kind: Kind  # F, or of the backward half I or W


Order = tuple[Issue, ...]

# What runs beside what, in the order of time: a communication is started as soon as its input is there, and the
# computations issued after it hide it. Figure 4 reads: dispatch(F) under experts(I), dispatch(I) under experts(W) and
# experts(F), combine(F) under attend(I), combine(I) under attend(W) and attend(F). It fits transfers that wait for all
# that was issued before them: those of a host that computes itself, and NCCL's, which wait for the current stream.
# What the router has decided at the end of attend(F) is exchanged beside nothing (ROUTERS_FIRST: under attend(W)).
FIGURE_4: Order = (
    Issue(Role.DISPATCH, F),
    Issue(Role.EXPERTS, I),
    Issue(Role.DISPATCH, I),
    Issue(Role.EXPERTS, W),
    Issue(Role.EXPERTS, F),
    Issue(Role.COMBINE, F),
    Issue(Role.ATTEND, I),
    Issue(Role.COMBINE, I),
    Issue(Role.ATTEND, W),
    Issue(Role.ATTEND, F),
)

# The last two entries the other way round. Where communication nearly fills the pair combine(F) outlasts attend(I), and
# exposing that costs more than exposing a short exchange of decisions (decision 8).
ROUTERS_FIRST: Order = (*FIGURE_4[:-2], FIGURE_4[-1], FIGURE_4[-2])

# How the host feeds a device's streams in DeepSeek's published trace: the same pairing, but the device always has a
# computation queued before the host stops to wait for the row counts of a dispatch. For transfers that wait for their
# own inputs only (DeepEP's events); the others it leaves exposed (benchmarks/results/comm_overlap.md, "on paper").
PROFILE: Order = (
    Issue(Role.COMBINE, I),
    Issue(Role.ATTEND, F),
    Issue(Role.EXPERTS, I),
    Issue(Role.DISPATCH, F),
    Issue(Role.DISPATCH, I),
    Issue(Role.EXPERTS, W),
    Issue(Role.EXPERTS, F),
    Issue(Role.ATTEND, I),
    Issue(Role.ATTEND, W),
    Issue(Role.COMBINE, F),
)


@dataclass(frozen=True)
class Part:
    """One phase of a chunk as the order sees it. A communicating role without ``moves`` is the local end of an
    exchange: its rows are planned before it or used after it. ``weights``: with what its weight gradients run, if that
    is another role (a computation beside a transfer has some)."""

    role: Role
    moves: bool = False
    weights: Role | None = None


@dataclass(frozen=True)
class Piece:
    """Run phase ``index`` of the forward chunk (F) or of the backward chunk (I: its input gradients, W: its weight
    gradients)."""

    kind: Kind
    index: int


def interleave(forward: tuple[Part, ...], backward: tuple[Part, ...], order: Order) -> tuple[Piece, ...]:
    """Spread ``order`` over two real chunks, which need not have equally many layers, nor the same kinds of them.

    ``forward`` and ``backward`` are rows of phases in forward order. Every phase comes once as F, or once as I and,
    later, once as W. The rest of the longer chunk follows alone, in the same order.
    """
    assert {(i.role, i.kind) for i in order} >= {(r, k) for r in Role for k in (F, I)}, "an order with a gap"
    rows = {F: tuple(enumerate(forward)), I: tuple(enumerate(backward))[::-1]}
    waiting: list[tuple[int, Part]] = []  # input gradients are done, weight gradients are not
    pieces: list[Piece] = []
    while rows[F] or rows[I]:
        for issue in order:
            if issue.kind is W:
                ripe = [(index, part) for index, part in waiting if (part.weights or part.role) is issue.role]
                pieces += [Piece(W, index) for index, _ in ripe]
                waiting = [item for item in waiting if item not in ripe]
                continue
            taken, rows[issue.kind] = _take(rows[issue.kind], issue.role)
            pieces += [Piece(issue.kind, index) for index, _ in taken]
            if issue.kind is I:
                waiting += taken
    return (*pieces, *(Piece(W, index) for index, _ in waiting))


_Row = tuple[tuple[int, Part], ...]


def _take(row: _Row, role: Role) -> tuple[_Row, _Row]:
    """What an entry of ``role`` runs of the rest of a chunk, and what remains. An entry of the communication lane runs
    up to its transfer; one of the compute lane the local ends of what arrived, then its own phases and the transfers
    among them (a router's decisions)."""
    ends = next((n for n, (_, p) in enumerate(row) if p.moves or p.role.lane is Lane.COMPUTE), len(row))
    if role.lane is Lane.COMMUNICATION:
        due = ends < len(row) and row[ends][1].moves and row[ends][1].role is role
        count = ends + 1 if due else 0
    else:
        after = next((n for n, (_, p) in enumerate(row) if n >= ends and p.role is not role), len(row))
        count = after if after > ends or ends == len(row) else 0
    return row[:count], row[count:]
