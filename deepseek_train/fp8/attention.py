"""Attention and the linear behind it as one function of autograd: attention's result waits once, for both.

The core is computed in the precision of its inputs. Its result is what its own backward pass and the linear's weight
gradient need: kept in E5M6, which is why V3 has that format (V3 report section 3.3.3), it takes 12 bits an element.

Legend: B batch, T time, H heads, Q query/key size, V value size, D hidden; see ``deepseek_kernels.attention``.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from deepseek_kernels.attention import attention, attention_backward
from deepseek_train.fp8.room import Fp8
from deepseek_train.phases.wgrad import Weight


@dataclass(frozen=True)
class _Setting:
    fp8: Fp8
    weight: Weight
    scale: float
    nope: int


class _AttendProject(Function):
    @staticmethod
    def forward(ctx: Any, setting: _Setting, q: Tensor, k: Tensor, v: Tensor, weight: Weight) -> Tensor:
        fp8, storage = setting.fp8, setting.fp8.recipe.attention_output
        out_BTHV, lse_BHT = attention(
            q, k, v, setting.scale, None, nope=setting.nope, backend=fp8.kernels.attention
        )
        flat = out_BTHV.flatten(2).flatten(0, 1)
        kept = storage.keep(flat)
        ctx.save_for_backward(q, k, v, lse_BHT, *kept)
        ctx.setting = setting
        y = fp8.forward(storage.rows(kept, flat), weight, q.dtype)
        return y.view(*q.shape[:2], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BTD: Tensor) -> tuple[Tensor | None, ...]:
        setting, (q, k, v, lse_BHT, *kept) = ctx.setting, ctx.saved_tensors
        fp8, weight, width = setting.fp8, setting.weight, setting.weight.shape[1]
        storage = fp8.recipe.attention_output
        rows, dy_t = fp8.gradient_operands(dy_BTD.flatten(0, 1))
        d_out_BTHV = fp8.backward(rows, weight, q.dtype).view(v.shape)
        out_BTHV = storage.restored(tuple(kept), width, q.dtype).view(v.shape)
        dq, dk, dv = attention_backward(
            d_out_BTHV,
            q,
            k,
            v,
            out_BTHV,
            lse_BHT,
            setting.scale,
            None,
            nope=setting.nope,
            backend=fp8.kernels.attention,
        )
        fp8.queue.add(lambda: fp8.add_gradient(weight, dy_t, storage.columns(tuple(kept), width)))
        return None, dq, dk, dv, None


def fp8_attend(
    q_BTHQ: Tensor, k_BTHQ: Tensor, v_BTHV: Tensor, weight: Weight, fp8: Fp8, *, scale: float, nope: int
) -> Tensor:
    """W causal-softmax(scale q k^T) v: [B, T, D] for W [D, H V], in the dtype of ``q``, BF16 or FP32. ``nope``: the
    part of Q without RoPE."""
    return _AttendProject.apply(_Setting(fp8, weight, scale, nope), q_BTHQ, k_BTHQ, v_BTHV, weight)
