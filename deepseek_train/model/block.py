"""One transformer block as its phases: attend -> dispatch -> experts -> combine, or attend -> feed forward.

Before a dispatch, what the routers have decided is exchanged (``announce``) and made a plan of; the shared expert
computes while tokens travel to the routed ones.

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
from deepseek_train.model.values import Attended, Sent
from deepseek_train.parallel.expert.local import Dispatched
from deepseek_train.parallel.expert.plan import DispatchPlan, count_local
from deepseek_train.phases.parcel import Parcel
from deepseek_train.phases.phase import Move, Phase, Row
from deepseek_train.phases.values import Hidden, LayerLoad
from deepseek_train.schedule.overlap import Role


class _Attention(nn.Module):
    """The half that both kinds of block share: x + MLA(norm(x)), and the norm before the FFN."""

    def __init__(self, context: ModelContext, turns_TR2: Tensor) -> None:
        super().__init__()
        self.m, self.context, self.turns_TR2 = context.model, context, turns_TR2
        self.attention_norm = context.weight(self.m.hidden_size)
        self.attention = LatentAttention(context)
        self.ffn_norm = context.weight(self.m.hidden_size)

    def attended(self, x_BTD: Tensor) -> Tensor:
        normed = forgettable_norm(x_BTD, self.attention_norm, self.context)
        return x_BTD + self.attention(normed, self.turns_TR2[: x_BTD.shape[1]])

    def ffn_input(self, x_BTD: Tensor) -> Tensor:
        return forgettable_norm(x_BTD, self.ffn_norm, self.context)


class DenseBlock(_Attention):
    """A leading layer with a dense FFN."""

    def __init__(self, context: ModelContext, turns_TR2: Tensor) -> None:
        super().__init__(context, turns_TR2)
        self.ffn = FeedForward(context, self.m.dense_ffn_size)

    def phases(self) -> Row:
        whole = self.context.recompute.of_blocks
        return (
            Phase("attend", Role.ATTEND, self.attend, whole),
            Phase("feed_forward", Role.EXPERTS, self.feed_forward, whole),
        )

    def after_attention(self) -> Row:
        """``phases`` for who attends in another way: from the residual stream after attention."""
        return (Phase("feed_forward", Role.EXPERTS, self.feed_forward),)

    def attend(self, hidden: Hidden) -> Hidden:
        return hidden.moved_to(self.attended(hidden.x_BTD))

    def feed_forward(self, hidden: Hidden) -> Hidden:
        return hidden.moved_to(hidden.x_BTD + self.ffn(self.ffn_input(hidden.x_BTD)))


class MoeBlock(_Attention):
    """A layer with routed and shared experts. ``index`` names it in the load statistics."""

    def __init__(self, context: ModelContext, index: int, turns_TR2: Tensor) -> None:
        super().__init__(context, turns_TR2)
        self.index, self.dispatcher = index, context.dispatcher
        self.router = Router(context)
        inner = self.m.num_shared_experts * self.m.expert_ffn_size
        self.shared = FeedForward(context, inner, expert=True) if inner else None
        self.experts = Experts(context)
        self.balance_loss = torch.compile(balance_loss) if context.compiled else balance_loss

    def phases(self) -> Row:
        attend = Phase("attend", Role.ATTEND, self.attend, self.context.recompute.of_blocks)
        return (attend, *self._after_routing())

    def after_attention(self) -> Row:
        """``phases`` for who attends in another way: from the residual stream after attention."""
        return (Phase("route", Role.ATTEND, self.route), *self._after_routing())

    def _after_routing(self) -> Row:
        whole = self.context.recompute.of_blocks
        shared = Phase("shared", Role.EXPERTS, self.share, whole) if self.shared is not None else None
        return (
            Move("announce", Role.ATTEND),
            Phase("plan", Role.DISPATCH, self.plan),
            Move("dispatch", Role.DISPATCH, shared),
            Phase("experts", Role.EXPERTS, self.compute, whole),
            Move("combine", Role.COMBINE),
            Phase("add", Role.COMBINE, self.add),
        )

    def attend(self, hidden: Hidden) -> Parcel:
        return self.route(hidden.moved_to(self.attended(hidden.x_BTD)))

    def route(self, hidden: Hidden) -> Parcel:
        """From after attention to what the other ranks are told about this one's routing."""
        normed_BTD = self.ffn_input(hidden.x_BTD)
        scores_BTE = self.router(normed_BTD)
        routing = self.router.route(scores_BTE)
        tokens_E = count_local(routing.expert_ids_NK, 0, self.m.num_routed_experts)
        loss = self.balance_loss(scores_BTE, self.m.experts_per_token)
        before = hidden.ledger
        ledger = replace(
            before,
            balance=loss if before.balance is None else before.balance + loss,
            loads=(*before.loads, LayerLoad(self.index, tokens_E)),
        )
        told, route = self.dispatcher.announce(routing, self.m.num_routed_experts, self.index)
        return Parcel(Attended(replace(hidden, ledger=ledger), normed_BTD, routing), (told,), route)

    def plan(self, announced: Parcel) -> Parcel:
        a, (told,) = announced.stays, announced.moves
        plan = self.dispatcher.plan(told, a.routing, self.m.num_routed_experts)
        rows = a.normed_BTD.flatten(0, 1), a.routing.weights_NK
        return Parcel(
            Sent(a.hidden, a.normed_BTD if self.shared is not None else None, plan), rows, plan.there
        )

    def share(self, sent: Sent) -> Sent:
        """The shared expert, while tokens travel to the others."""
        assert self.shared is not None
        x_BTD = sent.hidden.x_BTD + self.shared(sent.normed_BTD)
        return Sent(sent.hidden.moved_to(x_BTD), None, sent.plan)

    def compute(self, sent: Parcel) -> Parcel:
        x_RD, weights_RK = sent.moves
        plan: DispatchPlan = sent.stays.plan
        y_RD = self.experts(Dispatched(x_RD, weights_RK, plan.arrivals))
        return Parcel(sent.stays.hidden, (y_RD,), plan.home)

    def add(self, computed: Parcel) -> Hidden:
        hidden, (y_ND,) = computed.stays, computed.moves
        return hidden.moved_to(hidden.x_BTD + y_ND.view_as(hidden.x_BTD))
