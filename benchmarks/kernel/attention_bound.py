"""Contests of attention at DeepSeek-V3's heads: 128 of 192 query and 128 value channels, one sequence of 4096
tokens."""

from collections.abc import Iterator
from functools import partial

import torch
from torch.nn import functional

from benchmarks.kernel.contest import Contest
from deepseek_kernels.attention import attention, attention_backward


def contests(device: torch.device, shrink: int) -> Iterator[Contest]:
    """``shrink`` divides all sizes, to rehearse."""
    length, heads = 4096 // shrink, max(1, 128 // shrink)
    q, k = (torch.randn(1, length, heads, 192, device=device).bfloat16() for _ in range(2))
    v, d_out = (torch.randn(1, length, heads, 128, device=device).bfloat16() for _ in range(2))
    pairs = heads * length * (length + 1) // 2
    forward_flops, backward_flops = 2 * pairs * (192 + 128), 2 * pairs * (3 * 192 + 2 * 128)
    names = ["torch", "triton"] if device.type == "cuda" else ["triton"]
    scale, shape = 192**-0.5, f"[1, {length}, {heads}, 192 / 128]"
    starts = (torch.arange(length, device=device) // max(1, length // 4) * (length // 4)).int()[None]

    def padded_sdpa() -> torch.Tensor:
        heads_first = (q.transpose(1, 2), k.transpose(1, 2), functional.pad(v, (0, 64)).transpose(1, 2))
        return functional.scaled_dot_product_attention(*heads_first, is_causal=True)[..., :128]

    forward = {name: partial(attention, q, k, v, scale, None, nope=128, backend=name) for name in names}
    forward["(SDPA as it comes, v padded)"] = padded_sdpa
    yield Contest("attention", shape, "bf16", forward_flops, forward)
    yield Contest(
        "attention, 4 documents",
        shape,
        "bf16",
        forward_flops // 4,
        {"triton": partial(attention, q, k, v, scale, starts, nope=128, backend="triton")},
    )
    out, lse = attention(q, k, v, scale, None, nope=128, backend="triton")
    backward = {
        name: partial(attention_backward, d_out, q, k, v, out, lse, scale, None, nope=128, backend=name)
        for name in names
    }
    yield Contest("attention_backward", shape, "bf16", backward_flops, backward)
