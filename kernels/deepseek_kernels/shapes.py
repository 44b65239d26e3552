"""Refusing input that does not fit, in one form: which function, what it was given, what it takes. Only shapes and
types are compared, which the host knows: the device is not waited for."""

import torch
from torch import Tensor

NUMBERS = (torch.bfloat16, torch.float32)  # what is computed with


def check_axes(function: str, name: str, x: Tensor, *legends: str) -> None:
    """``legends``: the axes' names, "M, K" for a matrix; any of them will do."""
    if all(x.dim() != legend.count(",") + 1 for legend in legends):
        wanted = " or ".join(f"[{legend}]" for legend in legends)
        raise ValueError(f"{function}: {name} is {list(x.shape)}, must be {wanted}")


def check_shape(
    function: str, name: str, x: Tensor, shape: tuple[int, ...], other: str, other_shape: tuple[int, ...]
) -> None:
    """``x`` has ``shape``, because ``other`` has its own."""
    if x.shape != shape:
        raise ValueError(
            f"{function}: {name} is {list(x.shape)}, must be {list(shape)} to fit {other} {list(other_shape)}"
        )


def check_dtype(function: str, name: str, dtype: torch.dtype, *dtypes: torch.dtype) -> None:
    if dtype not in dtypes:
        wanted = " or ".join(str(one) for one in dtypes)
        raise ValueError(f"{function}: {name} is {dtype}, must be {wanted}")
