"""Limits of the attention kernels at V3's head sizes: tensor cores, TMA for what streams by, 16-byte loads and stores
of the rest."""

from typing import Any

import torch

from deepseek_kernels.attention import backward_kernels, forward_kernel
from deepseek_kernels.attention.triton_impl import TILES, Tile, sizes
from deepseek_kernels.gate.case import Case, Limits

_NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
_FP32 = ("lse_ptr", "lse_2_ptr", "delta_ptr")
_INT32 = ("starts_ptr", "ends_ptr")
_ODD = ("T", "H")  # sizes that need not be divisible by 16


def case(
    kernel: Any,
    streams: tuple[str, ...],
    rows: int,
    tile: Tile,
    dtype: torch.dtype,
    docs: bool,
    limits: Limits,
) -> Case:
    """``streams``: arguments that are descriptors, of ``rows`` rows."""
    name = _NAMES[dtype]
    constants = sizes(128, 64, 128) | {
        "DOCS": docs,
        "BM": tile.queries,
        "BN": tile.keys,
        "PRECISION": TILES[dtype].precision,
    }
    signature = {}
    for argument in (one for one in kernel.arg_names if one not in constants):
        if argument in streams:
            width = constants["RC" if argument.endswith("rope") else "NC"]
            signature[argument] = f"tensordesc<{name}[1,{rows},1,{width}]>"
        elif argument.endswith("_ptr"):
            kind = "fp32" if argument in _FP32 else "i32" if argument in _INT32 else name
            signature[argument] = f"*{kind}"
        else:
            signature[argument] = "fp32" if argument == "scale" else "i32"
    aligned = tuple(one for one in signature if one not in (*streams, *_ODD, "scale"))
    label = f"{kernel.fn.__name__[:-7]} {name} {'documents' if docs else 'causal'}"
    return Case(label, kernel, signature, constants, tile.launch, aligned, limits)


def _cases(dtype: torch.dtype, docs: bool, registers: int, needs: dict[str, int]) -> tuple[Case, ...]:
    tiles = TILES[dtype]
    limits = Limits(registers, needs=needs | {"UTMALDG": 3, "LDG.E.128": 1, "STG.E.128": 1})
    by_queries = ("k_nope", "k_rope", "v")
    by_keys = ("q_nope", "q_rope", "d_out")
    return (
        case(
            forward_kernel.forward_kernel, by_queries, tiles.forward.keys, tiles.forward, dtype, docs, limits
        ),
        case(backward_kernels.dq_kernel, by_queries, tiles.dq.keys, tiles.dq, dtype, docs, limits),
        case(backward_kernels.dkdv_kernel, by_keys, tiles.dkdv.queries, tiles.dkdv, dtype, docs, limits),
    )


CASES = tuple(
    one
    for dtype, needs in ((torch.bfloat16, {"HGMMA": 16}), (torch.float32, {}))
    for docs in (False, True)
    for one in _cases(dtype, docs, 255, needs)
)
