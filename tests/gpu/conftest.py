"""Tests of the kernels, the same ones everywhere: on a GPU compiled and at V3's sizes, on a CPU in Triton's interpreter
(made exact) and small. They need torch, triton, pytest and ``deepseek_kernels`` alone."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def memory_for_others() -> Iterator[None]:
    """Workers share a GPU: a test gives back the memory it has freed."""
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
