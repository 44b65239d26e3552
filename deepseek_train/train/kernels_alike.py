"""Do all ranks compute with the same kernels?"""

from dataclasses import asdict

import torch.distributed as dist

from deepseek_kernels.choice import Kernels
from deepseek_kernels.cuda_library import compile_for
from deepseek_kernels.machine import BackendUnavailable


def everywhere_alike(kernels: Kernels) -> None:
    """Compiles what is to be compiled before the first step needs it. Collective: raises BackendUnavailable on every
    rank where that fails on one, or where they have chosen differently."""
    told: list[tuple[str, str]] = [("", "")] * dist.get_world_size()
    dist.all_gather_object(told, (str(kernels), _compiled(kernels)))
    for rank, (_, failure) in enumerate(told):
        if failure:
            raise BackendUnavailable(f"rank {rank}: {failure}")
    names = [name for name, _ in told]
    if len(set(names)) > 1:
        other = next(rank for rank, one in enumerate(names) if one != names[0])
        raise BackendUnavailable(
            f"ranks would compute with different kernels: rank 0 with {names[0]}; rank {other} with {names[other]}. "
            "Name them (kernels.gemm=..., and so on), or install the same on all nodes"
        )


def _compiled(kernels: Kernels) -> str:
    """Why this rank cannot compile its kernels; empty: it has."""
    try:
        for family, backend in asdict(kernels).items():
            if backend == "cuda":
                compile_for(family)
    except BackendUnavailable as error:
        return str(error)
    return ""
