"""A model whose every family of kernels is Triton's, interpreted: it learns what the reference learns."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from deepseek_kernels.choice import FAMILIES, ON_CPU, Kernels, choose
from deepseek_train.config.schema import CurveConfig, Fp8Config, OptimConfig
from deepseek_train.model.stage import Stage
from deepseek_train.optim.groups import WeightGroup
from deepseek_train.optim.replicated import Replicated
from deepseek_train.phases.parcel import arrived
from deepseek_train.phases.tape import Tape
from deepseek_train.phases.wgrad import run_works
from deepseek_train.pipeline.values import LossScales
from tests.gpu import setting  # installs what makes the interpreter fast
from tests.helpers.models import main_grads, random_batch, tiny, whole_model

# Sizes that are no multiples of tiles; all experts are chosen by all tokens, so that none can choose differently.
MODEL = tiny(
    num_layers=2,
    hidden_size=160,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=16,
    q_lora_rank=48,
    kv_lora_rank=32,
    dense_ffn_size=136,
    expert_ffn_size=72,
    num_routed_experts=4,
    num_expert_groups=1,
    expert_groups_per_token=1,
    experts_per_token=4,
    mtp_depth=0,
)
T, STEPS, LR = 12, 2, 1e-3
NEVER = CurveConfig(0.0)
OPTIM = OptimConfig(NEVER, NEVER, NEVER, NEVER, clip_norm=0.0)


def trained(kernels: Kernels, fp8: Fp8Config | None, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Losses of two steps, gradients of the first, weights after the second."""
    stage = whole_model(MODEL, length=T, dtype=dtype, fp8=fp8, kernels=kernels)
    moments = torch.bfloat16
    group = WeightGroup(dict(stage.weights()), None, 0.1)
    optimizer = Replicated([group], None, OPTIM, moments, kernels.optim)
    found: dict[str, Tensor] = {}
    for step in range(STEPS):
        found[f"loss {step}"] = loss_of(stage)
        if step == 0:
            found |= {f"d {name}": gradient.clone() for name, gradient in main_grads(stage).items()}
        optimizer.step(LR)
        if stage.context.fp8 is not None:
            stage.context.fp8.copies.forget()
    return found | {name: weight.detach() for name, weight in stage.weights().items()}


def loss_of(stage: Stage) -> Tensor:
    tape, value = Tape(), random_batch(MODEL, 1, T)
    for phase in stage.phases:
        value = tape.run(phase, value)
    ledger = arrived(value).ledger
    tape.seed([None, *LossScales(1.0, 0.0, 0.1).gradients(ledger)])
    while len(tape):
        tape.backward()
    run_works(stage.context.queue.take_open())
    return ledger.main.detach()


if __name__ == "__main__":
    import time
    t=time.time()
    TRITON = choose("cpu", dict.fromkeys(FAMILIES, "triton"))
    from tests.helpers.fp8 import apart
    for fp8, less in ((None,(None,torch.float32)),(Fp8Config(),(None,torch.bfloat16))):
        a=trained(TRITON,fp8); print(time.time()-t)
        b=trained(ON_CPU,fp8); c=trained(ON_CPU,*less)
        for n in a: print(f"{n:40s} {apart(a[n],b[n]):.2e} {apart(b[n],c[n]):.2e} ratio {apart(a[n],b[n])/max(apart(b[n],c[n]),1e-30):.3f}")
