"""A stand-in for DeepEP on CPUs, over gloo: what is documented and no more, strict about what it demands.

``Buffer`` is of the first generation, ``ElasticBuffer`` of the second; names and defaults are theirs. Kept: a token
goes once to each rank; ids of local experts with -1; opaque handles; cached dispatches, without ids and weights;
combines that sum without weights, in FP32, rounded once. Made useless, because nobody may rely on it: the order of rows
(a race in the second generation, here reversed) and weights of experts elsewhere (there NaN).

Legend: N tokens, P ranks, K experts per token, R received rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

Rows = Tensor | tuple[Tensor, Tensor]
INT4 = 16  # bytes that a kernel copies at once


class Misuse(AssertionError):
    """What DeepEP's own assertions would stop."""


def demand(that: bool, what: str) -> None:
    if not that:
        raise Misuse(what)


@dataclass(frozen=True)
class Event:
    """Everything is over when it is made."""

    def current_stream_wait(self) -> None: ...


@dataclass(frozen=True)
class Sent:
    """Which tokens went where: the numbers behind a handle. ``token_S``: by target rank, then token."""

    num_tokens: int
    token_S: Tensor
    send: list[int]
    receive: list[int]
    order_R: (
        Tensor  # row i of what is handed out is row order[i] of what has come, by source rank, then token
    )


