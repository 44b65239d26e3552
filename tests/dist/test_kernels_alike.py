"""A kernel that one rank cannot compile stops all of them, with its reason."""

import pytest

from deepseek_kernels.choice import Kernels
from deepseek_kernels.machine import BackendUnavailable
from deepseek_train.train import kernels_alike
from tests.harness import run_ranks


def _chosen(rank: int, world_size: int, names: tuple[str, ...]) -> str:
    def compile_for(family: str) -> None:
        if rank == 1:
            raise BackendUnavailable(f"nvcc does not compile {family}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels_alike, "compile_for", compile_for)
        try:
            kernels_alike.everywhere_alike(Kernels(swiglu=names[rank]))
        except BackendUnavailable as error:
            return str(error)
    return ""


def test_all_ranks_are_told_why() -> None:
    assert set(run_ranks(_chosen, 2, ("cuda", "cuda"))) == {"rank 1: nvcc does not compile swiglu"}
    (told,) = set(run_ranks(_chosen, 2, ("cuda", "reference")))
    assert "rank 0 with reference, but swiglu cuda" in told
    assert set(run_ranks(_chosen, 2, ("reference", "reference"))) == {""}
