"""The two lanes on paper: what a pair takes if nothing but its phases takes time."""

from dataclasses import dataclass

from benchmarks.overlap.times import F, I, LayerTimes, W
from deepseek_train.schedule.overlap import Lane, Order, Part, Piece, Role, interleave

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


def predict(layers: int, times: LayerTimes, order: Order | None) -> Predicted:
    """Layers forward and backward, in ``order`` or (None) one after the other. One computation at a time; one
    transfer at a time, in the order they start; a phase waits for the transfer before it in its own half."""
    parts = _LAYER * layers
    compute_done = wire_free = spent = 0.0
    arrived = {F: 0.0, I: 0.0}
    for piece in _in_sequence(len(parts)) if order is None else interleave(parts, parts, order):
        seconds, part = _seconds(parts, piece, times), parts[piece.index]
        if piece.kind is not W:
            compute_done = max(compute_done, arrived[piece.kind])
        if piece.kind is not W and part.moves:
            wire_free = max(compute_done, wire_free) + seconds
            arrived[piece.kind] = wire_free
        else:
            compute_done += seconds
            spent += seconds
    return Predicted(max(compute_done, *arrived.values()), spent)


def _in_sequence(length: int) -> list[Piece]:
    """Forward, then backward, each phase's weight gradients right behind its input gradients."""
    backward = [Piece(kind, index) for index in reversed(range(length)) for kind in (I, W)]
    return [*(Piece(F, index) for index in range(length)), *backward]


def _seconds(parts: tuple[Part, ...], piece: Piece, times: LayerTimes) -> float:
    part = parts[piece.index]
    local_end = part.role.lane is Lane.COMMUNICATION and not part.moves
    return 0.0 if local_end or (part.moves and piece.kind is W) else times.of(part.role, piece.kind)