class _Exchange:
    """What both generations share."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.size = group, group.rank(), group.size()

    def sent(self, in_rank_NP: Tensor, reverse: bool) -> Sent:
        send = in_rank_NP.sum(0)
        receive = torch.empty_like(send)
        dist.all_to_all_single(receive, send, group=self.group)
        token_S = in_rank_NP.t().nonzero()[:, 1]
        order = torch.arange(int(receive.sum()))
        return Sent(
            len(in_rank_NP), token_S, send.tolist(), receive.tolist(), order.flip(0) if reverse else order
        )

    def there(self, rows: Tensor, sent: Sent) -> Tensor:
        demand(len(rows) == sent.num_tokens, "as many rows as the handle has tokens")
        return self._moved(rows[sent.token_S], sent.send, sent.receive)[sent.order_R]

    def rows(self, x: Rows, sent: Sent) -> Rows:
        return (
            self.there(x, sent) if isinstance(x, Tensor) else (self.there(x[0], sent), self.there(x[1], sent))
        )

    def home(self, rows: Tensor, sent: Sent) -> Tensor:
        """FP32 sums."""
        demand(len(rows) == len(sent.order_R), "as many rows as the handle's dispatch has received")
        by_source = torch.empty_like(rows)
        by_source[sent.order_R] = rows
        back = self._moved(by_source, sent.receive, sent.send)
        return torch.zeros(sent.num_tokens, rows.shape[1]).index_add_(0, sent.token_S, back.float())

    def local(self, ids_RK: Tensor, num_experts: int) -> Tensor:
        here = num_experts // self.size
        local = ids_RK - self.rank * here
        return torch.where((local >= 0) & (local < here), local, -1)

    def in_rank(self, ids_NK: Tensor, num_experts: int) -> Tensor:
        demand(ids_NK.dtype == torch.int64 and ids_NK.is_contiguous(), "topk_idx: int64, contiguous")
        demand(num_experts % self.size == 0, "experts divide among ranks")
        demand(bool(((ids_NK >= -1) & (ids_NK < num_experts)).all()), "experts that are there")
        targets = torch.where(ids_NK < 0, self.size, ids_NK // (num_experts // self.size))
        return torch.zeros(len(ids_NK), self.size + 1, dtype=torch.bool).scatter_(1, targets, True)[:, :-1]

    def _moved(self, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        bytes_SB = rows.contiguous().view(torch.uint8)
        into = bytes_SB.new_empty(sum(receive), bytes_SB.shape[1])
        dist.all_to_all_single(into, bytes_SB, receive, send, group=self.group)
        return into.view(rows.dtype)


def check_rows(x: Rows) -> None:
    hidden = x if isinstance(x, Tensor) else x[0]
    demand(hidden.dim() == 2 and hidden.is_contiguous(), "x: two dimensions, contiguous")
    demand(hidden.shape[1] * hidden.itemsize % (2 * INT4) == 0, "x: rows of 32 bytes")
    if isinstance(x, Tensor):
        demand(x.dtype == torch.bfloat16, "x: BF16")
        return
    values, scales = x
    demand(values.dtype == torch.float8_e4m3fn and scales.dtype == torch.float32, "x: E4M3 and FP32")
    demand(scales.shape == (len(values), values.shape[1] // 128), "x: a scale for 128 channels")


def check_combined(x: Tensor, weights_RK: Tensor | None) -> None:
    demand(isinstance(x, Tensor), "combine: x is one tensor")
    check_rows(x)
    if weights_RK is not None:
        demand(weights_RK.dtype == torch.float32 and weights_RK.is_contiguous(), "topk_weights: FP32")
        demand(len(weights_RK) == len(x), "topk_weights: one row for each of x")


@dataclass(frozen=True)
class Config:
    """Of a kind of transfer; here one row is room enough."""

    factor: int

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return self.factor * hidden_bytes * num_ranks

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return 0 * self.factor * hidden_bytes * num_ranks


class Buffer(_Exchange):
    """``deep_ep.Buffer``: ``get_dispatch_layout`` first, a handle of tensors."""

    def __init__(self, group: dist.ProcessGroup, num_nvl_bytes: int = 0, num_rdma_bytes: int = 0) -> None:
        super().__init__(group)
        demand(num_rdma_bytes == 0, "no RDMA on one node")
        self.num_nvl_bytes = num_nvl_bytes

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        demand(num_ranks in (2, 4, 8), f"Unsupported number of EP ranks: {num_ranks}")
        return Config(1)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        demand(num_ranks in (2, 4, 8), f"Unsupported number of EP ranks: {num_ranks}")
        return Config(2)

    def get_dispatch_layout(
        self, topk_idx: Tensor, num_experts: int
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Event]:
        in_rank_NP = self.in_rank(topk_idx, num_experts)
        chosen = topk_idx[topk_idx >= 0]
        to_expert = torch.bincount(chosen, minlength=num_experts).int()
        return in_rank_NP.sum(0).int(), None, to_expert, in_rank_NP, Event()

    def dispatch(
        self,
        x: Rows,
        handle: tuple[Tensor, ...] | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
    ) -> tuple[Rows, Tensor | None, Tensor | None, list[int] | None, tuple[Tensor, ...] | None, Event]:
        check_rows(x)
        if handle is not None:
            demand(topk_idx is None and topk_weights is None, "topk_idx and topk_weights with a handle")
            return self.rows(x, _opened(handle)), None, None, None, None, Event()
        assert is_token_in_rank is not None
        assert topk_idx is not None
        assert topk_weights is not None
        assert num_tokens_per_rank is not None
        assert num_tokens_per_expert is not None
        demand(num_tokens_per_rank.dtype == num_tokens_per_expert.dtype == torch.int32, "counts: int32")
        demand(topk_weights.dtype == torch.float32 and topk_weights.is_contiguous(), "topk_weights: FP32")
        demand(topk_weights.shape == topk_idx.shape, "as many weights as ids")
        sent = self.sent(is_token_in_rank, reverse=False)
        demand(sent.send == num_tokens_per_rank.tolist(), "num_tokens_per_rank is of these tokens")
        ids_RK = self.local(self.there(topk_idx, sent), len(num_tokens_per_expert))
        weights_RK = self.there(topk_weights, sent).masked_fill(ids_RK < 0, 0.0)
        here = len(num_tokens_per_expert) // self.size
        counts = torch.bincount(ids_RK[ids_RK >= 0], minlength=here).tolist()
        return self.rows(x, sent), ids_RK, weights_RK, counts, _closed(sent), Event()

    def combine(
        self, x: Tensor, handle: tuple[Tensor, ...], topk_weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Event]:
        check_combined(x, topk_weights)
        demand(2 * self.size * x[:1].nbytes <= self.num_nvl_bytes, "rows that fit the buffer")
        sent = _opened(handle)
        sums_NK = None if topk_weights is None else self.home(topk_weights, sent)
        return self.home(x, sent).bfloat16(), sums_NK, Event()


def _closed(sent: Sent) -> tuple[Tensor, ...]:
    counts = torch.tensor([[sent.num_tokens, *sent.send], [sent.num_tokens, *sent.receive]])
    return counts, sent.token_S, sent.order_R


def _opened(handle: Sequence[Tensor]) -> Sent:
    counts, token_S, order_R = handle
    (num_tokens, *send), (_, *receive) = counts.tolist()
    return Sent(num_tokens, token_S, send, receive, order_R)


@dataclass(frozen=True)
class EPHandle:
    """What of it is documented, and the double's own."""

    num_sms: int
    num_experts: int
    num_recv_tokens_per_expert_list: list[int]
    topk_idx: Tensor
    sent: Sent


