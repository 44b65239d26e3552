"""Imported once, in the clean process that ranks are forked from: whatever a rank would import lazily.

Without this each rank imports it after the fork (a second and 140 MB each); ``torch._dynamo`` is the hidden
one, ``torch.optim`` pulls it in at its first step.
"""

import logging

import pytest
import torch
import torch._dynamo
import torch.distributed
import torch.distributed.checkpoint

logging.disable(logging.WARNING)  # deepspeed tells every importer that there is no GPU

import deepspeed.ops  # noqa: E402
import deepspeed.runtime.bf16_optimizer  # noqa: E402

logging.disable(logging.NOTSET)

# Otherwise deepspeed compiles a C++ all-reduce (half a minute) when it first meets a gloo group on a CPU.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

__all__ = ["deepspeed", "pytest", "torch"]
