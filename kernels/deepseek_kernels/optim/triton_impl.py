"""AdamW as a Triton kernel."""

import triton
import triton.language as tl
from torch import Tensor

from deepseek_kernels.optim.factors import Factors

BLOCK, LAUNCH = 1024, {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}


@triton.jit
def adamw_kernel(
    w_ptr, g_ptr, m_ptr, v_ptr, low_ptr, N, kept, grad1, beta2, grad2, correction, eps, rate, BLOCK: tl.constexpr
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    w = tl.load(w_ptr + n, mask=inside, other=0.0)
    g = tl.load(g_ptr + n, mask=inside, other=0.0)
    m = tl.load(m_ptr + n, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + n, mask=inside, other=0.0).to(tl.float32)
    m += (g - m) * grad1
    v = v * beta2 + g * grad2 * g
    tl.store(m_ptr + n, m, mask=inside)
    tl.store(v_ptr + n, v, mask=inside)
    root = tl.math.sqrt_rn(v) * correction
    w = w * kept - tl.math.div_rn(m, root + eps) * rate
    tl.store(w_ptr + n, w, mask=inside)
    if low_ptr is not None:
        tl.store(low_ptr + n, w, mask=inside)


def adamw(
    weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, low: Tensor | None,
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int,
) -> None:  # fmt: skip
    by = Factors.of(lr, beta1, beta2, eps, weight_decay, step)
    n = weight.numel()
    if n:
        adamw_kernel[(triton.cdiv(n, BLOCK),)](
            weight, grad, exp_avg, exp_avg_sq, low, n, by.kept, by.grad1, by.beta2, by.grad2, by.correction, by.eps,
            by.rate, BLOCK, **LAUNCH,
        )  # fmt: skip
