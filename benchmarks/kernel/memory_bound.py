"""Contests of ops that move bytes, at the sizes of DeepSeek-V3: 4096 tokens a rank, 32,768 rows of its experts.

Legend: M rows, D hidden 7168, F expert size 2048, V vocabulary 129,280.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.kernel.contest import Contest, there
from deepseek_kernels import loss, moe, norm, optim, quant, rope, swiglu

D, F, V = 7168, 2048, 129_280
TILE_BYTES = 4 / 128  # of scales, an element


def contests(device: torch.device, shrink: int) -> Iterator[Contest]:
    """``shrink`` divides all sizes, to rehearse."""
    tokens, rows = 4096 // shrink, 32768 // shrink
    d, f, v = D // min(shrink, 8), F // min(shrink, 8), V // shrink
    yield from _quantisation(device, tokens, rows, d, f)
    yield from _norm(device, tokens, d)
    yield from _swiglu(device, rows, f)
    yield from _moe(device, tokens, rows, d)
    yield from _rest(device, tokens, d, v)


def _bf16(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, device=device).bfloat16()


def _turning(op: Callable[..., object], *args: object) -> dict[str, Callable[[], object]]:
    return {name: partial(op, *args, pow2=True, backend=name) for name in there("cuda", "triton")}


def _quantisation(device: torch.device, tokens: int, rows: int, d: int, f: int) -> Iterator[Contest]:
    for m, k in ((tokens, d), (rows, d), (rows, f)):
        x, elements, shape = _bf16(device, m, k), m * k, f"[{m}, {k}]"
        values = quant.quantise_rows(x, pow2=True, backend="triton")
        one_way, fp8 = round(elements * (3 + TILE_BYTES)), 1 + TILE_BYTES
        ours = {"pow2": True, "backend": "triton"}
        yield Contest(
            "quantise_rows", shape, "memory", one_way, {"triton": partial(quant.quantise_rows, x, **ours)}
        )
        turn = {"triton": partial(quant.quantise_columns, x, **ours)}
        yield Contest("quantise_columns", shape, "memory", one_way, turn)
        both = round(elements * (2 + 2 * fp8))
        yield Contest("quantise_both", shape, "memory", both, _turning(quant.quantise_both, x))
        moved = round(elements * 2 * fp8)
        yield Contest(
            "requantise_columns", shape, "memory", moved, _turning(quant.requantise_columns, values)
        )
    x = _bf16(device, tokens, 2 * d)
    packed = quant.pack_e5m6(x, backend="triton")
    bytes_moved = round(x.numel() * (3.5 + TILE_BYTES))
    shape = f"[{tokens}, {2 * d}]"
    packing = {name: partial(quant.pack_e5m6, x, backend=name) for name in there("cuda", "triton")}
    yield Contest("pack_e5m6", shape, "memory", bytes_moved, packing)
    yield Contest(
        "unpack_e5m6",
        shape,
        "memory",
        bytes_moved,
        {"triton": partial(quant.unpack_e5m6, packed, torch.bfloat16, backend="triton")},
    )
    w = _bf16(device, 2 * d, d)
    blocks = quant.quantise_blocks(w, pow2=False, backend="triton")
    shape = f"[{2 * d}, {d}]"
    yield Contest(
        "quantise_blocks",
        shape,
        "memory",
        3 * w.numel(),
        {"triton": partial(quant.quantise_blocks, w, pow2=False, backend="triton")},
    )
    yield Contest(
        "transpose_blocks",
        shape,
        "memory",
        2 * w.numel(),
        {
            "triton": partial(quant.transpose_blocks, blocks, backend="triton"),
            "(torch)": lambda: blocks.values.view(torch.uint8).t().contiguous(),
        },
    )


def _norm(device: torch.device, m: int, d: int) -> Iterator[Contest]:
    x, dy, gain, shape = _bf16(device, m, d), _bf16(device, m, d), _bf16(device, d), f"[{m}, {d}]"
    _, scale = norm.rms_norm(x, gain, 1e-6, backend="triton")
    into, n = torch.zeros(d, device=device), m * d
    yield Contest(
        "rms_norm",
        shape,
        "memory",
        4 * n,
        {
            "triton": partial(norm.rms_norm, x, gain, 1e-6, backend="triton"),
            "(torch)": partial(functional.rms_norm, x, (d,), gain, 1e-6),
        },
    )
    yield Contest(
        "rms_norm_quantise",
        shape,
        "memory",
        round(n * (5 + TILE_BYTES)),
        {"triton": partial(norm.rms_norm_quantise, x, gain, 1e-6, pow2=True, backend="triton")},
    )
    yield Contest(
        "rms_norm_backward",
        shape,
        "memory",
        6 * n,
        {"triton": partial(norm.rms_norm_backward, dy, x, scale, gain, backend="triton")},
    )
    yield Contest(
        "rms_norm_gain_gradient",
        shape,
        "memory",
        4 * n,
        {"triton": partial(norm.rms_norm_gain_gradient, dy, x, scale, into, backend="triton")},
    )


def _swiglu(device: torch.device, m: int, f: int) -> Iterator[Contest]:
    gate_up, dy, weight = _bf16(device, m, 2 * f), _bf16(device, m, f), torch.rand(m, device=device)
    kept = quant.quantise_rows(gate_up, pow2=False, backend="triton")
    shape, n, fp8 = f"[{m}, {f}]", m * f, 1 + TILE_BYTES

    def eager() -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return functional.silu(gate) * up

    yield Contest(
        "swiglu",
        shape,
        "memory",
        6 * n,
        {"triton": partial(swiglu.swiglu, gate_up, weight, backend="triton"), "(torch)": eager},
    )
    for label, given, read in (("BF16", gate_up, 4.0), ("FP8", kept, 2 * fp8)):
        ours = {"pow2": True, "backend": "triton"}
        yield Contest(
            f"swiglu_quantise from {label}",
            shape,
            "memory",
            round(n * (read + fp8)),
            {"triton": partial(swiglu.swiglu_quantise, given, weight, **ours)},
        )
        yield Contest(
            f"swiglu_quantise_columns from {label}",
            shape,
            "memory",
            round(n * (read + fp8)),
            _turning(swiglu.swiglu_quantise_columns, given, weight),
        )
        yield Contest(
            f"swiglu_backward from {label}",
            shape,
            "memory",
            round(n * (2 + read + 4)),
            {"triton": partial(swiglu.swiglu_backward, dy, given, weight, backend="triton")},
        )
        yield Contest(
            f"swiglu_backward_quantise from {label}",
            shape,
            "memory",
            round(n * (2 + read + 4 * fp8)),
            _turning(swiglu.swiglu_backward_quantise, dy, given, weight),
        )


def _moe(device: torch.device, tokens: int, rows: int, d: int) -> Iterator[Contest]:
    top_k = rows // tokens
    x, order = _bf16(device, tokens, d), torch.randperm(rows, device=device)
    index = (order // top_k).int()
    back = (
        torch.empty_like(order)
        .scatter_(0, order, torch.arange(rows, device=device))
        .int()
        .view(tokens, top_k)
    )
    kept, y = quant.quantise_rows(x, pow2=True, backend="triton"), _bf16(device, rows, d)
    fp8 = 1 + TILE_BYTES
    shape = f"[{tokens} -> {rows}, {d}]"
    yield Contest(
        "expand",
        shape,
        "memory",
        2 * (x.numel() + y.numel()),
        {
            "triton": partial(moe.expand, x, index, backend="triton"),
            "(torch)": partial(torch.index_select, x, 0, index),
        },
    )
    yield Contest(
        "expand_rows (FP8)",
        shape,
        "memory",
        round(fp8 * (x.numel() + y.numel())),
        {"triton": partial(moe.expand_rows, kept, index, pow2=True, backend="triton")},
    )
    yield Contest(
        "reduce",
        shape,
        "memory",
        2 * (x.numel() + y.numel()),
        {
            "triton": partial(moe.reduce, y, back, backend="triton"),
            "(torch)": lambda: torch.zeros_like(x).index_add_(0, index, y),
        },
    )
    scores, bias = torch.rand(tokens, 256, device=device), torch.randn(256, device=device) * 0.01
    yield Contest(
        "gate (256 experts, top 8 in 4 of 8 groups)",
        f"[{tokens}, 256]",
        "memory",
        tokens * (256 * 4 + 8 * 12),
        {
            "triton": partial(moe.gate, scores, bias, 8, 4, 8, 2.5, backend="triton"),
            "(torch)": partial(moe.gate, scores, bias, 8, 4, 8, 2.5, backend="reference"),
        },
    )


def _rest(device: torch.device, tokens: int, d: int, v: int) -> Iterator[Contest]:
    heads, length = 128, tokens
    q = _bf16(device, 1, length, heads, 192)[..., 128:]
    turns = torch.randn(length, 32, 2, device=device)
    yield Contest(
        "rope, in place",
        f"[1, {length}, {heads}, 64]",
        "memory",
        4 * q.numel(),
        {"triton": partial(rope.rotate_, q, turns, inverse=False, backend="triton")},
    )
    logits, labels = _bf16(device, tokens, v), torch.randint(v, (tokens,), device=device)

    def eager() -> None:
        leaf = logits.detach().requires_grad_()
        functional.cross_entropy(leaf, labels).backward()

    yield Contest(
        "cross_entropy_ (loss and gradient)",
        f"[{tokens}, {v}]",
        "memory",
        6 * logits.numel(),
        {
            "triton": partial(loss.cross_entropy_, logits, labels, 1.0 / tokens, backend="triton"),
            "(torch)": eager,
        },
    )
    size = 1 << 28 if tokens == 4096 else 1 << 16
    weight, grad = (torch.randn(size, device=device) for _ in range(2))
    m, s = (torch.zeros(size, device=device, dtype=torch.bfloat16) for _ in range(2))
    low = weight.bfloat16()
    yield Contest(
        "adamw (BF16 moments, writes the BF16 weight)",
        f"[{size}]",
        "memory",
        size * (4 + 4 + 4 + 8 + 2),
        {
            "triton": lambda: optim.adamw(
                weight,
                grad,
                m,
                s,
                lr=1e-4,
                beta1=0.9,
                beta2=0.95,
                eps=1e-8,
                weight_decay=0.1,
                step=3,
                low=low,
                backend="triton",
            ),
        },
    )
