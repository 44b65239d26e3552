"""What can be wrong with a request to place experts: all of it at once, each with its mend."""

from collections.abc import Mapping, Sequence
from math import isfinite


def load_problems(load: Mapping[int, Sequence[float]]) -> list[str]:
    """What is wrong with layer -> load of each expert, in words."""
    if not load:
        return ["load has no layers: give each MoE layer a list, the tokens of each of its experts"]
    first, experts = next((layer, len(load_E)) for layer, load_E in load.items())
    problems = [] if experts else [f"load of layer {first} is empty: list the tokens of each of its experts"]
    for layer, load_E in load.items():
        wrong = [f"expert {e} has {x:g}" for e, x in enumerate(load_E) if not (isfinite(x) and x >= 0)]
        if wrong:
            more = f" and {len(wrong) - 3} more are as wrong" if len(wrong) > 3 else ""
            told = ", ".join(wrong[:3]) + more
            problems.append(f"load of layer {layer}: {told}; tokens are counted: write numbers of 0 or more")
        if len(load_E) != experts:
            why = f"layer {first} has {experts}, and all layers have as many"
            problems.append(f"load of layer {layer} lists {len(load_E)} experts: {why}; list {experts}")
    return problems


def size_problems(experts: int, replicas: int, groups: int, nodes: int, gpus: int) -> list[str]:
    """Why ``experts`` cannot be placed so, in words; ``redundant`` is replicas - experts."""
    sizes = {"replicas": replicas, "groups": groups, "nodes": nodes, "gpus": gpus}
    problems = [f"{name}={size}: write 1 or more" for name, size in sizes.items() if size < 1]
    if 0 < replicas < experts:
        why = f"there are {experts} experts, and each needs a place"
        problems.append(f"replicas={replicas}: {why}; write replicas={experts} or more")
    if groups > 0 and experts % groups:
        divisors = [g for g in range(1, experts + 1) if experts % g == 0]
        why = f"{experts} experts are no {groups} groups of one size"
        problems.append(f"groups={groups}: {why}; write {_nearest('groups', divisors, groups)}")
    if min(nodes, gpus) > 0 and gpus % nodes:
        multiples = [n * nodes for n in (gpus // nodes, gpus // nodes + 1) if n]
        why = f"{nodes} nodes do not hold equally many of them"
        problems.append(f"gpus={gpus}: {why}; write {_nearest('gpus', multiples, gpus)}")
    if gpus > 0 and replicas >= experts and replicas % gpus:
        redundant = replicas - experts
        fitting = [
            n * gpus - experts for n in (replicas // gpus, replicas // gpus + 1) if n * gpus >= experts
        ]
        why = f"{replicas} = {experts} experts + {redundant} redundant are not equally many on each of {gpus} GPUs"
        problems.append(f"replicas={replicas}: {why}; write {_nearest('redundant', fitting, redundant)}")
    return problems


def _nearest(name: str, fitting: Sequence[int], given: int) -> str:
    below = [n for n in fitting if n < given][-1:]
    above = [n for n in fitting if n > given][:1]
    return " or ".join(f"{name}={n}" for n in below + above)
