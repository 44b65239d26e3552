"""Floating-point operations of one token in every part of the model, from the table of weights.

A matrix takes a multiplication and an addition an element, in the forward pass, for the gradient of its input and for
its own gradient alike; of the routed experts the chosen ones count. Attention's products with earlier positions have no
weight: their backward is all input gradient, twice the forward. Norms, activations, softmax and all that is moved
rather than computed (tokens between experts, optimizer) are not counted.

Legend: T positions of a sequence, H heads, D hidden, V vocabulary.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from deepseek_train.config.schema import ModelConfig
from deepseek_train.spec import weights as table
from deepseek_train.spec.weights import WeightSpec


@dataclass(frozen=True)
class Work:
    """Operations per token, by the three kinds of work that a schedule moves about."""

    forward: int = 0
    backward_input: int = 0
    backward_weight: int = 0

    @property
    def total(self) -> int:
        return self.forward + self.backward_input + self.backward_weight

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.forward + other.forward,
            self.backward_input + other.backward_input,
            self.backward_weight + other.backward_weight,
        )


def embedding(m: ModelConfig) -> Work:
    """A row is looked up; its gradient is added to the accumulator."""
    return Work(backward_weight=m.hidden_size)


def attention(m: ModelConfig, index: int, sequence_length: int) -> Work:
    """Latent attention of layer ``index``: its projections, and causal attention over the (T + 1) / 2 positions that a
    token sees on average."""
    projections = _matrices(m, (w for w in table.layer(m, index) if ".attention." in w.name))
    return projections + _causal(m, sequence_length)


def feed_forward(m: ModelConfig, index: int) -> Work:
    """The dense network of a leading layer, or router, shared and chosen experts."""
    return _matrices(m, (w for w in table.layer(m, index) if ".attention." not in w.name))


def layer(m: ModelConfig, index: int, sequence_length: int) -> Work:
    """Transformer layer ``index``."""
    return attention(m, index, sequence_length) + feed_forward(m, index)


def head(m: ModelConfig) -> Work:
    """The output projection, its weight the head's own or the embedding's."""
    return _matrix(m.vocab_size * m.hidden_size)


def mtp(m: ModelConfig, sequence_length: int) -> Work:
    """One MTP module: it embeds, joins, runs a MoE layer and the head."""
    own = _matrices(m, table.mtp(m, 0))
    return embedding(m) + own + _causal(m, sequence_length) + head(m)


def model(m: ModelConfig, sequence_length: int) -> Work:
    """The main model, without MTP modules."""
    layers = (layer(m, index, sequence_length) for index in range(m.num_layers))
    return sum(layers, embedding(m) + head(m))


def training(m: ModelConfig, sequence_length: int) -> Work:
    """Main model and MTP modules: what a token of training costs, and what TFLOP/s and MFU count."""
    modules = (mtp(m, sequence_length) for _ in range(m.mtp_depth))
    return sum(modules, model(m, sequence_length))


def _causal(m: ModelConfig, sequence_length: int) -> Work:
    """Scores and weighted values: 2 H (Q + V) operations for each of (T + 1) / 2 positions."""
    sizes = m.qk_nope_head_dim + m.qk_rope_head_dim + m.v_head_dim
    forward = m.num_heads * sizes * (sequence_length + 1)
    return Work(forward, 2 * forward)


def _matrices(m: ModelConfig, weights: Iterable[WeightSpec]) -> Work:
    elements = 0
    for w in weights:
        if len(w.shape) > 1:
            elements += w.size // m.num_routed_experts * m.experts_per_token if w.expert else w.size
    return _matrix(elements)


def _matrix(elements: int) -> Work:
    return Work(2 * elements, 2 * elements, 2 * elements)
