"""One transformer block as its phases: attend -> dispatch -> experts -> combine, or attend -> feed forward.

On either side of an exchange stands its local end: ``pack`` picks the rows to send, ``unpack`` sums those that
came back.

Legend: B sequences, T positions, D hidden, R rope pairs.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from deepseek_train.model.context import ModelContext
from deepseek_train.model.experts import Experts
from deepseek_train.model.mla import LatentAttention
from deepseek_train.model.norm import forgettable_norm
from deepseek_train.model.router import Router, balance_loss
from deepseek_train.model.swiglu import FeedForward
from deepseek_train.model.values import Attended, Computed, Sent
from deepseek_train.parallel.expert.flat import Dispatched, pack, route, unpack
from deepseek_train.parallel.expert.plan import make_plan
from deepseek_train.phases.parcel import Parcel
from deepseek_train.phases.phase import Move, Phase, Row
from deepseek_train.phases.values import Hidden, LayerLoad
from deepseek_train.schedule.overlap import Role


class _Attention(nn.Module):
    """The half that both kinds of block share: x + MLA(norm(x)), and the norm before the FFN."""

    def __init__(self, context: ModelContext, turns_TR: Tensor) -> None:
        super().__init__()
        self.m, self.context, self.turns_TR = context.model, context, turns_TR
        self.attention_norm = context.weight(self.m.hidden_size)
        self.attention = LatentAttention(context)
        self.ffn_norm = context.weight(self.m.hidden_size)

    def attended(self, x_BTD: Tensor) -> Tensor:
        normed = forgettable_norm(x_BTD, self.attention_norm, self.context)
        return x_BTD + self.attention(normed, self.turns_TR[: x_BTD.shape[1]])

    def ffn_input(self, x_BTD: Tensor) -> Tensor:
        return forgettable_norm(x_BTD, self.ffn_norm, self.context)


class DenseBlock(_Attention):
    """A leading layer with a dense FFN."""

    def __init__(self, context: ModelContext, turns_TR: Tensor) -> None:
        super().__init__(context, turns_TR)
        self.ffn = FeedForward(context, self.m.dense_ffn_size)

    def phases(self) -> Row:
        whole = self.context.recompute.of_blocks
        return (
            Phase("attend", Role.ATTEND, self.attend, whole),
            Phase("feed_forward", Role.EXPERTS, self.feed_forward, whole),
        )

    def attend(self, hidden: Hidden) -> Hidden:
        return hidden.moved_to(self.attended(hidden.x_BTD))

    def feed_forward(self, hidden: Hidden) -> Hidden:
        return hidden.moved_to(hidden.x_BTD + self.ffn(self.ffn_input(hidden.x_BTD)))


class MoeBlock(_Attention):
    """A layer with routed and shared experts. ``index`` names it in the load statistics."""

    def __init__(self, context: ModelContext, index: int, turns_TR: Tensor) -> None:
        super().__init__(context, turns_TR)
        self.index, self.group = index, context.experts
        self.router = Router(context)
        inner = self.m.num_shared_experts * self.m.expert_ffn_size
        self.shared = FeedForward(context, inner) if inner else None
        self.experts = Experts(context)

    def phases(self) -> Row:
        whole = self.context.recompute.of_blocks
        return (
            Phase("attend", Role.ATTEND, self.attend, whole),
            Phase("pack", Role.DISPATCH, self.pack),
            Move("dispatch", Role.DISPATCH),
            Phase("experts", Role.EXPERTS, self.compute, whole),
            Move("combine", Role.COMBINE),
            Phase("unpack", Role.COMBINE, self.unpack),
        )

    def attend(self, hidden: Hidden) -> Attended:
        x_BTD = self.attended(hidden.x_BTD)
        normed_BTD = self.ffn_input(x_BTD)
        scores_BTE = self.router(normed_BTD)
        routing = self.router.route(scores_BTE)
        tokens_E = torch.bincount(routing.expert_ids_NK.flatten(), minlength=self.m.num_routed_experts)
        loss = balance_loss(scores_BTE, self.m.experts_per_token)
        before = hidden.ledger
        ledger = replace(
            before,
            balance=loss if before.balance is None else before.balance + loss,
            loads=(*before.loads, LayerLoad(self.index, tokens_E)),
        )
        return Attended(replace(hidden, x_BTD=x_BTD, ledger=ledger), normed_BTD, routing)

    def pack(self, a: Attended) -> Parcel:
        plan = make_plan(a.routing.expert_ids_NK, self.m.num_routed_experts, self.group)
        rows = pack(a.normed_BTD.flatten(0, 1), a.routing.weights_NK, plan, self.group)
        return Parcel(Sent(a.hidden, a.normed_BTD, plan), rows, route(plan, self.group))

    def compute(self, sent: Parcel) -> Parcel:
        hidden, plan = sent.stays.hidden, sent.stays.plan
        x_RD, weights_RK = sent.moves
        y_RD = self.experts(Dispatched(x_RD, weights_RK, plan))
        if self.shared is not None:
            hidden = hidden.moved_to(hidden.x_BTD + self.shared(sent.stays.normed_BTD))
        return Parcel(Computed(hidden, plan), (y_RD,), sent.route.back())

    def unpack(self, computed: Parcel) -> Hidden:
        hidden, (y_SD,) = computed.stays.hidden, computed.moves
        y_ND = unpack(y_SD, computed.stays.plan, self.group)
        return hidden.moved_to(hidden.x_BTD + y_ND.view_as(hidden.x_BTD))
