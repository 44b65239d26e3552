"""The two lanes on paper: what a pair takes if nothing but its phases takes time."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from benchmarks.overlap.times import F, I, LayerTimes, W
from deepseek_train.schedule.action import Kind
from deepseek_train.schedule.overlap import FIGURE_4, Lane, Order, Part, Piece, Role, interleave

_LAYER = (
    Part(Role.ATTEND),
    Part(Role.DISPATCH, moves=True),
    Part(Role.EXPERTS),
    Part(Role.COMBINE, moves=True),
    Part(Role.COMBINE),
)


@dataclass(frozen=True)
class Predicted:
    """Seconds of one pair, or of the same forward and backward in sequence."""

    wall: float
    compute: float

    @property
    def exposed(self) -> float:
        """The share of the time in which nothing was computed."""
        return 1 - self.compute / self.wall


@dataclass(frozen=True)
class OnPaper:
    """One phase. Seconds of its transfer, where something travels, and of what is computed (beside that)."""

    part: Part
    compute: Mapping[Kind, float] = field(default_factory=dict)
    transfer: Mapping[Kind, float] = field(default_factory=dict)


def predict(layers: int, times: LayerTimes, order: Order | None) -> Predicted:
    """Layers forward and backward, in ``order`` or (None) one after the other, each phase's weight gradients right
    behind its input gradients."""
    phases = tuple(_of_layer(part, times) for part in _LAYER) * layers
    return follow(phases, _one_by_one(len(phases)) if order is None else _pieces(phases, phases, order))


def predict_block(
    layers: int,
    times: Mapping[tuple[str, Kind], float],
    transfers: Mapping[tuple[str, Kind], float],
    order: Order | None,
) -> Predicted:
    """``MoeBlock`` forward and backward as the executor runs them: as a pair, or (None) in sequence, where gradients of
    weights are behind the transfers that they hide. ``transfers``: seconds, by name of the phase that starts them."""

    def phase(role: Role, computed: str = "", moved: str = "", weights: Role | None = None) -> OnPaper:
        return OnPaper(
            Part(role, bool(moved), weights), _of_name(times, computed), _of_name(transfers, moved)
        )

    phases = (
        phase(Role.ATTEND, "attend"),
        phase(Role.ATTEND, moved="announce"),
        phase(Role.DISPATCH),
        phase(Role.DISPATCH, "shared", "dispatch", Role.EXPERTS),
        phase(Role.EXPERTS, "experts"),
        phase(Role.COMBINE, moved="combine"),
        phase(Role.COMBINE),
    ) * layers
    if order is not None:
        return follow(phases, _pieces(phases, phases, order))
    forward = [Piece(F, index) for index in range(len(phases))]
    return follow(phases, [*forward, *_pieces((), phases, FIGURE_4)])


def follow(phases: tuple[OnPaper, ...], pieces: Iterable[Piece]) -> Predicted:
    """One computation at a time; one transfer at a time, in the order they start; a phase waits for the transfer
    before it in its own half."""
    compute_done = wire_free = spent = 0.0
    arrived = {F: 0.0, I: 0.0}
    for piece in pieces:
        phase = phases[piece.index]
        if piece.kind is not W:
            compute_done = max(compute_done, arrived[piece.kind])
        if piece.kind in phase.transfer:
            wire_free = max(compute_done, wire_free) + phase.transfer[piece.kind]
            arrived[piece.kind] = wire_free
        compute_done += phase.compute.get(piece.kind, 0.0)
        spent += phase.compute.get(piece.kind, 0.0)
    return Predicted(max(compute_done, *arrived.values()), spent)


def _of_layer(part: Part, times: LayerTimes) -> OnPaper:
    seconds = {kind: times.of(part.role, kind) for kind in (F, I, W)}
    if part.moves:
        return OnPaper(part, transfer={kind: seconds[kind] for kind in (F, I)})
    return OnPaper(part, seconds if part.role.lane is Lane.COMPUTE else {})


def _of_name(seconds: Mapping[tuple[str, Kind], float], name: str) -> dict[Kind, float]:
    return {kind: spent for (of, kind), spent in seconds.items() if of == name}


def _pieces(forward: tuple[OnPaper, ...], backward: tuple[OnPaper, ...], order: Order) -> tuple[Piece, ...]:
    return interleave(tuple(p.part for p in forward), tuple(p.part for p in backward), order)


def _one_by_one(length: int) -> list[Piece]:
    backward = [Piece(kind, index) for index in reversed(range(length)) for kind in (I, W)]
    return [*(Piece(F, index) for index in range(length)), *backward]
