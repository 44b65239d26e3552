"""The dispatcher over DeepEP: its kernels move the rows, our plan says what the experts do with them.

A plan is a first dispatch of rows as narrow as DeepEP takes. They carry the routing weights, and the number of the
token they stand for, so that the plan knows what has arrived in whatever order; its handle is what later transfers
reuse, none of which lets the host wait: tokens there (BF16, or E4M3 with a scale for 128 channels), results home (BF16,
summed without weights), and their gradients the other way. Gradients of routing weights come home beside those of
tokens.

DeepEP exchanges its own counts. It does not exchange whether a router has gone wrong or stands in another layer, which
would hang its kernels: that is announced, four bytes a rank, so that all ranks raise, as with the other dispatchers.
The host waits twice in a plan: for the announcement, then for DeepEP's counts.

It has never met a GPU; see ``deep_ep_buffers`` for what is known and from where. What it sends is not in ``traffic``.
Legend: P expert-parallel ranks, N tokens of this rank, K experts per token, R received rows.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deepseek_kernels.formats import TILE
from deepseek_train.parallel.carry import Transfer, carry
from deepseek_train.parallel.expert.announce import Announcing, TokenRouting, check_headers, header
from deepseek_train.parallel.expert.deep_ep_buffers import Buffers, Rows
from deepseek_train.parallel.expert.group import ExpertGroup
from deepseek_train.parallel.expert.journey import UNCHANGED, WireFormats
from deepseek_train.parallel.expert.plan import DispatchPlan, assign, on_host
from deepseek_train.parallel.expert.wire import WireFormat, dequantise, quantise
from deepseek_train.phases.parcel import Pending, Route, Tensors

_NARROW = TILE  # channels: its kernels copy in pieces of 32 bytes
_MANTISSA = 23  # bits of an FP32 number


@dataclass(frozen=True)
class DeepEp:
    """See ``Dispatcher``. ``buffers``: of all layers, for what follows one after the other on this group."""

    buffers: Buffers
    group: ExpertGroup
    formats: WireFormats = UNCHANGED

    def announce(
        self, routing: TokenRouting, num_experts: int, layer: int, capacity: int | None = None
    ) -> tuple[Tensor, Route]:
        """The fault and the layer alone: ``capacity`` is DeepEP's own matter."""
        return header(routing, num_experts, layer), Announcing(self.group)

    @torch.no_grad()
    def plan(self, told: Tensor, routing: TokenRouting, num_experts: int) -> DispatchPlan:
        (headers,) = on_host(told)
        check_headers(headers, num_experts)
        ids_NK = routing.expert_ids_NK.contiguous()
        weights_NK = routing.weights_NK.float().contiguous()
        first = self.buffers.first(numbered(self.group.rank, ids_NK), ids_NK, weights_NK, num_experts)
        order_R = torch.argsort(numbers(first.rows_RH))
        arrivals = assign(first.ids_RK[order_R], order_R, 0, first.rows_E)
        held = (first.weights_RK, *first.held)
        there = Way(self.buffers, first.handle, first.weights_RK, held, self.group, self.formats)
        return DispatchPlan(len(ids_NK), arrivals, there, replace(there, outward=False))


def numbered(rank: int, ids_NK: Tensor) -> Tensor:
    """Rows that say whose they are: BF16 in name, the first eight bytes are the source rank and the token."""
    rows_NH = ids_NK.new_zeros(len(ids_NK), _NARROW * torch.bfloat16.itemsize // ids_NK.itemsize)
    rows_NH[:, 0] = torch.arange(len(ids_NK), device=ids_NK.device) + (rank << 32)
    return rows_NH.view(torch.bfloat16)


def numbers(rows_RH: Tensor) -> Tensor:
    """By source rank, then token: [R]."""
    return rows_RH.view(torch.int64)[:, 0]


@dataclass(frozen=True)
class Way:
    """A route along a handle. The first tensor is of hidden vectors; a second one, of routing weights or their
    gradients. ``held``: what it reads on the stream for rows, not to be freed before that is done."""

    buffers: Buffers
    handle: Any
    weights_RK: Tensor
    held: tuple[Tensor, ...]
    group: ExpertGroup
    formats: WireFormats
    outward: bool = True

    def start(self, tensors: Tensors) -> Pending:
        transfer = self._to_experts(*tensors) if self.outward else self._home(*tensors)
        what = f"DeepEP's {'dispatch' if self.outward else 'combine'}, {self.group.me}"
        return carry(what, transfer, (*tensors, *self.held), self.group.rows_stream, self.group.where)

    def back(self) -> "Way":
        return replace(self, outward=not self.outward)

    def _to_experts(self, hidden: Tensor, *weights: Tensor) -> Transfer:
        """The weights are there since the plan was made."""
        yield from ()  # its legs are DeepEP's
        rows = self.buffers.again(encoded(hidden, self.formats), self.handle)
        return (decoded(rows, hidden.dtype), *(self.weights_RK.to(w.dtype, copy=True) for w in weights))

    def _home(self, hidden: Tensor, *weights: Tensor) -> Transfer:
        yield from ()  # its legs are DeepEP's
        wide = weights[0].float().contiguous() if weights else None
        y_NH, sums_NK = self.buffers.home(hidden.to(torch.bfloat16).contiguous(), wide, self.handle)
        if sums_NK is None:
            return (y_NH.to(hidden.dtype),)
        return y_NH.to(hidden.dtype), sums_NK.to(weights[0].dtype)


def encoded(hidden: Tensor, formats: WireFormats) -> Rows:
    """Powers of two as FP32 numbers, where ``wire`` has their exponents."""
    if formats.dispatch is not WireFormat.FP8:
        return hidden.to(torch.bfloat16).contiguous()
    values, exponents = quantise(hidden, formats.backend)
    return values.contiguous(), (exponents.to(torch.int32) << _MANTISSA).view(torch.float32)


def decoded(rows: Rows, dtype: torch.dtype) -> Tensor:
    if isinstance(rows, Tensor):
        return rows.to(dtype)
    values, scales = rows
    return dequantise(values, (scales.contiguous().view(torch.int32) >> _MANTISSA).to(torch.uint8), dtype)
