"""Decoding with the latent cache gives what the training model gives without one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepseek_train.config.schema import ModelConfig
from deepseek_train.model.decode import LatentCache, cached_elements, decode
from deepseek_train.model.stage import Stage
from deepseek_train.phases.phase import fold
from deepseek_train.phases.values import Hidden, MicroBatch
from tests.helpers.models import YARN, random_batch, tiny, whole_model

LENGTH, PROMPT = 40, 24
MODELS = {
    "compressed queries": tiny(),
    "plain queries": tiny(q_lora_rank=None),
    "YaRN": tiny(yarn=YARN),
    "dense layers only": tiny(num_dense_layers=3, mtp_depth=0),
    "experts only, none shared": tiny(num_dense_layers=0, num_shared_experts=0),
    "tied head": tiny(tie_embeddings=True),
}
# Scores and values are the same sums of products, taken in another order. Each order is off from the exact value by
# what a logit's chain of operations rounds: some dozen a layer, three layers, then the head, each at most half a unit
# in the last place of values of the size of the largest logit. FP64 shows that nothing but rounding differs: there the
# bound is 2^29 times smaller, for the same number of roundings.
ROUNDINGS = 2 * (3 * 12 + 2)


def bound(logits: Tensor) -> float:
    return ROUNDINGS * torch.finfo(logits.dtype).eps / 2 * float(logits.abs().max())


@torch.no_grad()
def trained(stage: Stage, tokens_BT: Tensor) -> Hidden:
    """The trunk as training runs it. MTP's further tokens are not looked at by it."""
    more = tokens_BT.new_zeros(len(tokens_BT), 1 + stage.context.model.mtp_depth)
    return fold(stage.trunk, MicroBatch(torch.cat([tokens_BT, more], 1)))


def new_cache(stage: Stage, batch: int = 2, capacity: int = LENGTH) -> LatentCache:
    context = stage.context
    return LatentCache(context.model, batch, capacity, context.dtype, context.device)


def in_pieces(stage: Stage, tokens_BT: Tensor, sizes: list[int]) -> list[Hidden]:
    cache = new_cache(stage, len(tokens_BT), tokens_BT.shape[1])
    return [decode(stage, piece, cache) for piece in tokens_BT.split(sizes, 1)]


def joined(stage: Stage, pieces: list[Hidden]) -> Tensor:
    return torch.cat([stage.logits(piece) for piece in pieces], 1)


def loads(pieces: list[Hidden]) -> dict[int, list[int]]:
    """Tokens of each expert, by layer."""
    by_layer: dict[int, Tensor] = {}
    for piece in pieces:
        for load in piece.ledger.loads:
            by_layer[load.layer] = by_layer.get(load.layer, torch.zeros_like(load.tokens_E)) + load.tokens_E
    return {layer: tokens_E.tolist() for layer, tokens_E in by_layer.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("m", MODELS.values(), ids=MODELS)
@torch.no_grad()
def test_logits_and_routing_are_those_of_training(m: ModelConfig, dtype: torch.dtype) -> None:
    stage = whole_model(m, length=LENGTH, dtype=dtype)
    tokens_BT = random_batch(m, 2, LENGTH).tokens[:, :LENGTH]
    whole = trained(stage, tokens_BT)
    pieces = in_pieces(stage, tokens_BT, [PROMPT] + [1] * (LENGTH - PROMPT))
    expected = stage.logits(whole)
    assert expected.std() > 0.5
    assert (joined(stage, pieces) - expected).abs().max() < bound(expected)
    assert loads(pieces) == loads([whole])


@pytest.mark.parametrize("m", MODELS.values(), ids=MODELS)
@torch.no_grad()
def test_a_prompt_has_the_bits_of_training(m: ModelConfig) -> None:
    stage = whole_model(m, length=LENGTH)
    tokens_BT = random_batch(m, 2, PROMPT).tokens[:, :PROMPT]
    ours = decode(stage, tokens_BT, new_cache(stage))
    assert torch.equal(ours.x_BTD, trained(stage, tokens_BT).x_BTD)


STAGE = whole_model(tiny(yarn=YARN), length=LENGTH)
TOKENS_BT = random_batch(STAGE.context.model, 2, LENGTH).tokens[:, :LENGTH]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 8), min_size=1, max_size=5))
@torch.no_grad()
def test_it_is_all_one_in_which_pieces_tokens_come(sizes: list[int]) -> None:
    tokens_BT = TOKENS_BT[:, : sum(sizes)]
    expected = STAGE.logits(trained(STAGE, tokens_BT))
    assert (joined(STAGE, in_pieces(STAGE, tokens_BT, sizes)) - expected).abs().max() < bound(expected)


def test_a_piece_of_several_tokens_does_not_see_its_future() -> None:
    other_BT = TOKENS_BT.clone()
    other_BT[:, 20:] = (other_BT[:, 20:] + 1) % STAGE.context.model.vocab_size
    ours, theirs = (in_pieces(STAGE, tokens, [16, 8, 16])[1].x_BTD for tokens in (TOKENS_BT, other_BT))
    difference_BT = (ours - theirs).abs().amax(-1)
    assert difference_BT[:, :4].max() < bound(ours)  # experts have other companions, so not the same bits
    assert difference_BT[:, 4:].min() > 1e-2


def test_a_token_takes_one_latent_and_one_key_a_layer() -> None:
    m = tiny()
    cache = LatentCache(m, 3, 7, torch.bfloat16, torch.device("cpu"))
    assert cached_elements(m) == 3 * (16 + 4)
    assert cache.entries_LBSE.nbytes == 3 * 7 * 2 * cached_elements(m)


def test_nothing_but_the_cache_is_remembered() -> None:
    """What was not written, poison here, is not read; and exactly the tokens' places are written."""
    cache = new_cache(STAGE)
    cache.entries_LBSE.fill_(torch.nan)
    decode(STAGE, TOKENS_BT[:, :8], cache)
    assert decode(STAGE, TOKENS_BT[:, 8:9], cache).x_BTD.isfinite().all()
    for layer in range(3):
        assert cache.entries_LBSE[layer, :, :9].isfinite().all()
        assert cache.entries_LBSE[layer, :, 9:].isnan().all()


def test_the_cache_is_as_large_as_it_is() -> None:
    cache = new_cache(STAGE, capacity=9)
    decode(STAGE, TOKENS_BT[:, :8], cache)
    with pytest.raises(ValueError, match="10 positions do not fit a cache made for 9"):
        decode(STAGE, TOKENS_BT[:, 8:10], cache)
    assert cache.length == 8


def test_the_model_is_as_long_as_it_is() -> None:
    cache = new_cache(STAGE, capacity=LENGTH + 5)
    with pytest.raises(ValueError, match=f"{LENGTH + 1} positions, but the model was made for {LENGTH}"):
        decode(STAGE, torch.cat([TOKENS_BT, TOKENS_BT[:, :1]], 1), cache)
