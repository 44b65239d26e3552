"""Where experts live when a trained model is served: busy ones in several copies, GPUs of even load.

DeepSeek-V3's redundant experts (report section 3.4.1; the greedy balancer published with it as EPLB), on paper: no
tensors. Where expert groups divide evenly among nodes, a group stays on one node, so that routing limited to M groups
reaches M nodes:

  1. groups to nodes: the busiest first, each to the least busy node that has room;
  2. copies, within a node: one at a time to the expert with the most load per copy;
  3. copies to GPUs, within a node: as 1.

Otherwise there is one group and one node: an expert may go anywhere. Ties: the fewer copies, then the lowest index.

How good it is. A pack of step 1 or 3 holds at most one item (group, copy) more load than any other, so at most
mean + (1 - 1/packs) * heaviest item; step 2 makes the heaviest copy of a node as light as any number of copies can.
It is greedy all the same: a lucky order of experts, left as it is, may be better (3 3 0 | 2 2 2); and two copies of
an expert may meet on one GPU, where the second brings nothing.

Shape suffixes: L layers, E experts of the model, P replicas (places for an expert), C copies of the most copied
expert, G GPUs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush, heapreplace

from deepseek_train.parallel.expert.placement_problems import load_problems, size_problems

Table = tuple[tuple[int, ...], ...]
Loads = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Placement:
    """GPU g holds replicas g * P/G up to (g+1) * P/G, node n GPUs n * G/nodes up to (n+1) * G/nodes."""

    physical_to_logical_LP: Table  # replica -> its expert
    logical_to_physical_LEC: tuple[Table, ...]  # expert -> its replicas, ascending; then -1
    copies_LE: Table  # at least 1
    load_before_LG: Loads  # experts in their order, no copies, as even in number as can be
    load_after_LG: Loads  # each copy takes an equal share of its expert
    grouped: bool  # every expert group lies on one node

    def max_over_mean_before(self) -> tuple[float, ...]:
        """The busiest GPU over the mean, of each layer; 1 is perfect, and is said of a layer without load."""
        return tuple(map(_max_over_mean, self.load_before_LG))

    def max_over_mean_after(self) -> tuple[float, ...]:
        """As above, once experts are copied and placed."""
        return tuple(map(_max_over_mean, self.load_after_LG))


def place_experts(
    load_LE: Sequence[Sequence[float]], *, replicas: int, groups: int, nodes: int, gpus: int
) -> Placement:
    """Copies and places the experts of each layer by their load (tokens, in any unit).

    V3's prefill: 256 experts, replicas=288, groups=8, nodes=4, gpus=32.

    Raises ValueError with all of ``load_problems`` and ``size_problems``.
    """
    problems = load_problems(dict(enumerate(load_LE)))
    if load_LE and load_LE[0]:
        problems += size_problems(len(load_LE[0]), replicas, groups, nodes, gpus)
    if problems:
        raise ValueError("\n".join(problems))
    grouped = groups % nodes == 0
    if not grouped:
        groups = nodes = 1
    held_LP, places_LEC, before_LG, after_LG = [], [], [], []
    for load_E in load_LE:
        held_GP = _place_layer(load_E, replicas, groups, nodes, gpus)
        places_EC: list[list[int]] = [[] for _ in load_E]
        for replica, expert in enumerate(expert for held_P in held_GP for expert in held_P):
            places_EC[expert].append(replica)
        held_LP.append(tuple(expert for held_P in held_GP for expert in held_P))
        places_LEC.append(places_EC)
        after_LG.append(tuple(sum(load_E[e] / len(places_EC[e]) for e in held_P) for held_P in held_GP))
        before_G = [0.0] * gpus
        for expert, load in enumerate(load_E):
            before_G[expert * gpus // len(load_E)] += load
        before_LG.append(tuple(before_G))
    most = max(len(places_C) for places_EC in places_LEC for places_C in places_EC)
    return Placement(
        tuple(held_LP),
        tuple(tuple((*c, *[-1] * (most - len(c))) for c in places_EC) for places_EC in places_LEC),
        tuple(tuple(map(len, places_EC)) for places_EC in places_LEC),
        tuple(before_LG),
        tuple(after_LG),
        grouped,
    )


def _place_layer(
    load_E: Sequence[float], replicas: int, groups: int, nodes: int, gpus: int
) -> list[list[int]]:
    """Of each GPU, the experts it holds a copy of."""
    size = len(load_E) // groups
    members = [range(first, first + size) for first in range(0, len(load_E), size)]
    held_GP = []
    for chosen in _pack([sum(load_E[e] for e in experts) for experts in members], nodes):
        here = [expert for group in chosen for expert in members[group]]
        copies = _replicate([load_E[e] for e in here], replicas // nodes)
        heads = [
            (expert, load_E[expert] / c) for expert, c in zip(here, copies, strict=True) for _ in range(c)
        ]
        packs = _pack([share for _, share in heads], gpus // nodes)
        held_GP += [[heads[i][0] for i in pack] for pack in packs]
    return held_GP


def _pack(weights: Sequence[float], packs: int) -> list[list[int]]:
    """Items to packs of equally many, ascending: the heaviest first, each to the lightest pack with room."""
    held: list[list[int]] = [[] for _ in range(packs)]
    with_room = [(0.0, pack) for pack in range(packs)]
    for item in sorted(range(len(weights)), key=lambda i: -weights[i]):
        load, pack = heappop(with_room)
        held[pack].append(item)
        if len(held[pack]) < len(weights) // packs:
            heappush(with_room, (load + weights[item], pack))
    return [sorted(items) for items in held]


def _replicate(load_E: Sequence[float], replicas: int) -> list[int]:
    """How many copies each expert gets: the largest load / copies is as small as it can be."""
    heap = [(-load, 1, expert) for expert, load in enumerate(load_E)]
    heapify(heap)
    for _ in range(replicas - len(load_E)):
        _, copies, expert = heap[0]
        heapreplace(heap, (-load_E[expert] / (copies + 1), copies + 1, expert))
    return [copies for _, copies, _ in sorted(heap, key=lambda entry: entry[2])]


def _max_over_mean(load_G: Sequence[float]) -> float:
    return max(load_G) * len(load_G) / sum(load_G) if any(load_G) else 1.0
