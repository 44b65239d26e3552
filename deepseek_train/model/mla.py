"""Multi-head latent attention (V2 report section 2.1, V3_SPEC A.3): low-rank keys, values and queries, one RoPE key
shared by all heads.

Legend: B batch, T time, D hidden, H heads, Q query/key dimension (nope + rope), R rope, C latent.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from deepseek_train.model.context import ModelContext
from deepseek_train.model.linear import linear
from deepseek_train.model.norm import rms_norm
from deepseek_train.model.rope import rotate, softmax_scale


class LatentAttention(nn.Module):
    """Causal self-attention over one sequence per batch row."""

    def __init__(self, context: ModelContext) -> None:
        super().__init__()
        m = self.m = context.model
        self.queue, self.scale = context.queue, softmax_scale(m)
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
        m, queue = self.m, self.queue
        if m.q_lora_rank is None:
            q = linear(x_BTD, self.q, queue)
        else:
            latent_BTC = rms_norm(linear(x_BTD, self.q_a, queue), self.q_a_norm, m.norm_eps, queue)
            q = linear(latent_BTC, self.q_b, queue)
        q_nope, q_rope = q.unflatten(-1, (m.num_heads, -1)).split(
            [m.qk_nope_head_dim, m.qk_rope_head_dim], -1
        )

        latent_BTC, k_rope = linear(x_BTD, self.kv_a, queue).split([m.kv_lora_rank, m.qk_rope_head_dim], -1)
        kv = linear(rms_norm(latent_BTC, self.kv_a_norm, m.norm_eps, queue), self.kv_b, queue)
        k_nope, v_BTHV = kv.unflatten(-1, (m.num_heads, -1)).split([m.qk_nope_head_dim, m.v_head_dim], -1)

        k_rope = rotate(k_rope.unsqueeze(2), turns_TR).expand(-1, -1, m.num_heads, -1)
        q_BTHQ = torch.cat([q_nope, rotate(q_rope, turns_TR)], -1)
        k_BTHQ = torch.cat([k_nope, k_rope], -1)
        out_BTHV = attend(q_BTHQ, k_BTHQ, v_BTHV, self.scale)
        return linear(out_BTHV.flatten(-2), self.o, queue)


def attend(q_BTHQ: Tensor, k_BTHQ: Tensor, v_BTHV: Tensor, scale: float) -> Tensor:
    """Causal softmax(q k^T scale) v, softmax in FP32: [B, T, H, V]."""
    q, k, v = q_BTHQ.transpose(1, 2), k_BTHQ.transpose(1, 2), v_BTHV.transpose(1, 2)
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2)
