"""The model computes what the published weights mean: logits against transformers' DeepseekV3, MTP against
the written formula, both fed through the names of ``spec.weights``.

Legend: B sequences, T positions, D hidden, V vocabulary.
"""

import pytest
import torch
from torch import Tensor, nn
from transformers import DeepseekV3ForCausalLM

from deepseek_train.config.schema import ModelConfig
from deepseek_train.model.stage import Stage
from deepseek_train.phases.phase import fold
from deepseek_train.phases.values import MicroBatch
from tests.helpers.hf import hf_model, published
from tests.helpers.models import YARN, random_batch, table_tensors, tiny, whole_model
from tests.helpers.plain import Plain

LENGTH = 48
MODELS = {
    "plain": tiny(),
    "yarn": tiny(yarn=YARN),
    "direct queries": tiny(q_lora_rank=None),
    "yarn, direct queries, two shared experts": tiny(yarn=YARN, q_lora_rank=None, num_shared_experts=2),
    "all layers with experts": tiny(num_dense_layers=0),
    "tied head": tiny(tie_embeddings=True),
}
# FP32 rounds at 6e-8 and a logit passes some hundred roundings. Measured against the same model in FP64, ours
# and transformers' are each up to 2e-6 away.
FP32_BOUND = 5e-6


@torch.no_grad()
def our_logits(stage: Stage, batch: MicroBatch) -> Tensor:
    return stage.logits(fold(stage.trunk, batch))


@torch.no_grad()
def hf_hidden(model: DeepseekV3ForCausalLM, tokens_BT: Tensor, num_layers: int) -> Tensor:
    """What the main model hands to its MTP modules: the state after ``model.norm``."""
    x_BTD = model.model.embed_tokens(tokens_BT)
    for layer in model.model.layers[:num_layers]:
        x_BTD = hf_block(model, layer, x_BTD)
    return model.model.norm(x_BTD)


@torch.no_grad()
def hf_block(model: DeepseekV3ForCausalLM, layer: nn.Module, x_BTD: Tensor) -> Tensor:
    length = x_BTD.shape[1]
    angles = model.model.rotary_emb(x_BTD, torch.arange(length).unsqueeze(0))
    mask = torch.full((1, 1, length, length), -torch.inf, dtype=x_BTD.dtype).triu(1)
    return layer(x_BTD, attention_mask=mask, position_embeddings=angles)


@pytest.mark.parametrize("m", MODELS.values(), ids=MODELS)
def test_logits_are_those_of_transformers(m: ModelConfig) -> None:
    stage, batch = whole_model(m, length=LENGTH), random_batch(m, 3, LENGTH)
    model = hf_model(m, published(table_tensors(stage), m))
    ours, tokens_BT = our_logits(stage, batch), batch.tokens[:, :LENGTH]
    theirs = model.lm_head(hf_hidden(model, tokens_BT, m.num_layers))
    assert theirs.std() > 0.5
    assert (ours - theirs).abs().max() < FP32_BOUND


def test_the_model_called_as_users_call_it() -> None:
    """Without the hand-made mask and layer loop of the other tests."""
    m = tiny(mtp_depth=0)
    stage, batch = whole_model(m, length=LENGTH), random_batch(m, 3, LENGTH)
    model = hf_model(m, published(table_tensors(stage), m))
    with torch.no_grad():
        theirs = model(batch.tokens[:, :LENGTH]).logits
    assert (our_logits(stage, batch) - theirs).abs().max() < FP32_BOUND


def test_gains_biases_and_groups_matter() -> None:
    """Each thing the comparison is meant to see changes the logits by far more than its bound."""
    m = tiny()
    stage, batch = whole_model(m, length=LENGTH), random_batch(m, 3, LENGTH)
    before = our_logits(stage, batch)
    weights = stage.weights()
    gains = [name for name, weight in weights.items() if weight.ndim == 1 and not name.startswith("mtp.")]
    assert len(gains) == 4 * m.num_layers + 1
    for name in gains:
        with torch.no_grad():
            weights[name].mul_(1.01)
            assert (our_logits(stage, batch) - before).abs().max() > 100 * FP32_BOUND, name
            weights[name].div_(1.01)
    for index, router in stage.routers():
        if index < m.num_layers:
            kept = router.bias.clone()
            router.bias.zero_()
            assert (our_logits(stage, batch) - before).abs().max() > 0.1
            router.bias.copy_(kept)
    ungrouped = whole_model(tiny(num_expert_groups=1, expert_groups_per_token=1), length=LENGTH)
    assert (our_logits(ungrouped, batch) - before).abs().max() > 0.1


