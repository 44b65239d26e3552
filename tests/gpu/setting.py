"""Where the kernel tests run, and what they share. Every draw is fresh: the seed comes from the test's name and is
printed
with a failure."""

import torch
from torch import Tensor

from deepseek_kernels import interpreter
from deepseek_kernels.formats import Blocks, Packed, Rows
from deepseek_kernels.machine import interpreting, why_not

ON_GPU = torch.cuda.is_available() and not interpreting()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
if not ON_GPU:
    interpreter.install()  # for kernels that are launched without the registry


def backends(*names: str) -> list[str]:
    """Those of ``names`` that run here. Triton always does: compiled, or interpreted."""
    there = [name for name in names if why_not(name) is None]
    assert "triton" not in names or "triton" in there, why_not("triton")
    return there


def size(on_gpu: int, on_cpu: int) -> int:
    return on_gpu if ON_GPU else on_cpu


def randn(*shape: int, dtype: torch.dtype = torch.float32, spread: float = 0.0) -> Tensor:
    """Normal values; with ``spread`` each row's size varies by factors of up to e^(3 spread)."""
    x = torch.randn(shape, device=DEVICE)
    if spread:
        x = x * torch.exp(spread * torch.randn(*shape[:-1], 1, device=DEVICE))
    return x.to(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in every bit, but for which NaN it is."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    bits = _BITS[a.element_size()]
    nan = a.float().isnan() & b.float().isnan()
    return bool(((a.view(bits) == b.view(bits)) | nan).all())


def same(a: Rows | Blocks | Packed, b: Rows | Blocks | Packed) -> bool:
    """``same_bits`` of the tensors, equality of the sizes."""
    return type(a) is type(b) and all(
        same_bits(x, y) if isinstance(x, Tensor) else x == y
        for x, y in zip(vars(a).values(), vars(b).values(), strict=True)
    )


def error(found: Tensor, exact: Tensor) -> float:
    """|found - exact| / |exact| in float64; NaN where anything is NaN."""
    a, b = found.double().cpu(), exact.double().cpu()
    return float((a - b).norm() / b.norm().clamp(min=1e-300))
