"""Imported once, in the clean process that ranks are forked from: whatever a rank would import lazily.

Without this each rank imports it after the fork (a second and 140 MB each; the package itself, a quarter of a second).
One is hidden: the optimizers of ``torch.optim``, which ours is held to, pull in ``torch._dynamo`` when they are made.
"""

import gc
import logging

import pytest
import torch
import torch._dynamo
import torch.distributed
import torch.distributed.checkpoint

logging.disable(logging.WARNING)  # deepspeed tells every importer that there is no GPU

import deepseek_train.cli.train_rank  # noqa: E402
import tests.dist.grid  # noqa: E402

logging.disable(logging.NOTSET)

# DeepSpeed collects garbage at every turn; walking what is imported here costs each rank 0.3 s and a copy of it.
gc.collect()
gc.freeze()

__all__ = ["deepseek_train", "pytest", "tests", "torch"]
