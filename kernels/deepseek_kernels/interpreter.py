"""Triton's CPU interpreter made exact: stock, it rounds FP8 conversions wrongly, truncates FP32 to BF16 and multiplies
the bit patterns of BF16 (3.6.0 and 3.9.0). ``install`` replaces those conversions by torch's and lifts BF16 to FP32
around arithmetic. The registry calls it before a Triton kernel's first launch with TRITON_INTERPRET=1.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_TORCH = {
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
_RAW = {8: torch.uint8, 16: torch.int16, 32: torch.int32, 64: torch.int64}
_NUMPY = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
_LARGEST = {tl.float8e4nv: 448.0, tl.float8e5: 57344.0}
_stock_convert = interpreter._convert_float
Handle = Any


def install() -> None:
    """Patches the interpreter of this process; a second call changes nothing."""
    if interpreter._convert_float is _convert:
        return
    builder = interpreter.InterpreterBuilder
    interpreter._convert_float = _convert
    builder.binary_op = _lifted(builder.binary_op)
    builder.unary_op = _lifted(builder.unary_op)
    builder.create_fma = _lifted(builder.create_fma)
    builder.create_clampf = _lifted(builder.create_clampf)
    builder.create_dot = _dot_in_fp32(builder.create_dot)
    builder.cast_impl = _cast(builder.cast_impl)
    builder.create_maxnumf = _larger_number
    interpreter._patch_lang_tensor = _with_index(interpreter._patch_lang_tensor)


def _convert(data: Any, source: Any, target: Any, rounding: Any) -> Any:
    """Bits to bits, to nearest even; FP8 saturates and keeps NaN, as ``cvt.rn.satfinite`` does."""
    source, target = source.scalar, target.scalar
    toward_zero = interpreter._ir.ROUNDING_MODE.RTZ
    if source not in _TORCH or target not in _TORCH or rounding == toward_zero:
        return _stock_convert(data, source, target, rounding)
    data = np.asarray(data)
    width = source.primitive_bitwidth
    raw = np.frombuffer(data.tobytes(), dtype=_NUMPY[width]).copy()
    signed = raw if width == 8 else raw.view(f"int{width}")
    x = torch.from_numpy(signed).view(_TORCH[source])
    x = x if source == tl.float64 else x.float()
    if target in _LARGEST:
        x = torch.where(torch.isnan(x), x, x.clamp(-_LARGEST[target], _LARGEST[target]))
    width = target.primitive_bitwidth
    return x.to(_TORCH[target]).view(_RAW[width]).numpy().view(_NUMPY[width]).reshape(data.shape)


def _larger_number(self: Any, a: Handle, b: Handle) -> Handle:
    """As compiled: a NaN loses. Triton 3.6's interpreter lets it win."""
    return self.binary_op(a, b, np.fmax)


def _is_bf16(handle: Handle) -> bool:
    return isinstance(handle, interpreter.TensorHandle) and handle.dtype.scalar == tl.bfloat16


def _up(handle: Handle) -> Handle:
    if not _is_bf16(handle):
        return handle
    wide = _convert(handle.data, tl.bfloat16, tl.float32, None).view(np.float32)
    return interpreter.TensorHandle(wide, tl.float32)


def _down(handle: Handle) -> Handle:
    narrow = _convert(handle.data.astype(np.float32), tl.float32, tl.bfloat16, None)
    return interpreter.TensorHandle(narrow, tl.bfloat16)


def _lifted(method: Callable[..., Handle]) -> Callable[..., Handle]:
    def lifted(self: Any, *operands: Any) -> Handle:
        if not any(_is_bf16(one) for one in operands):
            return method(self, *operands)
        result = method(self, *(_up(one) for one in operands))
        if result.data.dtype == np.bool_:
            return interpreter.TensorHandle(result.data, tl.int1)
        return _down(result)

    return lifted


def _dot_in_fp32(method: Callable[..., Handle]) -> Callable[..., Handle]:
    def dot(self: Any, a: Handle, b: Handle, *rest: Any) -> Handle:
        return method(self, _up(a), _up(b), *rest)

    return dot


def _cast(method: Callable[..., Handle]) -> Callable[..., Handle]:
    def cast(self: Any, handle: Handle, to: Any) -> Handle:
        source, target = handle.dtype.scalar, to.scalar
        floats = source.is_floating() and target.is_floating() and source != target
        if floats and source in _TORCH and target in _TORCH:
            nearest = interpreter._ir.ROUNDING_MODE.RTNE
            bits = _convert(handle.data, source, target, nearest)
            return interpreter.TensorHandle(bits.view(interpreter._get_np_dtype(target)), target)
        if source == tl.bfloat16:
            return method(self, _up(handle), to)
        if target == tl.bfloat16:
            return _down(method(self, handle, tl.float32))
        return method(self, handle, to)

    return cast


def _with_index(patch: Callable[..., Any]) -> Callable[..., Any]:
    """numpy 2.4 no longer makes an int of an array of one element; Triton 3.6 wants one for ``range`` over a tensor."""

    def patched(tensor: Any, *scope: Any) -> Any:
        result = patch(tensor, *scope)

        def index(self: Any) -> int:
            return int(np.asarray(self.handle.data).reshape(-1)[0])

        if scope:
            scope[0].set_attr(tensor, "__index__", index)
        else:
            tensor.__index__ = index
        return result

    return patched
