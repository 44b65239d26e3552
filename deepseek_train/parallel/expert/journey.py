"""The way of tokens to their experts in hops, and the way of results home: one is the transpose of the other.

Outward, every hop copies held rows to the ranks that need them. Homeward, every hop brings the copies back, and the
copies of a row are summed, in FP32 (FP64 for FP64 rows) and, on CPUs, in a set order. So the gradient of a dispatch is
a combine, and the other way round: dispatches carry FP8 if so asked, combines BF16 (V3 report section 3.2.2).

Legend: S sent rows, R received rows.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deepseek_train.parallel.carry import Transfer, carry
from deepseek_train.parallel.exchange import exchange
from deepseek_train.parallel.expert.group import Among, ExpertGroup
from deepseek_train.parallel.expert.wire import WireFormat, decode, encode, fields_of
from deepseek_train.phases.parcel import Pending, Tensors
from deepseek_train.spec.links import Purpose


@dataclass(frozen=True)
class Sum:
    """Row i is added to sum ``rows_to_sums[i]``, rows in order."""

    rows_to_sums: Tensor
    num_sums: int


@dataclass(frozen=True)
class Hop:
    """One all-to-all. ``taken_S``: which held row each sent row copies; ``sums``: one after the other, homeward."""

    among: Among
    taken_S: Tensor
    sums: tuple[Sum, ...]
    send: list[int]  # rows to each peer, outward
    receive: list[int]


@dataclass(frozen=True)
class WireFormats:
    """Of hidden vectors, outward and homeward."""

    dispatch: WireFormat = WireFormat.SAME
    combine: WireFormat = WireFormat.SAME
    backend: str = "reference"  # who quantises


UNCHANGED = WireFormats()


@dataclass(frozen=True)
class Journey:
    """A route. ``remote_pairs``: (token of this rank, other node that it needs): no dispatcher can send less."""

    hops: tuple[Hop, ...]
    group: ExpertGroup
    formats: WireFormats
    remote_pairs: int
    outward: bool = True
    forward: bool = True  # pass: it decides about the process groups

    def start(self, tensors: Tensors) -> Pending:
        transfer = self._to_experts(tensors) if self.outward else self._home(tensors)
        way = "dispatch to experts" if self.outward else "combine of experts' results"
        if not self.forward:
            way = "gradients' way to experts" if self.outward else "gradients' way from experts"
        maps = [m for hop in self.hops for m in (hop.taken_S, *(s.rows_to_sums for s in hop.sums))]
        return carry(
            f"{way}, {self.group.me}", transfer, (*tensors, *maps), self.group.rows_stream, self.group.where
        )

    def home(self) -> "Journey":
        """The way of results, in the same pass."""
        return replace(self, outward=not self.outward)

    def back(self) -> "Journey":
        """The way of gradients."""
        return replace(self, outward=not self.outward, forward=not self.forward)

    def _to_experts(self, tensors: Tensors) -> Transfer:
        fields, lane = fields_of(tensors), self.group.lane(self.forward)
        rows = encode(tensors, self.formats.dispatch, self.formats.backend)
        self._note_least(rows)
        for hop in self.hops:
            taken = rows.index_select(0, hop.taken_S)
            rows = yield from exchange(taken, hop.send, hop.receive, lane[hop.among], Purpose.DISPATCH)
        return decode(rows, fields, self.formats.dispatch)

    def _home(self, tensors: Tensors) -> Transfer:
        fields, lane = fields_of(tensors), self.group.lane(self.forward)
        for number, hop in enumerate(reversed(self.hops)):
            rows = encode(tensors, self.formats.combine)
            if number == 0:
                self._note_least(rows)
            rows = yield from exchange(rows, hop.receive, hop.send, lane[hop.among], Purpose.COMBINE)
            tensors = tuple(summed(t, hop.sums) for t in decode(rows, fields, self.formats.combine))
        return tensors

    def _note_least(self, rows: Tensor) -> None:
        row_bytes = rows.shape[1] * rows.itemsize
        self.group.traffic.add_least_cross(self.remote_pairs * row_bytes)


def summed(rows: Tensor, sums: tuple[Sum, ...]) -> Tensor:
    """Sums of sums of rows, rounded once."""
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    for one in sums:
        into = wide.new_zeros(one.num_sums, rows.shape[1])
        wide = into.index_add_(0, one.rows_to_sums, wide)
    return wide.to(rows.dtype)
