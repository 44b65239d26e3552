"""Before tokens travel, every rank of the group tells the others what its router has decided.

One message of two bytes an expert id: with it each rank works out alone how many rows will come from where and in
what order, which tokens it has to hand on, and for which experts. Nothing else is exchanged about a dispatch, its
combine and both their backwards, and the host waits for the device once.

Legend: P expert-parallel ranks, C tokens a rank may have at most, K experts per token, M numbers in a message.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from deepseek_train.parallel.carry import Transfer, carry
from deepseek_train.parallel.exchange import gather
from deepseek_train.parallel.expert.group import Among, ExpertGroup
from deepseek_train.phases.parcel import Pending, Stay, Tensors
from deepseek_train.spec.links import Purpose

_HEADER = 2  # layer, fault
_NONE = -1  # expert id of a token that is not there
_NOT_FINITE, _OUT_OF_RANGE = 1, 2


class RoutingFault(ValueError):
    """A router has decided what cannot be followed; every rank of the expert group raises it."""


@dataclass(frozen=True)
class TokenRouting:
    """The router's decision: which experts, with which weights (differentiable)."""

    expert_ids_NK: Tensor
    weights_NK: Tensor


@torch.no_grad()
def header(routing: TokenRouting, num_experts: int, layer: int) -> Tensor:
    """The layer, and what is wrong with this rank's decision: int16 [2]."""
    ids_NK, weights_NK = routing.expert_ids_NK, routing.weights_NK
    told = ids_NK.new_full((_HEADER,), layer, dtype=torch.int16)
    strange = ((ids_NK < 0) | (ids_NK >= num_experts)).any()
    told[1] = torch.where(weights_NK.isfinite().all(), strange * _OUT_OF_RANGE, _NOT_FINITE)
    return told


@torch.no_grad()
def message(routing: TokenRouting, num_experts: int, layer: int, capacity: int) -> Tensor:
    """What this rank has to tell, int16 [M]. ``capacity`` is the same on all ranks."""
    num_tokens, top_k = routing.expert_ids_NK.shape
    told = routing.expert_ids_NK.new_full((_HEADER + capacity * top_k,), _NONE, dtype=torch.int16)
    told[:_HEADER] = header(routing, num_experts, layer)
    told[_HEADER:].view(capacity, top_k)[:num_tokens] = routing.expert_ids_NK
    return told


@dataclass(frozen=True)
class Announcing:
    """The route of messages: what arrives are those of all ranks, [P, M], by rank. Through nodes in two hops: each
    message crosses to another node once, where many networks pass it on in a ring of all ranks."""

    group: ExpertGroup

    def start(self, tensors: Tensors) -> Pending:
        what = f"routers' decisions, {self.group.me}"
        return carry(what, self._gathered(tensors), tensors, self.group.plans_stream, self.group.where)

    def back(self) -> Stay:
        return Stay()  # decisions have no gradient

    def _gathered(self, tensors: Tensors) -> Transfer:
        (mine,) = tensors
        lane = self.group.forward
        told = mine.view(torch.uint8)  # gloo gathers no int16
        if Among.NODES in lane:
            of_nodes = yield from gather(told, lane[Among.NODES], Purpose.PLAN)
            of_places = yield from gather(of_nodes, lane[Among.NODE], Purpose.PLAN)
            all_told = of_places.transpose(0, 1).flatten(0, 1)
        else:
            all_told = yield from gather(told, lane[Among.ALL], Purpose.PLAN)
        return (all_told.contiguous().view(torch.int16),)


@dataclass(frozen=True)
class Told:
    """Messages of all ranks."""

    header_P2: Tensor
    ids_PCK: Tensor  # int64; -1 where there is no token

    @staticmethod
    def of(messages_PM: Tensor, top_k: int) -> "Told":
        ids_PCK = messages_PM[:, _HEADER:].unflatten(1, (-1, top_k)).long()
        return Told(messages_PM[:, :_HEADER].long(), ids_PCK)


def check_headers(header: list[int], num_experts: int) -> None:
    """Raises RoutingFault, the same on all ranks. ``header``: layer and fault of every rank, flat."""
    layers, faults = header[::2], header[1::2]
    if len(set(layers)) > 1:
        where = ", ".join(f"rank {rank}: layer {layer}" for rank, layer in enumerate(layers))
        raise RoutingFault(
            f"the ranks of an expert group are not in the same layer ({where}): their schedules or models differ"
        )
    for fault, what, mend in (
        (
            _NOT_FINITE,
            "router weights are not finite (NaN or Inf)",
            "A weight or an activation has overflowed: go on from the last checkpoint with a lower learning rate, or "
            "look at the data of this step.",
        ),
        (_OUT_OF_RANGE, f"expert ids are outside 0..{num_experts - 1}", "The router is broken."),
    ):
        ranks = [rank for rank, found in enumerate(faults) if found == fault]
        if ranks:
            of = ", ".join(map(str, ranks))
            raise RoutingFault(f"layer {layers[0]}, expert-parallel rank {of}: {what}. {mend}")