@pytest.mark.parametrize("m", [MODELS["plain"], MODELS["yarn"]], ids=["plain", "yarn"])
def test_bf16_is_as_exact_as_transformers_in_bf16(m: ModelConfig) -> None:
    """The same BF16 weights computed in FP32 are the truth. Two correct BF16 models are equally far from it,
    give or take the luck of the roundings: ours sums a token's experts in another order, so equality is not
    expected."""
    stage, batch = whole_model(m, length=LENGTH, dtype=torch.bfloat16), random_batch(m, 3, LENGTH)
    tensors = table_tensors(stage)
    state, tokens_BT = published(tensors, m), batch.tokens[:, :LENGTH]
    exact = hf_model(m, {name: t.float() for name, t in state.items()})
    rounded = hf_model(m, state, torch.bfloat16)
    with torch.no_grad():
        truth = exact.lm_head(hf_hidden(exact, tokens_BT, m.num_layers))
        theirs = rounded.lm_head(hf_hidden(rounded, tokens_BT, m.num_layers)).float()
    ours = our_logits(stage, batch).float()

    def distance(a: Tensor, b: Tensor) -> float:
        """Median over tokens, relative: a token whose experts flip on a rounding is far away in either
        model."""
        return float(((a - b).norm(dim=-1) / b.norm(dim=-1)).median())

    print(f"bf16: {distance(ours, truth):.4f} (theirs {distance(theirs, truth):.4f}) from FP32, "
          f"{distance(ours, theirs):.4f} from each other")  # fmt: skip
    assert 2**-9 < distance(theirs, truth) < 2**-4
    assert distance(ours, truth) < 1.5 * distance(theirs, truth)
    assert distance(ours, theirs) < distance(ours, truth) + distance(theirs, truth)


@pytest.mark.parametrize("m", [tiny(), tiny(mtp_depth=2, yarn=YARN)], ids=["depth 1", "depth 2, yarn"])
def test_mtp_is_the_published_module(m: ModelConfig) -> None:
    """[enorm(emb(t_{i+1})); hnorm(h_i)] -> eh_proj -> one MoE block -> shared_head.norm -> lm_head, h after
    model.norm; the block is transformers' own decoder layer."""
    stage, batch = whole_model(m, length=LENGTH), random_batch(m, 3, LENGTH)
    state = published(table_tensors(stage), m)
    model = hf_model(m, state)

    def norm(x: Tensor, name: str) -> Tensor:
        return state[name] * (x / (x.square().mean(-1, keepdim=True) + m.norm_eps).sqrt())

    hidden = hf_hidden(model, batch.tokens[:, :LENGTH], m.num_layers)
    losses = []
    for depth in range(m.mtp_depth):
        name, start = f"model.layers.{m.num_layers + depth}", depth + 1
        embedded = model.model.embed_tokens(batch.tokens[:, start : start + LENGTH])
        both = torch.cat([norm(embedded, f"{name}.enorm.weight"), norm(hidden, f"{name}.hnorm.weight")], -1)
        hidden = both @ state[f"{name}.eh_proj.weight"].t()
        hidden = hf_block(model, model.model.layers[m.num_layers + depth], hidden)
        hidden = norm(hidden, f"{name}.shared_head.norm.weight")
        logits = model.lm_head(hidden)
        labels = batch.tokens[:, start + 1 : start + 1 + LENGTH]
        losses.append(nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))
    with torch.no_grad():
        left = stage(batch)
    assert left.ledger.mtp is not None
    assert (left.x_BTD - hidden).abs().max() < FP32_BOUND
    assert (left.ledger.mtp - torch.stack(losses).mean()).abs() < FP32_BOUND


@pytest.mark.parametrize("m", [tiny(), tiny(yarn=YARN, q_lora_rank=None)], ids=["plain", "yarn"])
def test_the_plain_model_of_the_gradient_tests_is_right(m: ModelConfig) -> None:
    """``helpers.plain``, the reference in FP64, agrees with transformers too."""
    stage, batch = whole_model(m, length=LENGTH), random_batch(m, 2, LENGTH)
    state = published(table_tensors(stage), m)
    model = hf_model(m, state)
    logits = model.lm_head(hf_hidden(model, batch.tokens[:, :LENGTH], m.num_layers))
    theirs = nn.functional.cross_entropy(logits.flatten(0, 1), batch.tokens[:, 1 : 1 + LENGTH].flatten())
    assert (Plain(m, state).losses(batch.tokens).main - theirs).abs() < FP32_BOUND
