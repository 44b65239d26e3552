"""RMSNorm as Triton kernels: a program is a row, laid out as G tiles of 128 so that a tile's scale is one reduction."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepseek_kernels.formats import E4M3, TILE, padded
from deepseek_kernels.tile_math import inverse_of, scale_of

# Rows of a program of the gain's gradient, of one step of it, and its channels.
PART, STEP, CHANNELS = 64, 2, 1024
UNROLL = tl.constexpr(4)  # steps whose loads are under way together
SUM_LAUNCH = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}
ADD_LAUNCH = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}


def row_launch(tiles: int) -> dict[str, int]:
    """32 elements a thread, whose FP32 values fit into registers. Products are rounded before they are added, as in the
    reference."""
    return {"num_warps": min(max(tiles // 8, 1), 8), "num_stages": 1, "enable_fp_fusion": False}


def vector_of(itemsize: int, d: int) -> int:
    """Elements a thread has of each 16 bytes: what loads of ``x`` make of its alignment."""
    return 16 // itemsize if d % 16 == 0 else 1


@triton.jit
def norm_kernel(
    x_ptr, gain_ptr, y_ptr, scale_ptr, value_ptr, tile_scale_ptr, M, D, KP, eps,
    G: tl.constexpr, VECTOR: tl.constexpr, QUANTISE: tl.constexpr, POW2: tl.constexpr,
):  # fmt: skip
    """VECTOR: see ``vector_of``. Stores of E4M3 are held to it: wider ones would have Triton lay the whole row out
    otherwise, through shared memory."""
    m = tl.program_id(0).to(tl.int64)
    g = tl.arange(0, G)
    k = g[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = k < D
    raw = tl.load(x_ptr + m * D + k, mask=inside, other=0.0)
    x = raw.to(tl.float32)
    mean = tl.math.div_rn(tl.sum(tl.sum(x * x, axis=1), axis=0), tl.cast(D, tl.float32))
    scale = tl.math.div_rn(1.0, tl.math.sqrt_rn(mean + eps))
    tl.store(scale_ptr + m, scale)
    gain = tl.load(gain_ptr + k, mask=inside, other=0.0).to(tl.float32)
    y = ((x * scale).to(raw.dtype).to(tl.float32) * gain).to(raw.dtype)
    tl.store(y_ptr + m * D + k, y, mask=inside)
    if QUANTISE:
        wide = tl.where(inside, y.to(tl.float32), 0.0)  # 0 * NaN must not get into the padding
        tile_scale = scale_of(tl.max(tl.abs(wide), axis=1), POW2)
        values = (wide * inverse_of(tile_scale, POW2)[:, None]).to(tl.float8e4nv)
        at = tl.max_contiguous(value_ptr + m * KP + k, [1, VECTOR])
        tl.store(at, values, mask=k < KP)
        tl.store(tile_scale_ptr + g.to(tl.int64) * M + m, tile_scale, mask=g * 128 < KP)


@triton.jit
def backward_kernel(dy_ptr, x_ptr, scale_ptr, gain_ptr, dx_ptr, D, G: tl.constexpr):
    m = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, G)[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = k < D
    scale = tl.load(scale_ptr + m)
    dy = tl.load(dy_ptr + m * D + k, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + m * D + k, mask=inside, other=0.0).to(tl.float32)
    d_normed = dy * tl.load(gain_ptr + k, mask=inside, other=0.0).to(tl.float32)
    normed = tl.where(inside, x * scale, 0.0)
    along = tl.math.div_rn(tl.sum(tl.sum(d_normed * normed, axis=1), axis=0), tl.cast(D, tl.float32))
    tl.store(dx_ptr + m * D + k, (d_normed - normed * along) * scale, mask=inside)


@triton.jit
def gain_kernel(
    dy_ptr, x_ptr, scale_ptr, part_ptr, M, D, PART: tl.constexpr, STEP: tl.constexpr, CHANNELS: tl.constexpr
):
    """The sum over PART rows, for CHANNELS channels; UNROLL steps of rows divide PART."""
    p = tl.program_id(1).to(tl.int64)
    k = (tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    total = tl.zeros((STEP, CHANNELS), tl.float32)
    for first in range(0, PART, UNROLL * STEP):
        for i in tl.static_range(UNROLL):
            m = p * PART + first + i * STEP + tl.arange(0, STEP)
            inside = (m < M)[:, None] & (k < D)
            at = m[:, None] * D + k
            dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
            x = tl.load(x_ptr + at, mask=inside, other=0.0)
            scale = tl.load(scale_ptr + m, mask=m < M, other=0.0)[:, None]
            total += dy * (x.to(tl.float32) * scale).to(x.dtype).to(tl.float32)
    tl.store(part_ptr + p * D + k, tl.sum(total, axis=0)[None, :], mask=k < D)


@triton.jit
def add_kernel(part_ptr, into_ptr, P, D):
    """Adds up P parts of 32 channels."""
    k = (tl.program_id(0) * 32 + tl.arange(0, 32))[None, :]
    total = tl.zeros((64, 32), tl.float32)
    for first in range(0, P, 64):
        p = first + tl.arange(0, 64)[:, None]
        total += tl.load(part_ptr + p.to(tl.int64) * D + k, mask=(p < P) & (k < D), other=0.0)
    before = tl.load(into_ptr + k, mask=k < D, other=0.0)
    tl.store(into_ptr + k, before + tl.sum(total, axis=0)[None, :], mask=k < D)


def _run(
    x_MD: Tensor, gain_D: Tensor, eps: float, quantised: tuple[Tensor, Tensor] | None, pow2: bool
) -> tuple[Tensor, Tensor]:
    x_MD, gain_D = x_MD.contiguous(), gain_D.contiguous()
    (m, d), tiles = x_MD.shape, tiles_of(x_MD)
    y_MD, scale_M = torch.empty_like(x_MD), x_MD.new_empty(m, dtype=torch.float32)
    values, scales = quantised or (None, None)
    if x_MD.numel():
        norm_kernel[(m,)](
            x_MD, gain_D, y_MD, scale_M, values, scales, m, d, padded(d), eps, tiles,
            vector_of(x_MD.itemsize, d), quantised is not None, pow2,
            **row_launch(tiles),
        )  # fmt: skip
    return y_MD, scale_M


def tiles_of(x_MD: Tensor) -> int:
    return triton.next_power_of_2(padded(x_MD.shape[1]) // TILE)


def rms_norm(x_MD: Tensor, gain_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _run(x_MD, gain_D, eps, None, False)


def rms_norm_quantise(
    x_MD: Tensor, gain_D: Tensor, eps: float, pow2: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    m, k = x_MD.shape[0], padded(x_MD.shape[1])
    values = x_MD.new_empty(m, k, dtype=E4M3)
    scales = x_MD.new_empty(k // TILE, m, dtype=torch.float32)
    return *_run(x_MD, gain_D, eps, (values, scales), pow2), values, scales


def rms_norm_backward(dy_MD: Tensor, x_MD: Tensor, scale_M: Tensor, gain_D: Tensor) -> Tensor:
    dy_MD, x_MD, scale_M, gain_D = (one.contiguous() for one in (dy_MD, x_MD, scale_M, gain_D))
    dx_MD, tiles = torch.empty_like(x_MD), tiles_of(x_MD)
    if x_MD.numel():
        backward_kernel[(len(x_MD),)](
            dy_MD, x_MD, scale_M, gain_D, dx_MD, x_MD.shape[1], tiles, **row_launch(tiles)
        )
    return dx_MD


def rms_norm_gain_gradient(dy_MD: Tensor, x_MD: Tensor, scale_M: Tensor, into_D: Tensor) -> None:
    dy_MD, x_MD, scale_M = dy_MD.contiguous(), x_MD.contiguous(), scale_M.contiguous()
    m, d = x_MD.shape
    part_PD = x_MD.new_empty(triton.cdiv(m, PART), d, dtype=torch.float32)
    if part_PD.numel():
        gain_kernel[(triton.cdiv(d, CHANNELS), len(part_PD))](
            dy_MD, x_MD, scale_M, part_PD, m, d, PART, STEP, CHANNELS, **SUM_LAUNCH
        )
        sum_D = into_D.contiguous()
        add_kernel[(triton.cdiv(d, 32),)](part_PD, sum_D, len(part_PD), d, **ADD_LAUNCH)
        if sum_D is not into_D:
            into_D.copy_(sum_D)
