"""How long each stage really took: from the timeline of a step to the durations that simulate and plan the next one."""

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, fields
from statistics import median
from typing import Any

from deepseek_train.schedule.action import Kind
from deepseek_train.schedule.rows import pairs
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
    for rank in range(timeline.num_ranks):
        for group in pairs([span for span in timeline.spans if span.rank == rank]):
            span, seconds = group[0], max(s.end for s in group) - min(s.start for s in group)
            if len(group) == 2:
                found[PAIR, span.stage].append(seconds)
            elif span.kind is Kind.BACKWARD:
                weight = weights.get((span.stage, span.microbatch), seconds / 2)
                found["I", span.stage].append(seconds - weight)
                found["W", span.stage].append(weight)
            else:
                found[span.kind.value, span.stage].append(seconds)
    stages = range(num_stages)
    f, i, w = (tuple(_median(found, kind, stage) for stage in stages) for kind in "FIW")
    both = tuple(median(found.get((PAIR, s), [f[s] + i[s] + w[s]])) for s in stages)
    return Durations(forward=f, backward_input=i, backward_weight=w, overlapped=both)


def _median(found: Mapping[tuple[str, int], list[float]], kind: str, stage: int) -> float:
    if (kind, stage) not in found:
        raise ValueError(
            f"stage {stage} has no {kind} outside overlapped pairs in this timeline: measure a whole training step"
        )
    return median(found[kind, stage])


def durations_to_json(durations: Durations) -> str:
    """One object, seconds by kind of work; ``durations_from_json`` gives ``durations`` back."""
    return json.dumps(asdict(durations), indent=1) + "\n"


def durations_from_json(text: str) -> Durations:
    """Raises ValueError where ``text`` is not what ``durations_to_json`` writes."""
    names = {field.name for field in fields(Durations)}
    found = json.loads(text)
    if not isinstance(found, dict) or found.keys() != names:
        raise ValueError(f"measured durations are one JSON object with {', '.join(sorted(names))}")
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in found.items()
    }
    for name, value in values.items():
        for seconds in value if isinstance(value, tuple) else (value,):
            if not isinstance(seconds, int | float) or not 0 <= seconds < float("inf"):
                raise ValueError(f"{name} holds {seconds!r}, which is no number of seconds")
    return Durations(**values)
