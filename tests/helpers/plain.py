"""DeepSeek-V3 written down once more, as plainly as can be: loops over experts and heads, ordinary autograd,
weights by their published names, none of the project's model code. The reference for gradients in FP64.

Legend: B sequences, T positions, D hidden, H heads, E experts, K experts per token.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from deepseek_train.config.schema import ModelConfig


@dataclass(frozen=True)
class PlainLosses:
    main: Tensor
    mtp: Tensor
    balance: Tensor


class Plain:
    def __init__(self, m: ModelConfig, w: Mapping[str, Tensor]) -> None:
        self.m, self.w = m, w
        self.balance: list[Tensor] = []

    def losses(self, tokens: Tensor) -> PlainLosses:
        """``tokens`` [B, T + 1 + M], M MTP modules."""
        m, self.balance = self.m, []
        length = tokens.shape[1] - 1 - m.mtp_depth
        x = self.w["model.embed_tokens.weight"][tokens[:, :length]]
        for index in range(m.num_layers):
            x = self.block(x, index)
        x = self.norm(x, "model.norm.weight")
        main = self.cross_entropy(x, tokens[:, 1 : 1 + length])
        mtp = []
        for depth in range(m.mtp_depth):
            name = f"model.layers.{m.num_layers + depth}"
            embedded = self.w["model.embed_tokens.weight"][tokens[:, depth + 1 : depth + 1 + length]]
            both = [self.norm(embedded, f"{name}.enorm.weight"), self.norm(x, f"{name}.hnorm.weight")]
            x = self.block(torch.cat(both, -1) @ self.w[f"{name}.eh_proj.weight"].T, m.num_layers + depth)
            x = self.norm(x, f"{name}.shared_head.norm.weight")
            mtp.append(self.cross_entropy(x, tokens[:, depth + 2 : depth + 2 + length]))
        return PlainLosses(main, torch.stack(mtp).mean(), torch.stack(self.balance).sum() / len(tokens))

    def cross_entropy(self, x: Tensor, labels: Tensor) -> Tensor:
        head = "model.embed_tokens.weight" if self.m.tie_embeddings else "lm_head.weight"
        logits = x @ self.w[head].T
        return -torch.log_softmax(logits, -1).gather(-1, labels.unsqueeze(-1)).mean()

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.m.norm_eps) * self.w[name]

    def block(self, x: Tensor, index: int) -> Tensor:
        name = f"model.layers.{index}"
        x = x + self.attention(self.norm(x, f"{name}.input_layernorm.weight"), f"{name}.self_attn")
        h = self.norm(x, f"{name}.post_attention_layernorm.weight")
        if index < self.m.num_dense_layers:
            return x + self.ffn(h, f"{name}.mlp")
        return x + torch.stack([self.experts(sequence, f"{name}.mlp") for sequence in h])

    def attention(self, x: Tensor, name: str) -> Tensor:
        m, w = self.m, self.w
        if m.q_lora_rank is None:
            q = x @ w[f"{name}.q_proj.weight"].T
        else:
            latent = self.norm(x @ w[f"{name}.q_a_proj.weight"].T, f"{name}.q_a_layernorm.weight")
            q = latent @ w[f"{name}.q_b_proj.weight"].T
        compressed = x @ w[f"{name}.kv_a_proj_with_mqa.weight"].T
        latent = self.norm(compressed[..., : m.kv_lora_rank], f"{name}.kv_a_layernorm.weight")
        k_rope = self.rope(compressed[..., m.kv_lora_rank :])
        kv = latent @ w[f"{name}.kv_b_proj.weight"].T
        nope, size, v_size = m.qk_nope_head_dim, m.qk_nope_head_dim + m.qk_rope_head_dim, m.v_head_dim
        out = []
        for head in range(m.num_heads):
            q_head = q[..., head * size : (head + 1) * size]
            kv_head = kv[..., head * (nope + v_size) : (head + 1) * (nope + v_size)]
            scores = q_head[..., :nope] @ kv_head[..., :nope].mT + self.rope(q_head[..., nope:]) @ k_rope.mT
            scores = scores * (self.stretch(m.yarn.mscale_all_dim) ** 2 / math.sqrt(size))
            later = torch.ones_like(scores, dtype=torch.bool).triu(1)
            out.append(torch.softmax(scores.masked_fill(later, -torch.inf), -1) @ kv_head[..., nope:])
        return torch.cat(out, -1) @ w[f"{name}.o_proj.weight"].T

    def stretch(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.m.yarn.factor) + 1.0

    def rope(self, x: Tensor) -> Tensor:
        """Frequencies in FP32, as the model's are: a table of rounded angles is part of the definition."""
        m, yarn, half = self.m, self.m.yarn, self.m.qk_rope_head_dim // 2

        def slot(rotations: float) -> float:
            return half * math.log(yarn.original_length / (2 * math.pi * rotations)) / math.log(m.rope_theta)

        turns = 1.0 / m.rope_theta ** (torch.arange(0, 2 * half, 2).float() / (2 * half))
        if yarn.factor > 1:
            low, high = (
                max(math.floor(slot(yarn.beta_fast)), 0),
                min(math.ceil(slot(yarn.beta_slow)), 2 * half - 1),
            )
            slowed = ((torch.arange(half).float() - low) / max(high - low, 0.001)).clamp(0, 1)
            turns = turns * (1 - slowed) + turns / yarn.factor * slowed
        angles = torch.arange(x.shape[-2]).float().unsqueeze(-1) * turns
        ratio = self.stretch(yarn.mscale) / self.stretch(yarn.mscale_all_dim)
        unit = torch.polar(torch.full_like(angles, ratio), angles)
        cos, sin = unit.real.to(x.dtype), unit.imag.to(x.dtype)
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)

    def ffn(self, x: Tensor, name: str) -> Tensor:
        gate, up = x @ self.w[f"{name}.gate_proj.weight"].T, x @ self.w[f"{name}.up_proj.weight"].T
        return (gate / (1 + torch.exp(-gate)) * up) @ self.w[f"{name}.down_proj.weight"].T

    def experts(self, x_TD: Tensor, name: str) -> Tensor:
        """One sequence at a time, since the balance loss is per sequence."""
        m = self.m
        scores_TE = torch.sigmoid(x_TD @ self.w[f"{name}.gate.weight"].T)
        chosen = choose(scores_TE.detach() + self.w[f"{name}.gate.e_score_correction_bias"], m)
        weights_TE = scores_TE * chosen
        weights_TE = weights_TE / weights_TE.sum(-1, keepdim=True) * m.routed_scale
        rows = []
        for x, weights_E, picked_E in zip(x_TD, weights_TE, chosen, strict=True):
            parts = [
                weights_E[e] * self.ffn(x, f"{name}.experts.{e}")
                for e in picked_E.nonzero().flatten().tolist()
            ]
            rows.append(torch.stack(parts).sum(0))
        self.balance_of(scores_TE, len(x_TD))
        return torch.stack(rows) + self.ffn(x_TD, f"{name}.shared_experts")

    def balance_of(self, scores_TE: Tensor, length: int) -> None:
        """V3 report eq. 17-20 for one sequence, without alpha; ``losses`` takes the mean over sequences."""
        m = self.m
        unrestricted = scores_TE.detach().argsort(-1, descending=True)[:, : m.experts_per_token]
        total = torch.zeros((), dtype=scores_TE.dtype)
        for e in range(m.num_routed_experts):
            frequency = m.num_routed_experts / (m.experts_per_token * length) * int((unrestricted == e).sum())
            total = total + frequency * (scores_TE[:, e] / scores_TE.sum(-1)).mean()
        self.balance.append(total)


def choose(biased_TE: Tensor, m: ModelConfig) -> Tensor:
    """Which experts each token uses, as a mask, by sorting Python lists."""
    mask = torch.zeros_like(biased_TE, dtype=torch.bool)
    size, best = m.num_routed_experts // m.num_expert_groups, m.experts_per_token // m.expert_groups_per_token
    for token, row in enumerate(biased_TE.tolist()):
        groups = [row[g * size : (g + 1) * size] for g in range(m.num_expert_groups)]
        value = [sum(sorted(group)[-best:]) for group in groups]
        kept = sorted(range(m.num_expert_groups), key=lambda g: -value[g])[: m.expert_groups_per_token]
        open_experts = [e for g in kept for e in range(g * size, (g + 1) * size)]
        for expert in sorted(open_experts, key=lambda e: -row[e])[: m.experts_per_token]:
            mask[token, expert] = True
    return mask
