"""Limits of the block-scaled products. Two waits for the tensor cores are what the forms with halves are about, one
inside the loop and one after it; a third would mean that the compiler serialises."""

import torch

from deepseek_kernels.gate.case import MOST_SHARED, Case, Limits
from deepseek_kernels.gemm import triton_impl as forms
from deepseek_kernels.gemm.triton_forward import forward_kernel
from deepseek_kernels.gemm.triton_gradient import gradient_kernel

_DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
_NUMBERS = ("M", "NP", "G", "tiles_m", "tiles_n")
_GRADIENT_NUMBERS = ("M", "N", "PITCH", "G", "E", "tiles_m", "tiles_n")
_NEVER = ("HMMA", "HGMMA", "LDGSTS")


def _forward(form: forms.Forward, dtype: torch.dtype, grouped: bool, aligned: bool) -> Case:
    out = _DTYPES[dtype]
    signature = {
        "a": "tensordesc<fp8e4nv[128,128]>",
        "b": "tensordesc<fp8e4nv[128,128]>",
        "b_half": "tensordesc<fp8e4nv[64,128]>",
        "y": f"tensordesc<{out}[128,128]>",
        "y_half": f"tensordesc<{out}[128,64]>",
        "a_scale_ptr": "*fp32",
        "b_scale_ptr": "*fp32",
    }
    constants: dict[str, object] = {"WIDE": form.wide, "BAND": forms.BAND}
    if grouped:
        signature["expert_ptr"] = "*i32"
    else:
        constants["expert_ptr"] = None
    loads = (3 if form.wide else 2) * form.launch(dtype)["num_stages"]  # before the loop, and in it
    return Case(
        f"{form.name} {'grouped' if grouped else 'dense'} {out}{'' if aligned else ' any M'}",
        forward_kernel,
        signature | dict.fromkeys(_NUMBERS, "i32"),
        constants,
        form.launch(dtype),
        ("a_scale_ptr", "b_scale_ptr", "NP")
        + (("expert_ptr",) if grouped else ())
        + (("M",) if aligned else ()),
        Limits(
            registers=255 if form.wide else 200,
            shared=MOST_SHARED,
            needs={
                "QGMMA": 8 if form.wide else 4,
                "UTMALDG": loads,
                "UTMASTG": 2 if form.wide else 1,
                "FFMA": 128 if form.wide else 64,
            },
            forbids=_NEVER,
            most={"WARPGROUP.DEPBAR": 2 if form.wide else 1},
        ),
    )


def _gradient(form: forms.Gradient, grouped: bool, aligned: bool) -> Case:
    signature = {
        "a": f"tensordesc<fp8e4nv[{form.rows},128]>",
        "b": "tensordesc<fp8e4nv[128,128]>",
        "a_scale_ptr": "*fp32",
        "b_scale_ptr": "*fp32",
        "into_ptr": "*fp32",
    }
    constants: dict[str, object] = {"HALVES": form.halves, "BAND": forms.BAND}
    if grouped:
        signature["start_ptr"] = "*i32"
        numbers = _GRADIENT_NUMBERS
    else:
        constants |= {"start_ptr": None, "E": 1}  # Triton makes a constant of an argument that is 1
        numbers = tuple(one for one in _GRADIENT_NUMBERS if one != "E")
    loads = (3 if form.halves else 2) * form.stages
    return Case(
        f"add {form.name} {'grouped' if grouped else 'dense'}{'' if aligned else ' any shape'}",
        gradient_kernel,
        signature | dict.fromkeys(numbers, "i32"),
        constants,
        form.launch(),
        ("a_scale_ptr", "b_scale_ptr", "into_ptr", "PITCH")
        + (("start_ptr",) if grouped else ())
        + (("M", "N") if aligned else ()),
        Limits(
            registers=255,
            shared=MOST_SHARED,
            needs={
                "QGMMA": 8 if form.halves else 4,
                "UTMALDG": loads,
                "FFMA": 64,
                "LDG.E.128": 16,
                "STG.E.128": 16,
            },
            forbids=_NEVER,
            most={"WARPGROUP.DEPBAR": 2 if form.halves else 1},
        ),
    )


CASES = tuple(
    [
        _forward(form, dtype, grouped, aligned)
        for form in forms.FORWARDS
        for dtype in _DTYPES
        for grouped, aligned in ((False, True), (False, False), (True, True))
    ]
    + [
        _gradient(form, grouped, aligned)
        for form in forms.GRADIENTS
        for grouped, aligned in ((False, True), (False, False), (True, True))
    ]
)
