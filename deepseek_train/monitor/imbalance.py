"""How uneven the load of experts was early, midway and late in a run, in numbers.

MaxVio is said in ``StepMetrics.max_violations``. Only steps whose loads were kept count, each step the same.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from deepseek_train.monitor.metrics import StepMetrics

EVEN = 0.1  # MaxVio at or below which a layer is called even here


@dataclass(frozen=True)
class LayerImbalance:
    """One MoE layer: mean MaxVio over three tenths of the run, and the experts at the ends in the last kept step."""

    layer: int
    first: float
    middle: float
    last: float
    busiest: int
    busiest_load: float  # tokens / mean tokens of an expert: MaxVio + 1
    idlest: int
    idlest_load: float


def imbalance(steps: Sequence[StepMetrics]) -> tuple[LayerImbalance, ...]:
    """A row per MoE layer, in order; none without a step that holds loads."""
    kept = [step for step in steps if step.expert_load]
    if not kept:
        return ()
    tenths = [_tenth(kept, centre) for centre in (0.05, 0.5, 0.95)]
    found = []
    for layer, counts in sorted(kept[-1].expert_load.items()):
        first, middle, last = (statistics.fmean(s.max_violations()[layer] for s in tenth) for tenth in tenths)
        mean = max(statistics.fmean(counts), 1e-9)
        busiest, idlest = counts.index(max(counts)), counts.index(min(counts))
        ends = (busiest, counts[busiest] / mean, idlest, counts[idlest] / mean)
        found.append(LayerImbalance(layer, first, middle, last, *ends))
    return tuple(found)


def even_since(steps: Sequence[StepMetrics], limit: float = EVEN) -> int | None:
    """The step from which on MaxVio of every layer is ``limit`` or less until the end; None: it is not at the end."""
    since = None
    for step in reversed([step for step in steps if step.expert_load]):
        if step.worst_max_violation() > limit:
            break
        since = step.step
    return since


def _tenth(kept: Sequence[StepMetrics], centre: float) -> list[StepMetrics]:
    """Steps around ``centre`` (0: the first, 1: the last); the nearest one where a tenth of the run holds none."""
    begin, length = kept[0].step, kept[-1].step - kept[0].step + 1

    def away(step: StepMetrics) -> float:
        return abs((step.step - begin + 0.5) / length - centre)

    return [step for step in kept if away(step) <= 0.05 + 1e-9] or [min(kept, key=away)]
