"""Do all ranks run the same thing? Compared once, right after they have met, before anything is built on it.

A node with yesterday's code or another torch trains along for hours and gives wrong numbers, or hangs in a collective
that only some have. Here the odd rank is named, on all ranks.
"""

import hashlib
import importlib.metadata
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import torch.distributed as dist

import deepseek_kernels
import deepseek_train
from deepseek_train.config.schema import RunConfig
from deepseek_train.train.folder import config_yaml

_PACKAGES = ("torch", "deepspeed", "numpy", "triton")
_NAMED = 8  # ranks in a message


class RanksDiffer(ValueError):
    """Ranks were started with different configurations or programs; the message is the same on all of them."""


def agree(config: RunConfig) -> None:
    """Raises RanksDiffer unless all ranks have the same configuration, code and libraries (collective)."""
    told: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(told, {**_program(), "configuration": _digest(config_yaml(config).encode())})
    if all(one == told[0] for one in told):
        return
    keys: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(keys, _lines(config))
    raise RanksDiffer(
        "the ranks do not run the same:\n"
        + "\n".join(f"  - {line}" for line in [*differences(told), *differences(keys)])
        + "\nStart all of them with the same command, from the same installation."
    )


def differences(told: Sequence[Mapping[str, str]]) -> list[str]:
    """One line for each fact in which ranks differ: what most have, and who has something else. ``told``: by rank."""
    lines = []
    for fact in dict.fromkeys(fact for one in told for fact in one):
        values = [one.get(fact, "(nothing)") for one in told]
        (usual, _), *rest = Counter(values).most_common()
        for odd, _ in rest:
            ranks = [rank for rank, value in enumerate(values) if value == odd]
            who = ", ".join(map(str, ranks[:_NAMED])) + (", ..." if len(ranks) > _NAMED else "")
            lines.append(f"{fact}: rank {who} has {odd}, most have {usual}")
    return lines


@lru_cache(maxsize=1)
def _program() -> dict[str, str]:
    """Versions of all that computes."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {"code of deepseek_train": _code(), **versions}


def _code() -> str:
    """A digest of the source files of both packages."""
    whole = hashlib.sha256()
    for package in (deepseek_train, deepseek_kernels):
        root = Path(next(iter(package.__path__)))
        for path in sorted(root.rglob("*.py")):
            whole.update(str(path.relative_to(root)).encode())
            whole.update(path.read_bytes())
    return whole.hexdigest()[:12]


def _lines(config: RunConfig) -> dict[str, str]:
    """Each value of the configuration by its dotted key."""
    found: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    for line in config_yaml(config).splitlines():
        key, _, value = line.strip().partition(":")
        depth = len(line) - len(line.lstrip())
        path = [one for one in path if one[0] < depth] + [(depth, key)]
        found[".".join(name for _, name in path)] = value.strip()
    return found


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
