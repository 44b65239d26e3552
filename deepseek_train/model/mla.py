"""Multi-head latent attention (V2 report section 2.1, V3_SPEC A.3): low-rank keys, values and queries, one RoPE key
shared by all heads.

Legend: B batch, T time, D hidden, H heads, Q query/key dimension (nope + rope), R rope, C latent.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from deepseek_train.fp8.attention import fp8_attend
from deepseek_train.model.context import ModelContext
from deepseek_train.model.linear import linear
from deepseek_train.model.norm import forgettable_norm
from deepseek_train.model.project import project, project_both
from deepseek_train.model.rope import rotate, softmax_scale


class LatentAttention(nn.Module):
    """Causal self-attention over one sequence per batch row."""

    def __init__(self, context: ModelContext) -> None:
        super().__init__()
        m = self.m = context.model
        self.context, self.scale = context, softmax_scale(m)
        weight = context.weight
        q_out = m.num_heads * (m.qk_nope_head_dim + m.qk_rope_head_dim)
        if m.q_lora_rank is None:
            self.q = weight(q_out, m.hidden_size)
        else:
            self.q_a = weight(m.q_lora_rank, m.hidden_size)
            self.q_a_norm = weight(m.q_lora_rank)
            self.q_b = weight(q_out, m.q_lora_rank)
        self.kv_a = weight(m.kv_lora_rank + m.qk_rope_head_dim, m.hidden_size)
        self.kv_a_norm = weight(m.kv_lora_rank)
        self.kv_b = weight(m.num_heads * (m.qk_nope_head_dim + m.v_head_dim), m.kv_lora_rank)
        self.o = weight(m.hidden_size, m.num_heads * m.v_head_dim)

    def forward(self, x_BTD: Tensor, turns_TR: Tensor) -> Tensor:
        """Attention output [B, T, D]; ``turns_TR`` from ``rope.rotations``."""
        m, context = self.m, self.context
        if m.q_lora_rank is None:
            q_latent, compressed = x_BTD, project(x_BTD, self.kv_a, context)
        else:
            q_latent, compressed = project_both(x_BTD, self.q_a, self.kv_a, context)
            q_latent = forgettable_norm(q_latent, self.q_a_norm, context)
        latent, k_rope = compressed.split([m.kv_lora_rank, m.qk_rope_head_dim], -1)
        kv_latent = forgettable_norm(latent, self.kv_a_norm, context)

        def up(q_latent: Tensor, kv_latent: Tensor, k_rope: Tensor) -> tuple[Tensor, ...]:
            heads = self._heads(q_latent, kv_latent, k_rope, turns_TR)
            return heads if context.fp8 is not None else aligned(*heads)

        q, k, v = context.recompute.region("mla_up", up, q_latent, kv_latent, k_rope)
        if context.fp8 is not None:
            nope = m.qk_nope_head_dim
            return fp8_attend(q, k, v, self.o, context.fp8, scale=self.scale, nope=nope)
        # Where heads were padded, this is a copy of what attention itself has saved.
        out_BTO = context.recompute.region(
            "mla_up", lambda out: out[..., : m.v_head_dim].flatten(-2), causal(q, k, v, self.scale)
        )
        return linear(out_BTO, self.o, context.queue)

    def _heads(
        self, q_BTC: Tensor, kv_BTC: Tensor, k_rope_BTR: Tensor, turns_TR: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Latents to queries, keys and values of all heads: q_BTHQ, k_BTHQ, v_BTHV."""
        m, context = self.m, self.context
        q = project(q_BTC, self.q if m.q_lora_rank is None else self.q_b, context)
        q_nope, q_rope = q.unflatten(-1, (m.num_heads, -1)).split(
            [m.qk_nope_head_dim, m.qk_rope_head_dim], -1
        )
        kv = project(kv_BTC, self.kv_b, context).unflatten(-1, (m.num_heads, -1))
        k_nope, v_BTHV = kv.split([m.qk_nope_head_dim, m.v_head_dim], -1)
        k_rope = rotate(k_rope_BTR.unsqueeze(2), turns_TR).expand(-1, -1, m.num_heads, -1)
        return torch.cat([q_nope, rotate(q_rope, turns_TR)], -1), torch.cat([k_nope, k_rope], -1), v_BTHV


def attend(q_BTHQ: Tensor, k_BTHQ: Tensor, v_BTHV: Tensor, scale: float) -> Tensor:
    """Causal softmax(q k^T scale) v, softmax in FP32: [B, T, H, V]."""
    return causal(*aligned(q_BTHQ, k_BTHQ, v_BTHV), scale)[..., : v_BTHV.shape[-1]]


def aligned(q_BTHQ: Tensor, k_BTHQ: Tensor, v_BTHV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same with heads of one size, as the fused kernels want them. Columns of zeros change no product."""
    size = max(q_BTHQ.shape[-1], v_BTHV.shape[-1])
    q, k, v = (
        t if t.shape[-1] == size else functional.pad(t, (0, size - t.shape[-1]))
        for t in (q_BTHQ, k_BTHQ, v_BTHV)
    )
    return q, k, v


def causal(q_BTHQ: Tensor, k_BTHQ: Tensor, v_BTHQ: Tensor, scale: float) -> Tensor:
    """Causal attention of heads of one size: [B, T, H, Q]."""
    q, k, v = (t.transpose(1, 2) for t in (q_BTHQ, k_BTHQ, v_BTHQ))
    out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return out.transpose(1, 2)
