"""Limits of the kernels around the experts, at V3's sizes: 256 experts in 8 groups, 4 kept, 8 chosen."""

from deepseek_kernels.gate.case import Case, Limits
from deepseek_kernels.moe import triton_gate, triton_impl

_BYTES = {"bf16": 2, "fp32": 4, "u8": 1}
_EXPAND = {"x_ptr": "*{}", "row_ptr": "*i32", "y_ptr": "*{}", "M": "i32", "P": "i32", "D": "i32"}
_SCALES = {"scale_ptr": "*fp32", "y_scale_ptr": "*fp32"}
_REDUCE = {"y_ptr": "*{}", "padded_ptr": "*i32", "x_ptr": "*{}", "M": "i32", "D": "i32"}


def _typed(signature: dict[str, str], x: str) -> dict[str, str]:
    return {name: kind.format(x) for name, kind in signature.items()}


_EXPANDS = tuple(
    Case(
        f"expand {x}{' with scales' if scaled else ''}",
        triton_impl.expand_kernel,
        _typed(_EXPAND, x) | (_SCALES if scaled else {}),
        {"R": triton_impl.BYTES // _BYTES[x], "C": triton_impl.CHANNELS, "SCALED": scaled, "POW2": True}
        | ({} if scaled else {"scale_ptr": None, "y_scale_ptr": None}),
        triton_impl.LAUNCH,
        (*_EXPAND, *(_SCALES if scaled else ())),
        Limits(registers=48, shared=0, needs={"LDG.E.128": 2, "STG.E.128": 2}),
    )
    for x, scaled in (("bf16", False), ("fp32", False), ("u8", True))
)
_REDUCES = tuple(
    Case(
        f"reduce {x}",
        triton_impl.reduce_kernel,
        _typed(_REDUCE, x),
        {"K": 8, "R": triton_impl.SUMMED_BYTES // _BYTES[x], "C": triton_impl.SUMMED_CHANNELS},
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
CASES = (*_EXPANDS, *_REDUCES, *_GATES)
