"""Attention as Triton kernels: tiles, and how they are launched.

Legend: see the package; W width of a part of the heads.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from torch.nn import functional
from triton.tools.tensor_descriptor import TensorDescriptor

from deepseek_kernels.attention.backward_kernels import dkdv_kernel, dq_kernel
from deepseek_kernels.attention.forward_kernel import forward_kernel


@dataclass(frozen=True)
class Tile:
    queries: int
    keys: int
    warps: int
    stages: int

    @property
    def launch(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


@dataclass(frozen=True)
class Tiles:
    """``dkdv.queries`` divides ``dkdv.keys`` and ``dq.queries``."""

    forward: Tile
    dq: Tile
    dkdv: Tile
    precision: str  # of tl.dot


# What fits the registers without spilling on Triton 3.6.0 and 3.9.0 (the gate holds it to that).
TILES = {
    torch.bfloat16: Tiles(Tile(128, 128, 8, 2), Tile(128, 64, 8, 2), Tile(32, 128, 8, 3), "ieee"),
    torch.float32: Tiles(Tile(16, 32, 4, 1), Tile(16, 32, 8, 1), Tile(16, 16, 8, 1), "tf32x3"),
}


def columns(width: int) -> int:
    """Of the tile that holds ``width``; ``tl.dot`` wants 16 at least."""
    return max(16, triton.next_power_of_2(width))


def sizes(nope: int, rope: int, value: int) -> dict[str, int]:
    return {
        "NOPE": nope,
        "ROPE": rope,
        "VALUE": value,
        "NC": columns(nope),
        "RC": columns(rope),
        "VC": columns(value),
    }


def _parts(x_BTHQ: Tensor, nope: int, rows: int) -> tuple[TensorDescriptor, TensorDescriptor]:
    return _view(x_BTHQ[..., :nope], rows), _view(x_BTHQ[..., nope:], rows)


def _readable(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The kernels step along the last axis one by one."""
    return tuple(x if x.stride(3) == 1 else x.contiguous() for x in tensors)


def _view(x_BTHW: Tensor, rows: int) -> TensorDescriptor:
    """A descriptor that reads ``rows`` positions of a head. TMA wants addresses and strides in 16 bytes, and no stride
    of 0: what lies differently is copied."""
    size = x_BTHW.element_size()
    if x_BTHW.data_ptr() % 16 or any(s * size % 16 or s == 0 for s in x_BTHW.stride()[:3]):
        width = x_BTHW.shape[3]
        x_BTHW = functional.pad(x_BTHW, (0, -width % (16 // size))).contiguous()[..., :width]
    block = [1, rows, 1, columns(x_BTHW.shape[3])]
    return TensorDescriptor(x_BTHW, list(x_BTHW.shape), list(x_BTHW.stride()), block)


def _tiles(q: Tensor) -> Tiles:
    if q.dtype not in TILES:
        raise ValueError(f"the Triton kernels take bfloat16 or float32, not {q.dtype}")
    b, t, h, _ = q.shape
    if b * h >= 2**16 or b * h * t >= 2**31:
        raise ValueError(f"{b} x {h} heads of {t} positions are too many: the kernels count them in 32 bits")
    return TILES[q.dtype]


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, document_starts: Tensor | None, nope: int
) -> tuple[Tensor, Tensor]:
    tiles, tile = _tiles(q), _tiles(q).forward
    q, k, v = _readable(q, k, v)
    b, t, h, width = q.shape
    out = q.new_empty(b, t, h, v.shape[3])
    lse = q.new_empty(b, h, t, dtype=torch.float32)
    if not out.numel():
        return out, lse
    docs = document_starts is not None
    forward_kernel[triton.cdiv(t, tile.queries), b * h](
        q,
        *_parts(k, nope, tile.keys),
        _view(v, tile.keys),
        out,
        lse,
        document_starts.contiguous() if docs else None,
        scale,
        t,
        h,
        *q.stride()[:3],
        docs,
        **sizes(nope, width - nope, v.shape[3]),
        BM=tile.queries,
        BN=tile.keys,
        PRECISION=tiles.precision,
        **tile.launch,
    )
    return out, lse


def attention_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    document_starts: Tensor | None,
    nope: int,
) -> tuple[Tensor, Tensor, Tensor]:
    tiles = _tiles(q)
    d_out, q, k, v, out = _readable(d_out, q, k, v, out)
    b, t, h, width = q.shape
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    if not out.numel():
        return dq, dk, dv
    docs = document_starts is not None
    starts = document_starts.contiguous() if docs else None
    constants = sizes(nope, width - nope, v.shape[3]) | {"DOCS": docs, "PRECISION": tiles.precision}
    tile = tiles.dq
    padded = triton.cdiv(t, tile.queries) * tile.queries
    lse_2, delta = lse.new_empty(2, b * h, padded)
    dq_kernel[padded // tile.queries, b * h](
        q,
        out,
        d_out,
        *_parts(k, nope, tile.keys),
        _view(v, tile.keys),
        lse.contiguous(),
        lse_2,
        delta,
        dq,
        starts,
        scale,
        t,
        padded,
        h,
        *q.stride()[:3],
        *out.stride()[:3],
        *d_out.stride()[:3],
        **constants,
        BM=tile.queries,
        BN=tile.keys,
        **tile.launch,
    )
    tile = tiles.dkdv
    dkdv_kernel[triton.cdiv(t, tile.keys), b * h](
        k,
        v,
        *_parts(q, nope, tile.queries),
        _view(d_out, tile.queries),
        lse_2,
        delta,
        dk,
        dv,
        starts,
        _ends(starts, tile.keys) if docs else None,
        scale,
        t,
        padded,
        h,
        *k.stride()[:3],
        *v.stride()[:3],
        **constants,
        BM=tile.queries,
        BN=tile.keys,
        **tile.launch,
    )
    return dq, dk, dv


def _ends(starts_BT: Tensor, keys: int) -> Tensor:
    """[B, blocks of keys]: where the document of each block's last key ends."""
    last = torch.arange(
        keys - 1, starts_BT.shape[1] + keys - 1, keys, dtype=torch.int32, device=starts_BT.device
    )
    last_BN = last.expand(starts_BT.shape[0], -1).contiguous()
    return torch.searchsorted(starts_BT, last_BN, right=True, out_int32=True)
