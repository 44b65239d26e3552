"""Tokens generated with the cache are those generated without it, by the training model on the whole text each time."""

from dataclasses import replace

import pytest
import torch

from deepseek_train.config.schema import ModelConfig
from deepseek_train.generate.continuation import continuation
from deepseek_train.generate.load import decoding_stage
from deepseek_train.generate.sampling import Sampling, choose
from deepseek_train.model.decode import LatentCache, decode
from deepseek_train.model.stage import Stage
from deepseek_train.parallel.expert.announce import RoutingFault
from deepseek_train.phases.phase import fold
from deepseek_train.phases.values import MicroBatch
from tests.helpers.memory_source import MemorySource
from tests.helpers.models import YARN, table_tensors, tiny, whole_model

CPU = torch.device("cpu")
# Weights large enough that what comes next depends on all that was; smaller ones repeat one token.
LIVELY = tiny(init_std=0.3)
MODELS = {"plain": LIVELY, "YaRN, plain queries": replace(LIVELY, q_lora_rank=None, yarn=YARN)}
PROMPT, TOKENS, NO_STOP = [5, 17, 3, 88, 41, 2, 60], 40, -1
LENGTH = len(PROMPT) + TOKENS


def generated(stage: Stage, sampling: Sampling, *, prompt: list[int] = PROMPT, **asked: int) -> list[int]:
    how = {"seed": 4, "stop": NO_STOP, "vocab_size": 96, **asked}
    return list(continuation(stage, prompt, TOKENS, sampling, **how))


@torch.no_grad()
def without_cache(stage: Stage, sampling: Sampling, prompt: list[int] = PROMPT) -> list[int]:
    ids, generator = list(prompt), torch.Generator().manual_seed(4)
    for _ in range(TOKENS):
        more = [0] * (1 + stage.context.model.mtp_depth)
        hidden = fold(stage.trunk, MicroBatch(torch.tensor([ids + more])))
        ids.append(choose(stage.logits(hidden)[0, -1], sampling, generator))
    return ids[len(prompt) :]


@pytest.mark.parametrize("sampling", [Sampling(0.0), Sampling(1.0, 0.9)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("m", MODELS.values(), ids=MODELS)
def test_tokens_are_those_without_the_cache(m: ModelConfig, sampling: Sampling) -> None:
    """The stage that decodes is made of stored weights, the other is the one that trains, MTP module and all."""
    trained = whole_model(m, length=LENGTH)
    decoding = decoding_stage(MemorySource.of(trained), LENGTH, CPU, torch.float32)
    found = generated(decoding, sampling)
    assert found == without_cache(trained, sampling)
    assert len(set(found)) > 10, "a model that repeats itself would hide errors"


STAGE = whole_model(LIVELY, length=LENGTH)


def test_a_prompt_of_one_token() -> None:
    assert generated(STAGE, Sampling(0.0), prompt=[9]) == without_cache(STAGE, Sampling(0.0), [9])


def test_the_seed_decides() -> None:
    sampling = Sampling(1.0, 1.0)
    assert generated(STAGE, sampling, seed=1) == generated(STAGE, sampling, seed=1)
    assert generated(STAGE, sampling, seed=1) != generated(STAGE, sampling, seed=2)


def test_it_ends_before_the_stop() -> None:
    whole = generated(STAGE, Sampling(0.0))
    assert generated(STAGE, Sampling(0.0), stop=whole[12]) == whole[: whole.index(whole[12])]


def test_tokens_that_the_tokenizer_does_not_know_are_never_chosen() -> None:
    assert max(generated(STAGE, Sampling(1.0, 1.0))) >= 50
    assert max(generated(STAGE, Sampling(1.0, 1.0), vocab_size=50)) < 50


def test_the_stage_holds_the_stored_weights_rounded_and_no_mtp() -> None:
    source = MemorySource.of(STAGE)
    stage = decoding_stage(source, LENGTH, CPU, torch.bfloat16)
    found = table_tensors(stage)
    assert found.keys() == {name for name in source.tensors if not name.startswith("mtp.")}
    for name, tensor in found.items():
        assert torch.equal(tensor, source.tensors[name].to(tensor.dtype)), name
    assert found["embed"].dtype == torch.bfloat16
    assert found["layers.1.router.bias"].dtype == torch.float32


def test_bf16_says_nearly_the_same() -> None:
    """Of the first token: BF16 keeps 8 bits, logits spread by 0.9, and a few per cent of that is what rounding does."""
    logits = []
    for dtype in (torch.float32, torch.bfloat16):
        stage = decoding_stage(MemorySource.of(STAGE), LENGTH, CPU, dtype)
        logits.append(next_logits(stage))
    assert 0 < (logits[0] - logits[1]).abs().max() < 0.1 * logits[0].std()


@torch.no_grad()
def next_logits(stage: Stage) -> torch.Tensor:
    cache = LatentCache(stage.context.model, 1, LENGTH, stage.context.dtype, CPU)
    decode(stage, torch.tensor([PROMPT]), cache)
    return stage.logits(decode(stage, torch.tensor([[1]]), cache)).float()


def test_weights_that_are_not_finite_are_told() -> None:
    broken = whole_model(LIVELY, length=LENGTH)
    with torch.no_grad():
        broken.weights()["layers.1.attention.o"].fill_(torch.nan)
    with pytest.raises(RoutingFault, match="layer 1.*not finite"):
        generated(broken, Sampling())
