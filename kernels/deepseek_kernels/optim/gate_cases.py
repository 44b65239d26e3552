"""Limits of the optimizer's kernel."""

from deepseek_kernels.gate.case import Case, Limits
from deepseek_kernels.optim import triton_impl as kernels

_SCALARS = dict.fromkeys(("kept", "grad1", "beta2", "grad2", "correction", "eps", "rate"), "fp32")


def _case(moments: str, low: bool) -> Case:
    pointers = {"w_ptr": "*fp32", "g_ptr": "*fp32", "m_ptr": f"*{moments}", "v_ptr": f"*{moments}"}
    if low:
        pointers["low_ptr"] = "*bf16"
    return Case(
        f"adamw {moments} moments{' and copy' if low else ''}",
        kernels.adamw_kernel,
        pointers | {"N": "i32"} | _SCALARS,
        {"BLOCK": kernels.BLOCK} | ({} if low else {"low_ptr": None}),
        kernels.LAUNCH,
        (*pointers, "N"),
        Limits(64, 8192, {"LDG.E.128": 6, "STG.E.128": 4}),
    )


CASES = (_case("bf16", True), _case("fp32", False))
