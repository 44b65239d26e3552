"""Multi-head latent attention (V2 report section 2.1, V3_SPEC A.3): low-rank keys, values and queries, one RoPE key
shared by all heads.

Legend: B batch, T time, D hidden, H heads, Q query/key dimension (nope + rope), R rope, C latent, O channels of all
heads.
"""

import torch
from torch import Tensor, nn

from deepseek_train.fp8.attention import fp8_attend
from deepseek_train.model.attention import attend
from deepseek_train.model.context import ModelContext
from deepseek_train.model.linear import linear
from deepseek_train.model.norm import forgettable_norm
from deepseek_train.model.project import project, project_both
from deepseek_train.model.rope import softmax_scale, turned


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

    def forward(self, x_BTD: Tensor, turns_TR2: Tensor) -> Tensor:
        """Attention output [B, T, D]; ``turns_TR2`` from ``rope.rotations``."""
        m, context = self.m, self.context
        if m.q_lora_rank is None:
            q_latent, compressed = x_BTD, project(x_BTD, self.kv_a, context)
        else:
            q_latent, compressed = project_both(x_BTD, self.q_a, self.kv_a, context)
            q_latent = forgettable_norm(q_latent, self.q_a_norm, context)
        compressed = turned(compressed, turns_TR2, 1, context.kernels.rope)
        latent, k_rope = compressed.split([m.kv_lora_rank, m.qk_rope_head_dim], -1)
        kv_latent = forgettable_norm(latent, self.kv_a_norm, context)

        def up(q_latent: Tensor, kv_latent: Tensor, k_rope: Tensor) -> tuple[Tensor, ...]:
            return self._heads(q_latent, kv_latent, k_rope, turns_TR2)

        q, k, v = context.recompute.region("mla_up", up, q_latent, kv_latent, k_rope)
        scale, nope = self.scale, m.qk_nope_head_dim
        if context.fp8 is not None:
            return fp8_attend(q, k, v, self.o, context.fp8, scale=scale, nope=nope)
        out_BTHV = attend(q, k, v, scale=scale, nope=nope, backend=context.kernels.attention)
        return linear(out_BTHV.flatten(-2), self.o, context.queue, context.kernels.wgrad)

    def _heads(
        self, q_BTC: Tensor, kv_BTC: Tensor, k_rope_BTR: Tensor, turns_TR2: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Latents and the shared key, turned already, to queries, keys and values of all heads: q_BTHQ, k_BTHQ,
        v_BTHV."""
        m, context = self.m, self.context
        q_BTO = project(q_BTC, self.q if m.q_lora_rank is None else self.q_b, context)
        q_BTHQ = turned(q_BTO, turns_TR2, m.num_heads, context.kernels.rope).unflatten(-1, (m.num_heads, -1))
        kv = project(kv_BTC, self.kv_b, context).unflatten(-1, (m.num_heads, -1))
        k_nope, v_BTHV = kv.split([m.qk_nope_head_dim, m.v_head_dim], -1)
        k_rope = k_rope_BTR.unsqueeze(2).expand(-1, -1, m.num_heads, -1)
        return q_BTHQ, torch.cat([k_nope, k_rope], -1), v_BTHV
