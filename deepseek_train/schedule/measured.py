"""How long each stage really took: from the timeline of a step to the durations that simulate and plan the next one."""

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, fields
from statistics import median

from deepseek_train.schedule.action import Kind
from deepseek_train.schedule.rows import pairs
from deepseek_train.schedule.simulate import Durations, Seconds
from deepseek_train.schedule.timeline import Span, Timeline

_Found = Mapping[tuple[Kind, int], list[float]]  # seconds by kind and stage


def measured_durations(timeline: Timeline, num_stages: int) -> Durations:
    """Medians over micro-batches, in seconds, for each stage. A full backward is divided by what its weight gradients
    took (``timeline.phases``); where that is not known, by the stage's separate I and W, or else in halves.

    A pair tells what it saves against its halves alone, one number for both their stages: ``seconds`` of Durations
    takes a pair's halves less the mean of what its stages save. Stages without pairs save nothing.
    Raises ValueError where a stage has no forward or no backward outside pairs.
    """
    alone, together = _sorted_out(timeline)
    stages = range(num_stages)
    kinds = (Kind.FORWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)
    f, i, w = (tuple(_median(alone, kind, stage) for stage in stages) for kind in kinds)
    saved: defaultdict[int, list[float]] = defaultdict(list)
    for ahead, behind, seconds in together:
        forward, backward = f[ahead], i[behind] + w[behind]
        saving = min(
            forward, backward, forward + backward - seconds
        )  # no pair is shorter than its longer half
        for stage in {ahead, behind}:
            saved[stage].append(saving)
    overlapped = tuple(f[s] + i[s] + w[s] - (median(saved[s]) if s in saved else 0.0) for s in stages)
    return Durations(forward=f, backward_input=i, backward_weight=w, overlapped=overlapped)


def _sorted_out(timeline: Timeline) -> tuple[_Found, list[tuple[int, int, float]]]:
    """Seconds of what ran alone, and of each pair: (stage of its forward, stage of its backward, seconds)."""
    weights: defaultdict[tuple[int, int], float] = defaultdict(float)
    for phase in timeline.phases:
        if phase.kind is Kind.BACKWARD_WEIGHT:
            weights[phase.stage, phase.microbatch] += phase.end - phase.start
    alone: defaultdict[tuple[Kind, int], list[float]] = defaultdict(list)
    together: list[tuple[int, int, float]] = []
    for rank in range(timeline.num_ranks):
        for group in pairs([span for span in timeline.spans if span.rank == rank]):
            span, seconds = group[0], max(s.end for s in group) - min(s.start for s in group)
            if len(group) == 2:
                forward, backward = sorted(group, key=_is_backward)
                together.append((forward.stage, backward.stage, seconds))
            elif span.kind is Kind.BACKWARD and (span.stage, span.microbatch) in weights:
                weight = weights[span.stage, span.microbatch]
                alone[Kind.BACKWARD_INPUT, span.stage].append(seconds - weight)
                alone[Kind.BACKWARD_WEIGHT, span.stage].append(weight)
            else:
                alone[span.kind, span.stage].append(seconds)
    for (kind, stage), found in list(alone.items()):
        if kind is Kind.BACKWARD:
            for part in (Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT):
                alone.setdefault((part, stage), [seconds / 2 for seconds in found])
    return alone, together


def _is_backward(span: Span) -> bool:
    return span.kind is not Kind.FORWARD


def _median(found: _Found, kind: Kind, stage: int) -> float:
    if (kind, stage) not in found:
        raise ValueError(
            f"stage {stage} has no {kind.value} outside overlapped pairs in this timeline: "
            "measure a whole training step"
        )
    return median(found[kind, stage])


def durations_to_json(durations: Durations) -> str:
    """One object, seconds by kind of work; ``durations_from_json`` gives ``durations`` back."""
    return json.dumps(asdict(durations), indent=1) + "\n"


def durations_from_json(text: str) -> Durations:
    """Raises ValueError where ``text`` is not what ``durations_to_json`` writes."""
    names = [field.name for field in fields(Durations)]
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"this is no JSON ({error}), where a run's report/durations.json belongs") from error
    if not isinstance(found, dict) or found.keys() != set(names):
        raise ValueError(f"measured durations are one JSON object with {', '.join(sorted(names))}")
    for name, value in found.items():
        for seconds in value if isinstance(value, list) else [value]:
            is_number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
            if not is_number or not 0 <= seconds < float("inf"):
                raise ValueError(f"{name} holds {seconds!r}, which is no number of seconds: write 0 or more")
    latency = found.pop("latency")
    if isinstance(latency, list):
        raise ValueError(f"latency lists {len(latency)} times: write one number, that of every message")
    counts = {name: len(value) for name, value in found.items() if isinstance(value, list)}
    if len(set(counts.values())) > 1 or 0 in counts.values():
        lengths = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise ValueError(
            f"times of different numbers of stages ({lengths}): write one for each stage in every list"
        )
    values: dict[str, Seconds] = {n: tuple(v) if isinstance(v, list) else v for n, v in found.items()}
    durations = Durations(**values, latency=latency)
    if not any(
        _any_time(s) for s in (durations.forward, durations.backward_input, durations.backward_weight)
    ):
        raise ValueError(
            "all times are 0: write what forward, backward_input or backward_weight take, or measure a step"
        )
    return durations


def _any_time(seconds: Seconds) -> bool:
    return any(seconds) if isinstance(seconds, tuple) else seconds > 0
