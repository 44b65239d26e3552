"""Do all ranks compute with the same kernels?"""

from dataclasses import asdict

import torch.distributed as dist

from deepseek_kernels.choice import Kernels
from deepseek_kernels.cuda_library import compile_for
from deepseek_kernels.machine import BackendUnavailable


def everywhere_alike(kernels: Kernels) -> None:
    """Raises BackendUnavailable on every rank unless all have chosen the same (collective), and compiles what is to be
    compiled before the first step needs it."""
    told: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(told, str(kernels))
    if len(set(told)) > 1:
        other = next(rank for rank, one in enumerate(told) if one != told[0])
        raise BackendUnavailable(
            f"ranks would compute with different kernels: rank 0 with {told[0]}; rank {other} with {told[other]}. "
            "Name them (kernels.gemm=..., and so on), or install the same on all nodes"
        )
    for family, backend in asdict(kernels).items():
        if backend == "cuda":
            compile_for(family)
