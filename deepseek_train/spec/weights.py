"""Every weight of the model as data, before any exists as a tensor: name, shape, init, sharing, published names.

THE single table of weights: the modules are tested against it, the optimizer groups, checkpoints and the Hugging
Face export read it. Order is the order of the forward pass.

Legend: V vocabulary, D hidden, H heads, E routed experts, F feed-forward size.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from math import prod

from deepseek_train.config.schema import ModelConfig


class Init(Enum):
    NORMAL = "normal"  # N(0, model.init_std), V3 report section 4.2
    ONES = "ones"
    ZEROS = "zeros"


@dataclass(frozen=True)
class HfSlice:
    """Rows [start, stop) of the weight's second-to-last axis are published as ``name``; ``{expert}`` in a name stands
    for the index of the first axis."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class WeightSpec:
    """One logical weight. ``expert`` weights have the expert as first axis, split over expert-parallel ranks."""

    name: str
    shape: tuple[int, ...]
    hf: tuple[HfSlice, ...]
    init: Init = Init.NORMAL
    expert: bool = False
    trained: bool = True  # False: a buffer that no gradient reaches (the router's balance bias)
    copies: tuple[str, ...] = ()  # published once more, whole, under these names

    @property
    def decayed(self) -> bool:
        """Weight decay is applied to matrices, not to norm gains."""
        return len(self.shape) > 1

    @property
    def linear(self) -> bool:
        """A matrix of attention, feed-forward networks or experts: what DeepSeek-V3 publishes in FP8. Embedding, head,
        routers and the MTP modules' join are not."""
        return self.decayed and self.name.rsplit(".", 1)[-1] not in ("embed", "head", "weight", "join")

    @property
    def size(self) -> int:
        return prod(self.shape)


def _whole(name: str, shape: tuple[int, ...], hf: str) -> WeightSpec:
    return WeightSpec(name, shape, (HfSlice(hf, 0, shape[0]),))


def _gain(name: str, size: int, hf: str) -> WeightSpec:
    return WeightSpec(name, (size,), (HfSlice(hf, 0, size),), Init.ONES)


def _ffn(name: str, hf: str, hidden: int, inner: int) -> Iterator[WeightSpec]:
    """A SwiGLU feed-forward network; gate and up projections are one matrix, gate rows first."""
    gate_up = HfSlice(f"{hf}.gate_proj.weight", 0, inner), HfSlice(f"{hf}.up_proj.weight", inner, 2 * inner)
    yield WeightSpec(f"{name}.gate_up", (2 * inner, hidden), gate_up)
    yield _whole(f"{name}.down", (hidden, inner), f"{hf}.down_proj.weight")


def _attention(m: ModelConfig, name: str, hf: str) -> Iterator[WeightSpec]:
    """Multi-head latent attention (V2 report section 2.1)."""
    d, q_out = m.hidden_size, m.num_heads * (m.qk_nope_head_dim + m.qk_rope_head_dim)
    if m.q_lora_rank is None:
        yield _whole(f"{name}.q", (q_out, d), f"{hf}.q_proj.weight")
    else:
        yield _whole(f"{name}.q_a", (m.q_lora_rank, d), f"{hf}.q_a_proj.weight")
        yield _gain(f"{name}.q_a_norm", m.q_lora_rank, f"{hf}.q_a_layernorm.weight")
        yield _whole(f"{name}.q_b", (q_out, m.q_lora_rank), f"{hf}.q_b_proj.weight")
    yield _whole(f"{name}.kv_a", (m.kv_lora_rank + m.qk_rope_head_dim, d), f"{hf}.kv_a_proj_with_mqa.weight")
    yield _gain(f"{name}.kv_a_norm", m.kv_lora_rank, f"{hf}.kv_a_layernorm.weight")
    kv_out = m.num_heads * (m.qk_nope_head_dim + m.v_head_dim)
    yield _whole(f"{name}.kv_b", (kv_out, m.kv_lora_rank), f"{hf}.kv_b_proj.weight")
    yield _whole(f"{name}.o", (d, m.num_heads * m.v_head_dim), f"{hf}.o_proj.weight")


