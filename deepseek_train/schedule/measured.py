"""How long each stage really took: from the timeline of a step to the durations that simulate and plan the next one."""

from collections import defaultdict
from collections.abc import Mapping
from statistics import median

from deepseek_train.schedule.action import Kind
from deepseek_train.schedule.simulate import Durations
from deepseek_train.schedule.timeline import Timeline

PAIR = "pair"


def measured_durations(timeline: Timeline, num_stages: int) -> Durations:
    """Medians over micro-batches, in seconds, for each stage. A full backward is divided by what its weight gradients
    took (``timeline.phases``), halved where that is not known; a stage without pairs is given the sum of its parts.

    Raises ValueError where a stage has no forward or no backward outside pairs.
    """
    weights: defaultdict[tuple[int, int], float] = defaultdict(float)
    for phase in timeline.phases:
        if phase.kind is Kind.BACKWARD_WEIGHT:
            weights[phase.stage, phase.microbatch] += phase.end - phase.start
    found: defaultdict[tuple[str, int], list[float]] = defaultdict(list)
    for span in timeline.spans:
        seconds, stage = span.end - span.start, span.stage
        match span.kind:
            case Kind.FORWARD:
                found[PAIR if span.paired else "F", stage].append(seconds)
            case Kind.BACKWARD if not span.paired:
                weight = weights.get((stage, span.microbatch), seconds / 2)
                found["I", stage].append(seconds - weight)
                found["W", stage].append(weight)
            case Kind.BACKWARD:
                pass  # the forward of its pair stands for both
            case Kind.BACKWARD_INPUT | Kind.BACKWARD_WEIGHT:
                found[span.kind.value, stage].append(seconds)
    stages = range(num_stages)
    f, i, w = (tuple(_median(found, kind, stage) for stage in stages) for kind in "FIW")
    pairs = (found[PAIR, s] for s in stages)
    both = tuple(median(times) if times else f[s] + i[s] + w[s] for s, times in enumerate(pairs))
    return Durations(forward=f, backward_input=i, backward_weight=w, overlapped=both)


def _median(found: Mapping[tuple[str, int], list[float]], kind: str, stage: int) -> float:
    if (kind, stage) not in found:
        raise ValueError(
            f"stage {stage} has no {kind} outside overlapped pairs in this timeline: measure a whole training step"
        )
    return median(found[kind, stage])
