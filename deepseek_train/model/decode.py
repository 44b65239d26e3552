"""Decoding: the model's layers on tokens that follow others, of which only latents are kept (V2 report 2.1.2, 2.1.3).

A position is remembered as its normalised latent of keys and values and the turned key that all heads share:
``kv_lora_rank + qk_rope_head_dim`` elements a layer, whatever the number of heads (V3: 576, where keys and values of
all heads are 40,960). These are never taken up to heads again. Instead the matrix W_UK that would make keys of latents
is applied to queries, which then meet latents directly, and W_UV, which would make values, to the weighted sums of
latents: q^T (W_UK c) = (W_UK^T q)^T c, and sum_s p_s W_UV c_s = W_UV sum_s p_s c_s. All else is what training runs.

Legend: L layers, B sequences, T new positions, S all positions so far, D hidden, H heads, Q query size (N without RoPE,
R with), C latent, E = C + R, V value size.
"""

import torch
from torch import Tensor

from deepseek_train.config.schema import ModelConfig
from deepseek_train.model.block import DenseBlock, MoeBlock
from deepseek_train.model.embed import embed
from deepseek_train.model.mla import LatentAttention, Latents
from deepseek_train.model.norm import forgettable_norm, wide
from deepseek_train.model.stage import Stage
from deepseek_train.phases.phase import fold
from deepseek_train.phases.values import Hidden


def cached_elements(m: ModelConfig) -> int:
    """What a token takes in the cache of all layers, in elements."""
    return m.num_layers * (m.kv_lora_rank + m.qk_rope_head_dim)


class LatentCache:
    """The latents of the first ``length`` positions of some sequences, with room for ``capacity``."""

    def __init__(
        self, m: ModelConfig, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.entries_LBSE = torch.empty(
            m.num_layers, batch, capacity, m.kv_lora_rank + m.qk_rope_head_dim, dtype=dtype, device=device
        )
        self.length = 0

    @property
    def capacity(self) -> int:
        return self.entries_LBSE.shape[2]


@torch.no_grad()
def decode(stage: Stage, tokens_BT: Tensor, cache: LatentCache) -> Hidden:
    """What leaves the last layer for int64 ``tokens`` that follow those in ``cache``, which then holds them too.

    ``stage`` is the whole model. ``stage.logits`` of the result (or of a part of its positions) predicts what comes
    next. The first call, if of more than one token, attends as in training: its result has the same bits.

    Raises ValueError where the cache, or the stage's table of rotations, has no room for them.
    """
    start, stop = cache.length, cache.length + tokens_BT.shape[1]
    if stop > cache.capacity:
        raise ValueError(f"{stop} positions do not fit a cache made for {cache.capacity}")
    hidden = Hidden(embed(tokens_BT, stage.embed, stage.context.queue))
    for layer, block in enumerate(stage.layers.values()):
        assert isinstance(block, DenseBlock | MoeBlock)
        turns_TR2 = block.turns_TR2[start:stop]
        if len(turns_TR2) < stop - start:
            raise ValueError(f"{stop} positions, but the model was made for {len(block.turns_TR2)}")
        attention, context = block.attention, block.context
        latents = attention.latents(forgettable_norm(hidden.x_BTD, block.attention_norm, context), turns_TR2)
        entries_BSE = cache.entries_LBSE[layer, :, :stop]
        torch.cat([latents.kv_BTC, latents.k_rope_BTR], -1, out=entries_BSE[:, start:])
        if start == 0 and stop > 1:
            attended_BTD = attention.attended(latents, turns_TR2)
        else:
            attended_BTD = _absorbed(attention, latents, turns_TR2, entries_BSE)
        hidden = fold(block.after_attention(), hidden.moved_to(hidden.x_BTD + attended_BTD))
    cache.length = stop
    return hidden


def _absorbed(attention: LatentAttention, latents: Latents, turns_TR2: Tensor, entries_BSE: Tensor) -> Tensor:
    """Attention output [B, T, D] of the last T of the S positions in ``entries``. Scores and their softmax in FP32."""
    m, length = attention.m, len(turns_TR2)
    up_HOC = attention.kv_b.unflatten(0, (m.num_heads, -1))
    up_k_HNC, up_v_HVC = up_HOC.split([m.qk_nope_head_dim, m.v_head_dim], 1)
    q_BTHQ = attention.queries(latents.q_BTC, turns_TR2)
    q_nope, q_rope = q_BTHQ.split([m.qk_nope_head_dim, m.qk_rope_head_dim], -1)
    q_BTHE = torch.cat([torch.einsum("bthn,hnc->bthc", q_nope, up_k_HNC), q_rope], -1)
    seen_BSE = entries_BSE.to(wide(entries_BSE.dtype))
    scores_BTHS = torch.einsum("bthe,bse->bths", q_BTHE.to(seen_BSE.dtype), seen_BSE) * attention.scale
    if length > 1:
        later_TS = scores_BTHS.new_ones(length, seen_BSE.shape[1], dtype=torch.bool)
        later_TS = later_TS.triu(seen_BSE.shape[1] - length + 1)
        scores_BTHS = scores_BTHS.masked_fill(later_TS.unsqueeze(1), -torch.inf)
    shares_BTHS = scores_BTHS.softmax(-1)
    sums_BTHC = torch.einsum("bths,bsc->bthc", shares_BTHS, seen_BSE[..., : m.kv_lora_rank])
    out_BTHV = torch.einsum("bthc,hvc->bthv", sums_BTHC.to(q_BTHQ.dtype), up_v_HVC)
    return attention.out(out_BTHV)
