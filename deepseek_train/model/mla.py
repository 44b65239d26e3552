"""Multi-head latent attention (V2 report section 2.1, V3_SPEC A.3): low-rank keys, values and queries, one RoPE key
shared by all heads.

Legend: B batch, T time, D hidden, H heads, Q query/key dimension (nope + rope), R rope, C latent, O channels of all
heads.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deepseek_train.fp8.attention import fp8_attend
from deepseek_train.model.attention import attend
from deepseek_train.model.context import ModelContext
from deepseek_train.model.linear import linear
from deepseek_train.model.norm import forgettable_norm
from deepseek_train.model.project import project, project_both
from deepseek_train.model.rope import softmax_scale, turned


@dataclass(frozen=True)
class Latents:
    """What a position is to attention, before there are heads. Keys and values of all heads follow from the last two,
    so these are all that decoding keeps (``model.decode``)."""

    q_BTC: Tensor  # of queries; where these are not compressed, the input itself
    kv_BTC: Tensor  # of keys and values, normalised
    k_rope_BTR: Tensor  # the key that all heads share, turned


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
        return self.attended(self.latents(x_BTD, turns_TR2), turns_TR2)

    def latents(self, x_BTD: Tensor, turns_TR2: Tensor) -> Latents:
        """What comes before the heads."""
        m, context = self.m, self.context
        if m.q_lora_rank is None:
            q_latent, compressed = x_BTD, project(x_BTD, self.kv_a, context)
        else:
            q_latent, compressed = project_both(x_BTD, self.q_a, self.kv_a, context)
            q_latent = forgettable_norm(q_latent, self.q_a_norm, context)
        compressed = turned(compressed, turns_TR2, 1, context.kernels.rope)
        latent, k_rope = compressed.split([m.kv_lora_rank, m.qk_rope_head_dim], -1)
        return Latents(q_latent, forgettable_norm(latent, self.kv_a_norm, context), k_rope)

    def attended(self, latents: Latents, turns_TR2: Tensor) -> Tensor:
        """Attention of the latents' positions among themselves: output [B, T, D]."""
        context, scale, nope = self.context, self.scale, self.m.qk_nope_head_dim

        def up(q_latent: Tensor, kv_latent: Tensor, k_rope: Tensor) -> tuple[Tensor, ...]:
            return self._heads(Latents(q_latent, kv_latent, k_rope), turns_TR2)

        q, k, v = context.recompute.region("mla_up", up, latents.q_BTC, latents.kv_BTC, latents.k_rope_BTR)
        if context.fp8 is not None:
            return fp8_attend(q, k, v, self.o, context.fp8, scale=scale, nope=nope)
        return self.out(attend(q, k, v, scale=scale, nope=nope, backend=context.kernels.attention))

    def queries(self, q_BTC: Tensor, turns_TR2: Tensor) -> Tensor:
        """Queries of all heads, the last R of each turned: q_BTHQ."""
        m, context = self.m, self.context
        q_BTO = project(q_BTC, self.q if m.q_lora_rank is None else self.q_b, context)
        return turned(q_BTO, turns_TR2, m.num_heads, context.kernels.rope).unflatten(-1, (m.num_heads, -1))

    def out(self, out_BTHV: Tensor) -> Tensor:
        """The heads' results to the residual stream: [B, T, D]."""
        return linear(out_BTHV.flatten(-2), self.o, self.context.queue, self.context.kernels.wgrad)

    def _heads(self, latents: Latents, turns_TR2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of all heads: q_BTHQ, k_BTHQ, v_BTHV."""
        m = self.m
        q_BTHQ = self.queries(latents.q_BTC, turns_TR2)
        kv = project(latents.kv_BTC, self.kv_b, self.context).unflatten(-1, (m.num_heads, -1))
        k_nope, v_BTHV = kv.split([m.qk_nope_head_dim, m.v_head_dim], -1)
        k_rope = latents.k_rope_BTR.unsqueeze(2).expand(-1, -1, m.num_heads, -1)
        return q_BTHQ, torch.cat([k_nope, k_rope], -1), v_BTHV