def _block(m: ModelConfig, name: str, hf: str, *, dense: bool) -> Iterator[WeightSpec]:
    d, e, f = m.hidden_size, m.num_routed_experts, m.expert_ffn_size
    yield _gain(f"{name}.attention_norm", d, f"{hf}.input_layernorm.weight")
    yield from _attention(m, f"{name}.attention", f"{hf}.self_attn")
    yield _gain(f"{name}.ffn_norm", d, f"{hf}.post_attention_layernorm.weight")
    if dense:
        yield from _ffn(f"{name}.ffn", f"{hf}.mlp", d, m.dense_ffn_size)
        return
    yield _whole(f"{name}.router.weight", (e, d), f"{hf}.mlp.gate.weight")
    bias = HfSlice(f"{hf}.mlp.gate.e_score_correction_bias", 0, e)
    yield WeightSpec(f"{name}.router.bias", (e,), (bias,), Init.ZEROS, trained=False)
    if m.num_shared_experts:
        yield from _ffn(f"{name}.shared", f"{hf}.mlp.shared_experts", d, m.num_shared_experts * f)
    one = f"{hf}.mlp.experts.{{expert}}"
    gate_up = HfSlice(f"{one}.gate_proj.weight", 0, f), HfSlice(f"{one}.up_proj.weight", f, 2 * f)
    yield WeightSpec(f"{name}.experts.gate_up", (e, 2 * f, d), gate_up, expert=True)
    yield WeightSpec(
        f"{name}.experts.down", (e, d, f), (HfSlice(f"{one}.down_proj.weight", 0, d),), expert=True
    )


def embedding(m: ModelConfig) -> tuple[WeightSpec, ...]:
    whole = _whole("embed", (m.vocab_size, m.hidden_size), "model.embed_tokens.weight")
    copies = _in_mtp(m, "embed_tokens.weight")
    if m.tie_embeddings:
        copies += _in_mtp(m, "shared_head.head.weight")
    return (replace(whole, copies=copies),)


def layer(m: ModelConfig, index: int) -> tuple[WeightSpec, ...]:
    """The weights of transformer layer ``index``."""
    dense = index < m.num_dense_layers
    return tuple(_block(m, f"layers.{index}", f"model.layers.{index}", dense=dense))


def head(m: ModelConfig) -> tuple[WeightSpec, ...]:
    """A tied head has no matrix of its own, here and in what is published."""
    norm = _gain("final_norm", m.hidden_size, "model.norm.weight")
    if m.tie_embeddings:
        return (norm,)
    whole = _whole("head", (m.vocab_size, m.hidden_size), "lm_head.weight")
    return norm, replace(whole, copies=_in_mtp(m, "shared_head.head.weight"))


def _in_mtp(m: ModelConfig, name: str) -> tuple[str, ...]:
    """Where DeepSeek publishes the embedding, or the head, again: in each MTP module, which uses the main model's."""
    return tuple(f"model.layers.{m.num_layers + depth}.{name}" for depth in range(m.mtp_depth))


def mtp(m: ModelConfig, depth: int) -> tuple[WeightSpec, ...]:
    """What is unique to the MTP module of depth ``depth`` (0 is the first). Its embedding and head are the main
    model's; its position among the published layers is num_layers + depth."""
    name, hf, d = f"mtp.{depth}", f"model.layers.{m.num_layers + depth}", m.hidden_size
    return (
        _gain(f"{name}.embed_norm", d, f"{hf}.enorm.weight"),
        _gain(f"{name}.hidden_norm", d, f"{hf}.hnorm.weight"),
        _whole(f"{name}.join", (d, 2 * d), f"{hf}.eh_proj.weight"),
        *_block(m, f"{name}.block", hf, dense=False),
        _gain(f"{name}.final_norm", d, f"{hf}.shared_head.norm.weight"),
    )


def all_weights(m: ModelConfig) -> tuple[WeightSpec, ...]:
    """The whole model, MTP modules last."""
    layers = tuple(w for i in range(m.num_layers) for w in layer(m, i))
    modules = tuple(w for k in range(m.mtp_depth) for w in mtp(m, k))
    return embedding(m) + layers + head(m) + modules


def count_parameters(weights: tuple[WeightSpec, ...]) -> int:
    """Elements of ``weights``, counted as DeepSeek publishes them: the routers' balance biases included."""
    return sum(w.size for w in weights)


def count_active_parameters(m: ModelConfig) -> int:
    """Elements that one token's forward pass of the main model touches, embedding and head matrices included."""
    weights = [w for w in all_weights(m) if not w.name.startswith("mtp.")]
    return sum(w.size * m.experts_per_token // m.num_routed_experts if w.expert else w.size for w in weights)
