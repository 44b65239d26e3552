"""Why DeepEP cannot carry a run's tokens, found out before any process starts (and without torch, unless asked)."""

import importlib
from dataclasses import dataclass

from deepseek_kernels.machine import gpu_there

_OF_A_SCALE = 128  # channels: ``formats.TILE``, which imports torch; this half of the command must not
_ON_A_NODE = 8  # ranks, of the first generation
_WIDEST_ON_A_NODE = 8064  # channels, of the first generation: half a row and 8 bytes are at most 8192


@dataclass(frozen=True)
class Machine:
    """What is installed. ``generation``: of DeepEP, None for none, and then why."""

    generation: int | None
    why_none: str | None
    cuda: bool


def this_machine(*, cuda_allowed: bool) -> Machine:
    """Imports DeepEP, if it is there, and torch."""
    library = importlib.import_module("deepseek_train.parallel.expert.deep_ep_buffers")
    return Machine(library.GENERATION, library.IMPORT_ERROR, cuda_allowed and gpu_there())


@dataclass(frozen=True)
class Load:
    """What is to be carried, among ``ep`` ranks. ``ranks_per_node``: of these; None where that is not one number.
    ``params``, ``formats``: as in the configuration's ``precision``, on the way there and home."""

    ep: int
    ranks_per_node: int | None
    hidden_size: int
    params: str
    formats: tuple[str, ...]


def deep_ep_problems(load: Load, machine: Machine) -> list[str]:
    """All of them, in words."""
    found = []
    if machine.generation is None:
        found.append(f"DeepEP cannot be imported ({machine.why_none})")
    if not machine.cuda:
        found.append("there is no CUDA device for it")
    if load.ep == 1:
        found.append("every rank holds all experts (parallel.ep=1): nothing travels")
    if load.params != "bf16" and "params" in load.formats:
        found.append(
            "rows would travel as FP32 (precision.params): it carries BF16, and FP8 on the way to experts"
        )
    if load.hidden_size % _OF_A_SCALE:
        found.append(
            f"model.hidden_size {load.hidden_size} is no multiple of {_OF_A_SCALE}, the channels of a scale"
        )
    if machine.generation == 1:
        found += _first_generation(load)
    return found


def _first_generation(load: Load) -> list[str]:
    found = []
    if load.ep > 1 and load.ranks_per_node != min(load.ep, _ON_A_NODE):
        where = f"{load.ranks_per_node} on each node" if load.ranks_per_node else "unevenly on nodes"
        wants = f"{_ON_A_NODE} on each node, or all on one"
        found.append(f"the {load.ep} expert-parallel ranks are {where}: its Buffer wants {wants}")
    if load.ep <= _ON_A_NODE and load.hidden_size > _WIDEST_ON_A_NODE:
        found.append(
            f"model.hidden_size is over {_WIDEST_ON_A_NODE}, the widest its Buffer copies inside a node"
        )
    return found
