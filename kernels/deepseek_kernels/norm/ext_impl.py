"""RMSNorm by NVIDIA's apex (``fused_layer_norm_cuda``, built from source; PyPI's ``apex`` is another project). Its
backward
gives both gradients at once, and each of ours keeps one, so that they stay separate work. It multiplies by the gain
before it rounds: a rounding less than the reference. Guarded by its symbols; never run on a machine of ours."""

import importlib
from functools import cache
from types import ModuleType

from torch import Tensor

from deepseek_kernels.machine import BackendUnavailable
from deepseek_kernels.quant.triton_impl import quantise_rows


@cache
def _apex() -> ModuleType:
    try:
        return importlib.import_module("fused_layer_norm_cuda")
    except ImportError as error:
        raise BackendUnavailable(
            f"norm: backend 'ext' is apex's fused_layer_norm_cuda, which cannot be imported ({error}): build apex from "
            "NVIDIA's repository with its CUDA extensions, or use 'triton'"
        ) from error


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, scale = _apex().rms_forward_affine(x.contiguous(), gain.shape, gain, eps)
    return y, scale


def rms_norm_quantise(
    x: Tensor, gain: Tensor, eps: float, pow2: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, scale = rms_norm(x, gain, eps)
    return y, scale, *quantise_rows(y, pow2)


def _gradients(dy: Tensor, x: Tensor, scale: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    eps, keeps_input = (
        0.0,
        False,
    )  # eps is in ``scale`` already; the input is given, not worked out from the result
    dx, d_gain = _apex().rms_backward_affine(
        dy.contiguous(), scale, x.contiguous(), gain.shape, gain, eps, keeps_input
    )
    return dx, d_gain


def rms_norm_backward(dy: Tensor, x: Tensor, scale: Tensor, gain: Tensor) -> Tensor:
    return _gradients(dy, x, scale, gain)[0]


def rms_norm_gain_gradient(dy: Tensor, x: Tensor, scale: Tensor, into: Tensor) -> None:
    into += _gradients(dy, x, scale, x.new_ones(x.shape[1]))[1]
