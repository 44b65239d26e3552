"""RMSNorm, alone or with quantisation, and its two gradients (V3 report section 2.1; V3_SPEC A.2).

    y = gain * cast(x * scale),  scale = 1 / sqrt(mean(x^2) + eps)

FP32 inside, a row's ``scale`` kept for the backward pass. The gain multiplies after the cast to the dtype of ``x``, as
in the published inference code, and the product is rounded once more. The reference also takes FP64. Legend: M rows, D
channels (any number), P parts of the rows; see ``formats``.
"""

import torch
from torch import Tensor

from deepseek_kernels.formats import E4M3, TILE, Rows, padded
from deepseek_kernels.registry import define
from deepseek_kernels.shapes import check_axes, check_dtype, check_shape


def _fake_norm(x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), _per_row(x)


def _fake_quantise(x: Tensor, gain: Tensor, eps: float, pow2: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    m, k = x.shape[0], padded(x.shape[1])
    values, scales = x.new_empty(m, k, dtype=E4M3), x.new_empty(k // TILE, m, dtype=torch.float32)
    return *_fake_norm(x, gain, eps), values, scales


def _per_row(x: Tensor) -> Tensor:
    return x.new_empty(len(x), dtype=torch.promote_types(x.dtype, torch.float32))


def _fake_backward(dy: Tensor, x: Tensor, scale: Tensor, gain: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_gain_gradient(dy: Tensor, x: Tensor, scale: Tensor, into: Tensor) -> None:
    return None


_BACKENDS = ("reference", "triton", "ext")
_rms_norm = define(
    __name__,
    "rms_norm(Tensor x, Tensor gain, float eps, *, str backend) -> (Tensor, Tensor)",
    _fake_norm,
    _BACKENDS,
)
_rms_norm_quantise = define(
    __name__,
    "rms_norm_quantise(Tensor x, Tensor gain, float eps, bool pow2, *, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_quantise,
    _BACKENDS,
)
_rms_norm_backward = define(
    __name__,
    "rms_norm_backward(Tensor dy, Tensor x, Tensor scale, Tensor gain, *, str backend) -> Tensor",
    _fake_backward,
    _BACKENDS,
)
_rms_norm_gain_gradient = define(
    __name__,
    "rms_norm_gain_gradient(Tensor dy, Tensor x, Tensor scale, Tensor(a!) into, *, str backend) -> ()",
    _fake_gain_gradient,
    _BACKENDS,
)


def rms_norm(x_MD: Tensor, gain_D: Tensor, eps: float, *, backend: str) -> tuple[Tensor, Tensor]:
    """BF16 or FP32 [M, D] to y [M, D] in its dtype, and the scales, FP32 [M]. A NaN or Inf in a row spoils that row."""
    _check("rms_norm", x_MD, gain_D=gain_D)
    return _rms_norm(x_MD, gain_D, eps, backend=backend)


def rms_norm_quantise(
    x_MD: Tensor, gain_D: Tensor, eps: float, *, pow2: bool, backend: str
) -> tuple[Tensor, Tensor, Rows]:
    """``rms_norm``, and ``quant.quantise_rows`` of the y it returns (as rounded to the dtype of ``x``), bit for bit: y,
    scales and tiles. Between this y and that of ``rms_norm`` alone may lie a rounding: a compiler may add up a row's
    squares in another order."""
    _check("rms_norm_quantise", x_MD, gain_D=gain_D)
    y_MD, scale_M, values, scales = _rms_norm_quantise(x_MD, gain_D, eps, pow2, backend=backend)
    return y_MD, scale_M, Rows(values, scales, x_MD.shape[1])


def rms_norm_backward(
    dy_MD: Tensor, x_MD: Tensor, scale_M: Tensor, gain_D: Tensor, *, backend: str
) -> Tensor:
    """The gradient of ``x`` in its dtype, [M, D]; that of the gain is work of its own, for a schedule to place.

    dx = scale * (d - n * mean(d * n)) with d = dy * gain and n = x * scale, both in FP32.
    """
    _check("rms_norm_backward", x_MD, gain_D=gain_D, scale_M=scale_M, dy_MD=dy_MD)
    return _rms_norm_backward(dy_MD, x_MD, scale_M, gain_D, backend=backend)


def rms_norm_gain_gradient(
    dy_MD: Tensor, x_MD: Tensor, scale_M: Tensor, into_D: Tensor, *, backend: str
) -> None:
    """Adds the sum over rows of dy * cast(x * scale) to ``into``, FP32 [D]. The order of additions depends on M
    alone."""
    _check("rms_norm_gain_gradient", x_MD, scale_M=scale_M, dy_MD=dy_MD, into_D=into_D)
    check_dtype("rms_norm_gain_gradient", "into", into_D.dtype, torch.float32, torch.float64)
    _rms_norm_gain_gradient(dy_MD, x_MD, scale_M, into_D, backend=backend)


def _check(
    function: str,
    x_MD: Tensor,
    *,
    gain_D: Tensor | None = None,
    into_D: Tensor | None = None,
    scale_M: Tensor | None = None,
    dy_MD: Tensor | None = None,
) -> None:
    check_axes(function, "x", x_MD, "M, D")
    rows, channels = x_MD.shape
    for name, given, shape in (
        ("gain", gain_D, (channels,)),
        ("into", into_D, (channels,)),
        ("scale", scale_M, (rows,)),
        ("dy", dy_MD, (rows, channels)),
    ):
        if given is not None:
            check_shape(function, name, given, shape, "x", x_MD.shape)
