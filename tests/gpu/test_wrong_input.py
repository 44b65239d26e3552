"""Norm, SwiGLU, routing and the rest: input that does not fit is refused, and the message says what does."""

from collections.abc import Callable

import pytest
import torch

from deepseek_kernels.attention import attention_backward
from deepseek_kernels.formats import Groups
from deepseek_kernels.loss import cross_entropy_
from deepseek_kernels.moe import expand, expand_rows, gate, gate_backward, order, reduce
from deepseek_kernels.norm import rms_norm, rms_norm_backward, rms_norm_gain_gradient, rms_norm_quantise
from deepseek_kernels.optim import adamw
from deepseek_kernels.rope import rotate_
from deepseek_kernels.swiglu import (
    swiglu,
    swiglu_backward,
    swiglu_backward_quantise,
    swiglu_quantise,
    swiglu_quantise_columns,
)
from deepseek_kernels.wgrad import weight_gradient
from tests.gpu.products import rows
from tests.gpu.setting import DEVICE, randn

ON = {"backend": "triton"}
QUANTISED = {"pow2": False, "backend": "triton"}

Call = Callable[[], object]


def index(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


X = (2, 200)
NORM: dict[str, tuple[Call, str]] = {
    "gain": (
        lambda: rms_norm(randn(*X), randn(100), 1e-6, **ON),
        "rms_norm: gain is [100], must be [200] to fit x [2, 200]",
    ),
    "3d": (
        lambda: rms_norm(randn(2, 2, 8), randn(8), 1e-6, **ON),
        "rms_norm: x is [2, 2, 8], must be [M, D]",
    ),
    "quantise": (
        lambda: rms_norm_quantise(randn(*X), randn(1, 200), 1e-6, **QUANTISED),
        "rms_norm_quantise: gain is [1, 200], must be [200]",
    ),
    "backward dy": (
        lambda: rms_norm_backward(randn(2, 100), randn(*X), randn(2), randn(200), **ON),
        "rms_norm_backward: dy is [2, 100], must be [2, 200]",
    ),
    "backward scale": (
        lambda: rms_norm_backward(randn(*X), randn(*X), randn(1), randn(200), **ON),
        "rms_norm_backward: scale is [1], must be [2]",
    ),
    "backward gain": (
        lambda: rms_norm_backward(randn(*X), randn(*X), randn(2), randn(100), **ON),
        "rms_norm_backward: gain is [100], must be [200]",
    ),
    "gradient into": (
        lambda: rms_norm_gain_gradient(randn(*X), randn(*X), randn(2), randn(100), **ON),
        "rms_norm_gain_gradient: into is [100], must be [200]",
    ),
    "gradient dtype": (
        lambda: rms_norm_gain_gradient(randn(*X), randn(*X), randn(2), randn(200).bfloat16(), **ON),
        "into is torch.bfloat16, must be torch.float32",
    ),
}

SWIGLU: dict[str, tuple[Call, str]] = {
    "weight": (
        lambda: swiglu(randn(4, 8), randn(3), **ON),
        "swiglu: weight is [3], must be [4] to fit gate_up [4, 8]",
    ),
    "odd": (lambda: swiglu(randn(4, 7), None, **ON), "swiglu: gate_up is [4, 7], must be [M, 2F]"),
    "1d": (lambda: swiglu(randn(8), None, **ON), "swiglu: gate_up is [8], must be [M, 2F]"),
    "odd rows": (
        lambda: swiglu_quantise(rows(4, 7), None, **QUANTISED),
        "swiglu_quantise: gate_up is [4, 7]",
    ),
    "columns": (
        lambda: swiglu_quantise_columns(rows(4, 8), randn(4, 1), **QUANTISED),
        "swiglu_quantise_columns: weight is [4, 1], must be [4]",
    ),
    "dy": (
        lambda: swiglu_backward(randn(4, 8), randn(4, 8), None, **ON),
        "swiglu_backward: dy is [4, 8], must be [4, 4] to fit gate_up [4, 8]",
    ),
    "dy rows": (
        lambda: swiglu_backward_quantise(randn(3, 4), rows(4, 8), None, **QUANTISED),
        "swiglu_backward_quantise: dy is [3, 4], must be [4, 4]",
    ),
}

MOE: dict[str, tuple[Call, str]] = {
    "expand": (
        lambda: expand(randn(4, 8), index(3, 1), **ON),
        "expand: padded_to_row is [3, 1], must be [P]",
    ),
    "expand x": (lambda: expand(randn(4), index(3), **ON), "expand: x is [4], must be [R, D]"),
    "expand dtype": (
        lambda: expand(randn(4, 8), index(3, dtype=torch.int64), **ON),
        "expand: padded_to_row is torch.int64, must be torch.int32",
    ),
    "expand_rows": (
        lambda: expand_rows(rows(4, 8), index(3, dtype=torch.int64), **QUANTISED),
        "expand_rows: padded_to_row is torch.int64, must be torch.int32",
    ),
    "reduce": (lambda: reduce(randn(4, 8), index(3), **ON), "reduce: row_to_padded is [3], must be [R, K]"),
    "gate bias": (
        lambda: gate(randn(2, 8), randn(4), 2, 1, 2, 1.0, **ON),
        "gate: bias is [4], must be [8] to fit scores [2, 8]",
    ),
    "gate groups": (lambda: gate(randn(2, 8), randn(8), 0, 0, 2, 1.0, **ON), "cannot be 0 equal groups"),
    "gate_backward": (
        lambda: gate_backward(randn(2, 3), randn(2, 8), index(2, 2, dtype=torch.int64), 1.0, **ON),
        "gate_backward: d_weights is [2, 3], must be [2, 2] to fit ids [2, 2]",
    ),
    "gate_backward ids": (
        lambda: gate_backward(randn(3, 2), randn(2, 8), index(3, 2, dtype=torch.int64), 1.0, **ON),
        "gate_backward: ids is [3, 2], must be [2, 2] to fit scores [2, 8]",
    ),
    "order": (
        lambda: order(index(3, dtype=torch.int64), 3, 1, Groups.of((1, 1), DEVICE)),
        "order: assignment_to_slot is [3], must be [2] to fit groups of [1, 1]",
    ),
}


def state(low: torch.Tensor | None = None, **other: torch.Tensor) -> Call:
    tensors = {name: randn(8) for name in ("weight", "grad", "exp_avg", "exp_avg_sq")} | other
    return lambda: adamw(*tensors.values(), 1e-3, 0.9, 0.95, 1e-8, 0.1, 1, low=low, **ON)


OTHERS: dict[str, tuple[Call, str]] = {
    "wgrad rows": (
        lambda: weight_gradient(randn(4, 2), randn(3, 5), randn(2, 5), backend="torch"),
        "weight_gradient: x is [3, 5], must be [4, 5] to fit dy [4, 2]",
    ),
    "wgrad into": (
        lambda: weight_gradient(randn(4, 1), randn(4, 5), randn(2, 5), backend="torch"),
        "weight_gradient: into is [2, 5], must be [1, 5]",
    ),
    "wgrad dtype": (
        lambda: weight_gradient(randn(4, 2), randn(4, 5), randn(2, 5).bfloat16(), backend="torch"),
        "weight_gradient: into is torch.bfloat16",
    ),
    "rope": (
        lambda: rotate_(randn(2, 3, 4), randn(3, 2, 2), inverse=False, **ON),
        "rotate_: x is [2, 3, 4], must be [B,",
    ),
    "loss": (
        lambda: cross_entropy_(randn(8), index(8, dtype=torch.int64), 1.0, **ON),
        "cross_entropy_: logits is [8]",
    ),
    "labels": (
        lambda: cross_entropy_(randn(2, 8), index(2), 1.0, **ON),
        "cross_entropy_: labels is torch.int32",
    ),
    "scale": (
        lambda: cross_entropy_(randn(2, 8), index(2, dtype=torch.int64), randn(2), **ON),
        "cross_entropy_: scale is [2], must be one element",
    ),
    "adamw size": (state(grad=randn(4)), "adamw: grad is [4], must be of one size with weight [8]"),
    "adamw low": (state(randn(4).bfloat16()), "adamw: low is [4], must be of one size"),
    "adamw strides": (state(exp_avg=randn(16)[::2]), "adamw: exp_avg must be contiguous"),
    "adamw dtype": (state(grad=randn(8).bfloat16()), "adamw: grad is torch.bfloat16, must be torch.float32"),
    "attention": (
        lambda: attention_backward(*[randn(1, 4, 2, 8)] * 5, randn(1, 4, 2), 1.0, None, nope=4, **ON),
        "attention_backward: lse is [1, 4, 2], must be [1, 2, 4] to fit q [1, 4, 2, 8]",
    ),
}

CASES = {"norm": NORM, "swiglu": SWIGLU, "moe": MOE, "": OTHERS}


@pytest.mark.parametrize(
    ("call", "said"),
    [pytest.param(*case, id=f"{op} {name}") for op, cases in CASES.items() for name, case in cases.items()],
)
def test_what_does_not_fit_is_refused(call: Call, said: str) -> None:
    with pytest.raises(ValueError) as error:
        call()
    assert said in str(error.value)
