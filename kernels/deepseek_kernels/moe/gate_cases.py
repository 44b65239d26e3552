"""Limits of the kernels around the experts, at V3's sizes: 256 experts in 8 groups, 4 kept, 8 chosen."""

from deepseek_kernels.gate.case import Case, Limits
from deepseek_kernels.moe import triton_gate, triton_impl

_BYTES = {"bf16": 2, "fp32": 4, "u8": 1}
_EXPAND = {"x_ptr": "*{}", "row_ptr": "*i32", "y_ptr": "*{}", "P": "i32", "D": "i32"}
_REDUCE = {"y_ptr": "*{}", "padded_ptr": "*i32", "x_ptr": "*{}", "M": "i32", "D": "i32"}


def _typed(signature: dict[str, str], x: str) -> dict[str, str]:
    return {name: kind.format(x) for name, kind in signature.items()}


_EXPANDS = tuple(
    Case(
        f"expand {x}",
        triton_impl.expand_kernel,
        _typed(_EXPAND, x),
        {"R": triton_impl.BYTES // _BYTES[x], "C": triton_impl.CHANNELS},
        triton_impl.LAUNCH,
        tuple(_EXPAND),
        Limits(registers=48, shared=0, needs={"LDG.E.128": 4, "STG.E.128": 4}),
    )
    for x in _BYTES
)
_SCALES = tuple(
    Case(
        f"scales {'pow2' if pow2 else 'plain'}",
        triton_impl.scales_kernel,
        {"scale_ptr": "*fp32", "row_ptr": "*i32", "y_ptr": "*fp32", "M": "i32", "P": "i32"},
        {"POW2": pow2, "R": triton_impl.SCALES},
        triton_impl.LAUNCH,
        ("scale_ptr", "row_ptr", "y_ptr", "M", "P"),
        Limits(registers=48, shared=0, needs={"LDG.E.128": 2, "STG.E.128": 2}),
    )
    for pow2 in (False, True)
)
_REDUCES = tuple(
    Case(
        f"reduce {x}",
        triton_impl.reduce_kernel,
        _typed(_REDUCE, x),
        {"K": 8, "R": triton_impl.SUMMED_BYTES // _BYTES[x], "C": triton_impl.CHANNELS},
        triton_impl.LAUNCH,
        tuple(_REDUCE),
        Limits(registers=64, shared=0, needs={"LDG.E.128": 16, "STG.E.128": 2}),
    )
    for x in ("bf16", "fp32")
)
_GATES = (
    Case(
        "gate",
        triton_gate.gate_kernel,
        {
            "score_ptr": "*fp32",
            "bias_ptr": "*fp32",
            "id_ptr": "*i64",
            "weight_ptr": "*fp32",
            "N": "i32",
            "routed_scale": "fp32",
        },
        {"G": 8, "C": 32, "KEPT": 4, "K": 8, "G_P": 8, "C_P": 32, "K_P": 8, "R": triton_gate.TOKENS},
        triton_gate.LAUNCH,
        ("score_ptr", "bias_ptr", "id_ptr", "weight_ptr", "N"),
        Limits(registers=128, shared=2048, needs={"LDG.E.128": 4}),
    ),
    Case(
        "gate backward",
        triton_gate.gate_backward_kernel,
        {
            "d_weight_ptr": "*fp32",
            "score_ptr": "*fp32",
            "id_ptr": "*i64",
            "d_score_ptr": "*fp32",
            "N": "i32",
            "routed_scale": "fp32",
        },
        {"E": 256, "K": 8, "E_P": 256, "R": triton_gate.BACKWARD_TOKENS},
        triton_gate.LAUNCH,
        ("d_weight_ptr", "score_ptr", "id_ptr", "d_score_ptr", "N"),
        Limits(registers=168, shared=0, needs={"STG.E.128": 8}),
    ),
)
CASES = (*_EXPANDS, *_SCALES, *_REDUCES, *_GATES)
