"""A whole model to decode with, its weights from wherever they are stored."""

from dataclasses import replace

import torch

from deepseek_kernels.choice import Kernels, choose
from deepseek_train.checkpoint.weight_source import WeightSource
from deepseek_train.model.context import ModelContext
from deepseek_train.model.stage import Stage
from deepseek_train.phases.wgrad import WeightGradQueue
from deepseek_train.spec.stages import split_layers
from deepseek_train.spec.weights import all_weights


def kernels_for(device: torch.device) -> Kernels:
    """What training uses; on GPUs with our own attention, which, unlike cuDNN's, knows every type and size."""
    return choose(device.type, {"attention": "triton"} if device.type == "cuda" else {})


@torch.no_grad()
def decoding_stage(source: WeightSource, length: int, device: torch.device, dtype: torch.dtype) -> Stage:
    """All layers as one stage for ``length`` positions, weights rounded to ``dtype``; MTP modules are left out. At no
    time is more than one weight in memory besides the model."""
    m = replace(source.model, mtp_depth=0)
    (spec,) = split_layers(m, 1)
    context = ModelContext(m, WeightGradQueue(), device=device, dtype=dtype, kernels=kernels_for(device))
    stage = Stage(context, spec, length)
    places = {**stage.weights(), **{f"layers.{i}.router.bias": router.bias for i, router in stage.routers()}}
    for weight in all_weights(m):
        places[weight.name].copy_(source.read(weight.name).view(weight.shape))
    return stage.eval()
