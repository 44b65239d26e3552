"""DeepEP, DeepSeek's library for expert parallelism, behind three calls; and why it cannot be used, where it cannot.

Two generations of it are in use. The first has ``Buffer`` (1.x; 2.0 and 2.1 keep it): NVLink in a node, RDMA between
equal places of nodes, NVSHMEM below. The second has ``ElasticBuffer`` (2.0, 2.1), which 2.5 calls ``EPBuffer``: NCCL
below. Whichever can be imported is used, the second before the first.

Written from their documentation and sources (github.com/deepseek-ai/DeepEP: README.md, docs/legacy.md,
deep_ep/buffer.py, deep_ep/buffers/{legacy,elastic,ep}.py, csrc/deep_ep.cpp, csrc/elastic/buffer.hpp and its tests).
**It has met neither a GPU nor the library**: tests run it on a double that keeps to what is documented.

Everything is called in the synchronous way: DeepEP's own stream waits for the current one, which then waits for it.
The current one is our stream for rows (``carry``), so that the host never waits, but for the counts of ``first``.

Legend: N tokens, K experts per token, H channels, R received rows.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

# Built from source, with CUDA. Whatever goes wrong there is the reason why it cannot be used, and concerns nobody else.
_UNUSABLE = (ImportError, AssertionError, OSError, RuntimeError)
IMPORT_ERROR: str | None = None
try:
    from deep_ep import ElasticBuffer
except _UNUSABLE:
    try:
        from deep_ep import EPBuffer as ElasticBuffer
    except _UNUSABLE:
        ElasticBuffer = None
try:
    from deep_ep import Buffer
except _UNUSABLE as error:
    Buffer, IMPORT_ERROR = None, str(error)
GENERATION = 2 if ElasticBuffer is not None else 1 if Buffer is not None else None

Rows = Tensor | tuple[Tensor, Tensor]  # BF16 [N, H], or E4M3 [N, H] with FP32 scales [N, H / 128]


@dataclass(frozen=True)
class First:
    """What the first dispatch of a routing has brought. ``ids_RK``: of local experts, -1 for those elsewhere;
    ``rows_E``: how often each local expert was chosen; ``held``: the tensors inside ``handle``."""

    rows_RH: Tensor
    ids_RK: Tensor
    weights_RK: Tensor
    rows_E: list[int]
    handle: Any
    held: tuple[Tensor, ...]


class Buffers(Protocol):
    """Collective calls, in the same order on all ranks of a group."""

    def first(self, rows_NH: Tensor, ids_NK: Tensor, weights_NK: Tensor, num_experts: int) -> First:
        """BF16 rows, int64 ids and FP32 weights to the ranks of their experts. The host waits for the counts."""

    def again(self, rows: Rows, handle: Any) -> Rows:
        """Other rows, of any width, the same way and into the same order."""

    def home(self, rows_RH: Tensor, weights_RK: Tensor | None, handle: Any) -> tuple[Tensor, Tensor | None]:
        """BF16 rows, and FP32 weights if there are, back to where they came from: sums over the ranks they were on."""


@dataclass(frozen=True)
class FirstGeneration:
    """Over a ``deep_ep.Buffer``. Rows arrive by source rank, then token."""

    buffer: Any

    def first(self, rows_NH: Tensor, ids_NK: Tensor, weights_NK: Tensor, num_experts: int) -> First:
        to_rank, to_node, to_expert, in_rank, _ = self.buffer.get_dispatch_layout(ids_NK, num_experts)
        rows, ids, weights, rows_E, handle, _ = self.buffer.dispatch(
            rows_NH,
            topk_idx=ids_NK,
            topk_weights=weights_NK,
            num_tokens_per_rank=to_rank,
            num_tokens_per_rdma_rank=to_node,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=to_expert,
        )
        return First(rows, ids, weights, rows_E, handle, _tensors(handle))

    def again(self, rows: Rows, handle: Any) -> Rows:
        received: Rows = self.buffer.dispatch(rows, handle=handle)[0]
        return received

    def home(self, rows_RH: Tensor, weights_RK: Tensor | None, handle: Any) -> tuple[Tensor, Tensor | None]:
        rows, weights, _ = self.buffer.combine(rows_RH, handle, topk_weights=weights_RK)
        return rows, weights


@dataclass(frozen=True)
class SecondGeneration:
    """Over a ``deep_ep.ElasticBuffer`` or ``EPBuffer`` that is not hybrid. Rows arrive in the order of a race, which
    the handle keeps."""

    buffer: Any

    def first(self, rows_NH: Tensor, ids_NK: Tensor, weights_NK: Tensor, num_experts: int) -> First:
        rows, ids, weights, handle, _ = self.buffer.dispatch(
            rows_NH, topk_idx=ids_NK, topk_weights=weights_NK, num_experts=num_experts
        )
        counts = handle.num_recv_tokens_per_expert_list
        return First(rows, ids, weights, counts, handle, _tensors(vars(handle).values()))

    def again(self, rows: Rows, handle: Any) -> Rows:
        # Without num_sms it works one out before it has looked at the handle, and fails (DeepEP pull request 685).
        received: Rows = self.buffer.dispatch(rows, handle=handle, num_sms=handle.num_sms)[0]
        return received

    def home(self, rows_RH: Tensor, weights_RK: Tensor | None, handle: Any) -> tuple[Tensor, Tensor | None]:
        rows, weights, _ = self.buffer.combine(rows_RH, handle, topk_weights=weights_RK)
        return rows, weights


def _tensors(values: Any) -> tuple[Tensor, ...]:
    return tuple(v for v in values if isinstance(v, Tensor))


def make_buffers(
    group: dist.ProcessGroup,
    *,
    hidden_size: int,
    tokens: int,
    experts_per_token: int,
    fp8: bool,
    device: torch.device,
    first: Any = Buffer,
    second: Any = ElasticBuffer,
) -> Buffers:
    """The buffers of a run (collective). ``group``: NCCL's, of the expert-parallel ranks, which nothing else uses;
    ``tokens``: the most that a rank sends at once; ``first``, ``second``: DeepEP's classes, None for what cannot be
    imported."""
    if second is not None:
        # It takes over NCCL's communicator, which the first collective makes (DeepEP issue 726: a crash without).
        dist.all_reduce(torch.zeros(1, device=device), group=group)
        # Hybrid mode (RDMA to a node, NVLink inside) would cut rows into a number of channels that follows from their
        # width, and refuse a handle of narrow rows for wide ones.
        return SecondGeneration(
            second(
                group,
                num_max_tokens_per_rank=tokens,
                hidden=hidden_size,
                num_topk=experts_per_token,
                use_fp8_dispatch=fp8,
                allow_hybrid_mode=False,
            )
        )
    row_bytes, size = hidden_size * torch.bfloat16.itemsize, group.size()
    configs = (first.get_dispatch_config(size), first.get_combine_config(size))
    nvlink = max(config.get_nvl_buffer_size_hint(row_bytes, size) for config in configs)
    rdma = max(config.get_rdma_buffer_size_hint(row_bytes, size) for config in configs)
    return FirstGeneration(first(group, nvlink, rdma))
