"""SwiGLU with a routing weight, its quantised forms and its gradients (V3 report section 3.2.3; V3_SPEC D.3, E).

    y = silu(gate) * up * weight

``gate_up`` is [M, 2F], the gate half first; ``weight``, one number a row or None for 1, is the routing weight that the
down-projection would otherwise see after it. All of it is FP32 inside (in the
reference FP64 for FP64). What is quantised is quantised from FP32: y and
d_gate_up are never rounded to BF16 on their way to E4M3, in any backend.

``gate_up`` may also be ``Rows`` of width 2F: kept in FP8 in tiles of 1 x 128, as the report does, and dequantised as it
is loaded. A row of zeros gives zeros whatever its finite weight, so padding rows stay padding.
Legend: M rows, MP and FP those and F padded to a multiple of 128, F feed-forward size; see ``formats``.
"""

import torch
from torch import Tensor

from deepseek_kernels.formats import Rows, new_tiles
from deepseek_kernels.registry import define
from deepseek_kernels.shapes import check_axes, check_shape


def _fake_swiglu(gate_up: Tensor, weight: Tensor | None) -> Tensor:
    return gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)


def _fake_quantise(
    gate_up: Tensor, scales: Tensor | None, width: int, weight: Tensor | None, pow2: bool
) -> tuple[Tensor, Tensor]:
    return new_tiles(gate_up, len(gate_up), width // 2)


def _fake_columns(
    gate_up: Tensor, scales: Tensor | None, width: int, weight: Tensor | None, pow2: bool
) -> tuple[Tensor, Tensor]:
    return new_tiles(gate_up, width // 2, len(gate_up))


def _fake_weight(weight: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if weight is None else torch.empty_like(weight)


def _fake_backward(
    dy: Tensor, gate_up: Tensor, scales: Tensor | None, width: int, weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    return dy.new_empty(len(dy), width), _fake_weight(weight, dy)


def _fake_backward_quantise(
    dy: Tensor, gate_up: Tensor, scales: Tensor | None, width: int, weight: Tensor | None, pow2: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, columns = new_tiles(dy, len(dy), width), new_tiles(dy, width, len(dy))
    return *rows, *columns, _fake_weight(weight, dy)


_BACKENDS = ("reference", "triton", "cuda")
_INPUT = "Tensor gate_up, Tensor? scales, int width, Tensor? weight"
_swiglu = define(
    __name__, "swiglu(Tensor gate_up, Tensor? weight, *, str backend) -> Tensor", _fake_swiglu, _BACKENDS
)
_swiglu_quantise = define(
    __name__,
    f"swiglu_quantise({_INPUT}, bool pow2, *, str backend) -> (Tensor, Tensor)",
    _fake_quantise,
    _BACKENDS,
)
_swiglu_quantise_columns = define(
    __name__,
    f"swiglu_quantise_columns({_INPUT}, bool pow2, *, str backend) -> (Tensor, Tensor)",
    _fake_columns,
    _BACKENDS,
)
_swiglu_backward = define(
    __name__,
    f"swiglu_backward(Tensor dy, {_INPUT}, *, str backend) -> (Tensor, Tensor)",
    _fake_backward,
    _BACKENDS,
)
_swiglu_backward_quantise = define(
    __name__,
    f"swiglu_backward_quantise(Tensor dy, {_INPUT}, bool pow2, *, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_backward_quantise,
    _BACKENDS,
)


def _parts(gate_up: Tensor | Rows) -> tuple[Tensor, Tensor | None, int]:
    if isinstance(gate_up, Rows):
        return gate_up.values, gate_up.scales, gate_up.width
    return gate_up, None, gate_up.shape[1]


def _check(function: str, gate_up: Tensor | Rows, weight: Tensor | None, dy: Tensor | None = None) -> None:
    if isinstance(gate_up, Tensor):  # else the matrix that Rows is
        check_axes(function, "gate_up", gate_up, "M, 2F")
    values, _, width = _parts(gate_up)
    rows = len(values)
    if width % 2:
        raise ValueError(f"{function}: gate_up is {[rows, width]}, must be [M, 2F], two halves")
    if weight is not None:
        check_shape(function, "weight", weight, (rows,), "gate_up", (rows, width))
    if dy is not None:
        check_shape(function, "dy", dy, (rows, width // 2), "gate_up", (rows, width))


def swiglu(gate_up_MF2: Tensor, weight_M: Tensor | None, *, backend: str) -> Tensor:
    """BF16 or FP32 [M, 2F] to y [M, F] in its dtype, rounded once."""
    _check("swiglu", gate_up_MF2, weight_M)
    return _swiglu(gate_up_MF2, weight_M, backend=backend)


def swiglu_quantise(gate_up: Tensor | Rows, weight_M: Tensor | None, *, pow2: bool, backend: str) -> Rows:
    """y in tiles of 1 x 128, from FP32: what the down-projection multiplies."""
    _check("swiglu_quantise", gate_up, weight_M)
    values, scales = _swiglu_quantise(*_parts(gate_up), weight_M, pow2, backend=backend)
    return Rows(values, scales, _parts(gate_up)[2] // 2)


def swiglu_quantise_columns(
    gate_up: Tensor | Rows, weight_M: Tensor | None, *, pow2: bool, backend: str
) -> Rows:
    """y computed again, transposed, in tiles of 128 x 1, from FP32: rows of y^T [F, MP], as the weight gradient of the
    down-projection contracts over tokens."""
    _check("swiglu_quantise_columns", gate_up, weight_M)
    values, scales = _swiglu_quantise_columns(*_parts(gate_up), weight_M, pow2, backend=backend)
    return Rows(values, scales, len(_parts(gate_up)[0]))


def swiglu_backward(
    dy_MF: Tensor, gate_up: Tensor | Rows, weight_M: Tensor | None, *, backend: str
) -> tuple[Tensor, Tensor | None]:
    """The gradients: d_gate_up [M, 2F] in the dtype of ``dy``, and of the weight in its own, None where there is none.

    With s = sigmoid(gate):  d_gate = dy * weight * up * s * (1 + gate * (1 - s)),  d_up = dy * weight * gate * s,
    d_weight = sum over F of dy * gate * s * up.
    """
    _check("swiglu_backward", gate_up, weight_M, dy_MF)
    d_gate_up, d_weight_M = _swiglu_backward(dy_MF, *_parts(gate_up), weight_M, backend=backend)
    return d_gate_up, None if weight_M is None else d_weight_M


def swiglu_backward_quantise(
    dy_MF: Tensor, gate_up: Tensor | Rows, weight_M: Tensor | None, *, pow2: bool, backend: str
) -> tuple[Rows, Rows, Tensor | None]:
    """``swiglu_backward`` with d_gate_up quantised from FP32 both ways: in tiles of 1 x 128 for the gradient of the
    input, [M, 2F], and transposed in tiles of 128 x 1 for that of the weight, [2F, MP]."""
    _check("swiglu_backward_quantise", gate_up, weight_M, dy_MF)
    values, scales, values_t, scales_t, d_weight_M = _swiglu_backward_quantise(
        dy_MF, *_parts(gate_up), weight_M, pow2, backend=backend
    )
    rows = Rows(values, scales, _parts(gate_up)[2])
    return rows, Rows(values_t, scales_t, len(dy_MF)), None if weight_M is None else d_weight_M
