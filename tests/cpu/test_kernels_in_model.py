"""A model whose every family of kernels is Triton's, interpreted: it learns what the reference learns."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from deepseek_kernels.choice import FAMILIES, ON_CPU, Kernels, choose
from deepseek_train.config.schema import CurveConfig, Fp8Config, OptimConfig
from deepseek_train.model.stage import Stage
from deepseek_train.optim.groups import WeightGroup
from deepseek_train.optim.replicated import Replicated
from deepseek_train.phases.parcel import arrived
from deepseek_train.phases.tape import Tape
from deepseek_train.phases.wgrad import run_works
from deepseek_train.pipeline.values import LossScales
from tests.gpu.setting import ON_GPU  # and with it an interpreter that rounds as a GPU does
from tests.helpers.fp8 import apart
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
Precision = tuple[Fp8Config | None, torch.dtype]
NEVER = CurveConfig(0.0)
OPTIM = OptimConfig(NEVER, NEVER, NEVER, NEVER, clip_norm=0.0)


def trained(kernels: Kernels, fp8: Fp8Config | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """Losses of two steps, gradients of the first, weights after the second."""
    stage = whole_model(MODEL, length=T, dtype=dtype, fp8=fp8, kernels=kernels)
    group = WeightGroup(dict(stage.weights()), None, 0.1)
    optimizer = Replicated([group], None, OPTIM, torch.bfloat16, kernels.optim)
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


class Seen(TorchDispatchMode):
    """(name, backend) of every kernel that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: set[tuple[str, str]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "deepseek_kernels":
            self.calls.add((func._opname, kwargs["backend"]))
        return func(*args, **kwargs)


ALWAYS = {
    *("rms_norm", "rms_norm_backward", "rms_norm_gain_gradient", "attention", "attention_backward"),
    *("rotate_", "gate", "gate_backward", "reduce", "cross_entropy_", "adamw"),
}
IN_BF16 = {"swiglu", "swiglu_backward", "expand"}
IN_FP8 = {
    *("swiglu_quantise", "swiglu_quantise_columns", "swiglu_backward_quantise", "expand_rows"),
    *("gemm", "gemm_add", "grouped_gemm", "grouped_gemm_add", "quantise_blocks", "transpose_values"),
    *("quantise_rows", "quantise_both", "requantise_columns", "pack_e5m6", "unpack_e5m6", "quantise_columns"),
}


@pytest.mark.skipif(ON_GPU, reason="where there is a GPU, kernels do not run on CPU tensors")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy, at padding
@pytest.mark.parametrize(
    ("fp8", "ops", "coarser", "finer"),
    [
        (None, IN_BF16, (None, torch.bfloat16), (None, torch.float32)),
        (Fp8Config(), IN_FP8, (Fp8Config(), torch.bfloat16), (None, torch.bfloat16)),
    ],
    ids=["bf16", "fp8"],
)
def test_triton_trains_as_the_reference(
    fp8: Fp8Config | None, ops: set[str], coarser: Precision, finer: Precision
) -> None:
    """Backends add FP32 numbers in other orders. That changes a rounding to BF16 or FP8 only where a sum is as near to
    a half as FP32 is inexact: one number in some thousands, and so the distance is some sqrt(1/1000) of what the
    roundings of all numbers make. An eighth allows one in 64."""
    kernels = choose("cpu", dict.fromkeys(set(FAMILIES) - {"wgrad"}, "triton"))
    with Seen() as seen:
        found = trained(kernels, fp8, torch.bfloat16)
    # The router and the head are outside FP8, and their weight gradients have no Triton kernel.
    assert seen.calls == {(name, "triton") for name in ALWAYS | ops} | {("weight_gradient", "reference")}
    reference, other = trained(ON_CPU, *coarser), trained(ON_CPU, *finer)
    for name, wanted in reference.items():
        assert apart(wanted, other[name]) > 0.0, name
        assert apart(found[name], wanted) <= apart(wanted, other[name]) / 8, name