class ElasticBuffer(_Exchange):
    """``deep_ep.ElasticBuffer``: its size set once, layout its own affair, a handle that is an object."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        num_max_tokens_per_rank: int,
        hidden: int,
        num_topk: int,
        use_fp8_dispatch: bool = False,
        allow_hybrid_mode: bool = True,
    ) -> None:
        super().__init__(group)
        demand(
            not allow_hybrid_mode,
            "hybrid mode: handles of one width of rows alone, which this double has not",
        )
        self.most, self.hidden, self.top_k, self.fp8 = (
            num_max_tokens_per_rank,
            hidden,
            num_topk,
            use_fp8_dispatch,
        )

    def dispatch(
        self,
        x: Rows,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        num_experts: int | None = None,
        num_sms: int = 0,
        handle: EPHandle | None = None,
    ) -> tuple[Rows, Tensor, Tensor | None, EPHandle, Event]:
        check_rows(x)
        hidden = x if isinstance(x, Tensor) else x[0]
        demand(len(hidden) <= self.most and hidden.shape[1] <= self.hidden, "rows that fit the buffer")
        demand(isinstance(x, Tensor) or self.fp8, "FP8 in a buffer made for it")
        if num_sms == 0 and num_experts is None:
            raise TypeError(
                "unsupported operand type(s) for %: 'NoneType' and 'int'"
            )  # DeepEP's, word for word
        if handle is None:
            assert topk_idx is not None
            assert topk_weights is not None
            assert num_experts is not None
            demand(topk_weights.dtype == torch.float32 and topk_weights.is_contiguous(), "topk_weights: FP32")
            demand(topk_idx.shape[1] <= self.top_k, "experts per token that fit the buffer")
            sent = self.sent(self.in_rank(topk_idx, num_experts), reverse=True)
            ids_RK = self.local(self.there(topk_idx, sent), num_experts)
            counts = torch.bincount(ids_RK[ids_RK >= 0], minlength=num_experts // self.size).tolist()
            made = EPHandle(num_sms or 4, num_experts, counts, topk_idx.clone(), sent)
            weights_RK = self.there(topk_weights, sent).masked_fill(ids_RK < 0, float("nan"))
            return self.rows(x, sent), ids_RK, weights_RK, made, Event()
        demand(topk_idx is None, "topk_idx with a handle")
        ids_RK = self.local(self.there(handle.topk_idx, handle.sent), handle.num_experts)
        return self.rows(x, handle.sent), ids_RK, None, handle, Event()

    def combine(
        self, x: Tensor, handle: EPHandle, topk_weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Event]:
        check_combined(x, topk_weights)
        demand(x.shape[1] <= self.hidden, "rows that fit the buffer")
        sums_NK = None if topk_weights is None else self.home(topk_weights, handle.sent)
        return self.home(x, handle.sent).bfloat16(), sums_NK, Event()
