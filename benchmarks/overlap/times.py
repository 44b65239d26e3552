"""How long the phases of one layer take: DeepSeek's published profile, stretched so that a CPU can keep time.

Milliseconds of one MoE layer (V3_SPEC B.1; EP64, 4096 tokens, contended): a forward attends 4.4 and computes experts
4.6; backward 9.3 + 2.4 and 5.3 + 3.5 + 2.8 (the last on a side stream). The kernels of dispatch take 4.35, of combine
6.2; of the backward of combine, which is a dispatch, 3.4, and of the backward of dispatch, a combine, 6.2. With the
waiting for each other that belongs to them, communication is 0.92 of compute.
"""

from dataclasses import dataclass

from deepseek_train.schedule.action import Kind
from deepseek_train.schedule.overlap import Lane, Role

F, I, W = Kind.FORWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT  # noqa: E741

_COMPUTE_MS = {
    (Role.ATTEND, F): 4.4,
    (Role.ATTEND, I): 9.3,
    (Role.ATTEND, W): 2.4,
    (Role.EXPERTS, F): 4.6,
    (Role.EXPERTS, I): 5.3,
    (Role.EXPERTS, W): 6.3,
}
_KERNELS_MS = {
    (Role.DISPATCH, F): 4.35,
    (Role.COMBINE, F): 6.2,
    (Role.COMBINE, I): 3.4,
    (Role.DISPATCH, I): 6.2,
}
_SHARED = 1 / 9  # of the experts' time: V3's shared expert is one of the nine a token goes through
TRACE_RATIO = 0.92  # communication to compute
TRACE_EXPOSED = 0.033  # share of DeepSeek's pair


@dataclass(frozen=True)
class LayerTimes:
    """Seconds of each phase of a layer, forward and backward."""

    seconds: dict[tuple[Role, Kind], float]

    def of(self, role: Role, kind: Kind) -> float:
        return self.seconds.get((role, kind), 0.0)  # a transfer has no weight gradient

    def total(self, lane: Lane) -> float:
        """Of one layer in a pair."""
        return sum(seconds for (role, _), seconds in self.seconds.items() if role.lane is lane)


def layer_times(stretch: float, ratio: float) -> LayerTimes:
    """The profile's compute times ``stretch`` times as long, its transfers ``ratio`` of that in all."""
    to_ratio = ratio * sum(_COMPUTE_MS.values()) / sum(_KERNELS_MS.values())
    compute = {key: ms * stretch / 1e3 for key, ms in _COMPUTE_MS.items()}
    return LayerTimes(compute | {key: ms * to_ratio * stretch / 1e3 for key, ms in _KERNELS_MS.items()})


def block_times(stretch: float) -> dict[tuple[str, Kind], float]:
    """Seconds of the computations of one ``MoeBlock``, by name of phase: the profile's, ``stretch`` times as long."""
    times = layer_times(stretch, 1.0)
    shares = {
        "attend": (Role.ATTEND, 1.0),
        "experts": (Role.EXPERTS, 1 - _SHARED),
        "shared": (Role.EXPERTS, _SHARED),
    }
    return {
        (name, kind): times.of(role, kind) * share
        for name, (role, share) in shares.items()
        for kind in (F, I, W)
    }
