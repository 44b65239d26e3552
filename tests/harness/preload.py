"""Imported once, in the clean process that ranks are forked from: whatever a rank would import lazily.

Without this each rank imports it after the fork (a second and 140 MB each; the package itself, a quarter of a second).
Two are hidden: ``torch.optim`` pulls in ``torch._dynamo`` at its first step, and DeepSpeed's optimizer pulls in Muon,
whose decorators pull in the whole of ``torch._inductor`` (three seconds a rank).
"""

import gc
import logging

import pytest
import torch
import torch._dynamo
import torch.distributed
import torch.distributed.checkpoint

logging.disable(logging.WARNING)  # deepspeed tells every importer that there is no GPU

import deepspeed.ops  # noqa: E402
import deepspeed.runtime.bf16_optimizer  # noqa: E402
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: E402

import deepseek_train.train.step  # noqa: E402
import tests.dist.grid  # noqa: E402

logging.disable(logging.NOTSET)

# Otherwise deepspeed compiles a C++ all-reduce (half a minute) when it first meets a gloo group on a CPU.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

# DeepSpeed collects garbage at every turn; walking what is imported here costs each rank 0.3 s and a copy of it.
gc.collect()
gc.freeze()

__all__ = ["deepseek_train", "deepspeed", "pytest", "tests", "torch"]
