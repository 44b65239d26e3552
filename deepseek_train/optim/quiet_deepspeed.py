"""DeepSpeed without its noise: import this before anything of DeepSpeed.

Without a GPU its accelerator probe warns on every rank and ``init_distributed`` compiles a C++ extension (half a
minute, for shared-memory collectives that gloo does not need); both are switched off by the means it offers. So is
``torch.compile`` of the functions of Muon, an optimizer that nobody uses: it would import all of ``torch._inductor``.
"""

import contextlib
import importlib
import logging
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed.comm
import deepspeed.ops
from deepspeed.runtime import compiler
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.precision_config import DeepSpeedBF16Config
from deepspeed.runtime.utils import clip_tensors_by_global_norm, get_global_norm_of_tensors
from deepspeed.utils import logger
from deepspeed.utils.timer import NoopTimer


@contextlib.contextmanager
def _never_compiled() -> Iterator[None]:
    """Functions that DeepSpeed decorates meanwhile stay as they are, as with a torch that cannot compile."""
    compiles = compiler.compile
    compiler.compile = lambda: compiler.dummy_decorator
    try:
        yield
    finally:
        compiler.compile = compiles


# BF16_Optimizer imports this late (some releases have none): better once, before local ranks are forked.
with _never_compiled(), contextlib.suppress(ImportError):
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")

__all__ = [
    "BF16_Optimizer",
    "DeepSpeedBF16Config",
    "NoopTimer",
    "adopt_process_group",
    "clip_tensors_by_global_norm",
    "get_global_norm_of_tensors",
]

logger.setLevel(logging.ERROR)
if not torch.cuda.is_available():
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def adopt_process_group() -> None:
    """Tells DeepSpeed about the process group that torch.distributed already has."""
    deepspeed.comm.init_distributed(dist.get_backend(), verbose=False)
