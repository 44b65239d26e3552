"""transformers loads an export as users load it: every key used, and the logits are our model's."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from deepseek_train.checkpoint.hf_config import to_hf
from deepseek_train.checkpoint.hf_export import export
from deepseek_train.checkpoint.hf_folder import HfFolder
from deepseek_train.checkpoint.hf_tokenizer import token_ids, tokenizer_files
from deepseek_train.config.schema import ModelConfig
from deepseek_train.data.tokenizer import load_tokenizer
from deepseek_train.phases.phase import fold
from tests.helpers.hf import hf_model, published
from tests.helpers.hf_folders import assert_same, config_of, exported, tensors_of
from tests.helpers.models import YARN, random_batch, table_tensors, tiny, whole_model
from tests.paper.models import shipped

LENGTH = 48
FP32_BOUND = 5e-6  # as in test_model_parity.py
MODELS = {
    "plain": tiny(mtp_depth=0),
    "plain, mtp": tiny(),
    "yarn": tiny(mtp_depth=0, yarn=YARN),
    "yarn, mtp": tiny(yarn=YARN),
    "direct queries, two shared experts": tiny(q_lora_rank=None, num_shared_experts=2),
    "tied head": tiny(tie_embeddings=True),
}


def load(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, dict[str, Any]]:
    """The model, and transformers' report about keys. No code of the folder is run."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        trust_remote_code=False,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )


def assert_all_used(report: dict[str, Any], m: ModelConfig) -> None:
    """All keys, but the MTP modules': these transformers passes over in silence at depth 61 alone."""
    mtp = tuple(f"model.layers.{m.num_layers + depth}." for depth in range(m.mtp_depth))
    assert [name for name in report["unexpected_keys"] if not name.startswith(mtp)] == []
    assert bool(report["unexpected_keys"]) == bool(mtp)
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]


@torch.no_grad()
def logits(model: Any, tokens_BT: Tensor) -> Tensor:
    found: Tensor = model(tokens_BT, use_cache=False).logits
    return found


@pytest.mark.parametrize("m", MODELS.values(), ids=MODELS)
def test_logits_are_our_model_s(tmp_path: Path, m: ModelConfig) -> None:
    stage, batch = whole_model(m, length=LENGTH), random_batch(m, 2, LENGTH)
    model, report = load(exported(tmp_path, m, table_tensors(stage)))
    assert_all_used(report, m)
    with torch.no_grad():
        ours = stage.logits(fold(stage.trunk, batch))
    theirs = logits(model, batch.tokens[:, :LENGTH])
    assert theirs.std() > 0.5
    assert (ours - theirs).abs().max() < FP32_BOUND


@pytest.mark.parametrize("m", [MODELS["plain, mtp"], MODELS["yarn"]], ids=["plain, mtp", "yarn"])
def test_bf16_is_the_very_model_that_was_trained(tmp_path: Path, m: ModelConfig) -> None:
    """A BF16 model of ours, by way of masters and file, and its weights given to transformers by hand: the same model,
    so the same logits. (How close transformers' BF16 is to our own: test_model_parity.py.)"""
    stage, batch = whole_model(m, length=LENGTH, dtype=torch.bfloat16), random_batch(m, 2, LENGTH)
    weights = table_tensors(stage)
    model, report = load(exported(tmp_path, m, weights, "bf16"), torch.bfloat16)
    assert_all_used(report, m)
    main = replace(m, mtp_depth=0)  # else its block would be one more layer of theirs
    by_hand = hf_model(main, published(weights, main), torch.bfloat16)
    tokens_BT = batch.tokens[:, :LENGTH]
    assert torch.equal(logits(model, tokens_BT), logits(by_hand, tokens_BT))


def test_what_transformers_saves_comes_in(tmp_path: Path) -> None:
    """It writes ``rope_parameters``, and no MTP module."""
    m = tiny(yarn=YARN, mtp_depth=0)
    first = exported(tmp_path, m, table_tensors(whole_model(m, length=LENGTH)))
    load(first)[0].save_pretrained(tmp_path / "theirs")
    assert "rope_parameters" in config_of(tmp_path / "theirs")
    folder = HfFolder.open(tmp_path / "theirs")
    assert folder.model == HfFolder.open(first).model
    export(folder, tmp_path / "again", "fp32", extras={}, tokens={}, shard_bytes=10**9)
    assert_same(tensors_of(first), tensors_of(tmp_path / "again"))


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_16b", "tiny"])
def test_the_shipped_models_as_transformers_reads_them(tmp_path: Path, name: str) -> None:
    m = shipped(name)
    (tmp_path / "config.json").write_text(json.dumps(to_hf(m, "fp8", {"bos_token_id": 5})))
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config).__name__ == "DeepseekV3Config"
    for ours, theirs in {
        m.num_layers: config.num_hidden_layers,
        m.num_dense_layers: config.first_k_dense_replace,
        m.mtp_depth: config.num_mtp_layers,
        m.q_lora_rank: config.q_lora_rank,
        m.routed_scale: config.routed_scaling_factor,
        m.num_expert_groups: config.n_group,
        m.expert_groups_per_token: config.topk_group,
        m.rope_theta: config.rope_parameters["rope_theta"],
        m.tie_embeddings: config.tie_word_embeddings,
        5: config.bos_token_id,
    }.items():
        assert ours == theirs
    assert config.quantization_config["weight_block_size"] == [128, 128]


def test_the_tokenizer_loads_and_agrees(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("builtin")
    for name, content in tokenizer_files(tokenizer, 128).items():
        (tmp_path / name).write_bytes(content)
    fields = to_hf(shipped("tiny"), "bf16", token_ids(tokenizer))
    (tmp_path / "config.json").write_text(json.dumps(fields))
    theirs = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    text = "def f(x):\n    return 12345 + x  # naïve, 漢字 かな\n\n"
    assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)
    assert theirs.decode(tokenizer.encode(text)) == text
    found = theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id
    assert found == (tokenizer.special.bos, tokenizer.special.eos, tokenizer.special.pad)
    assert found == tuple(fields[f"{role}_token_id"] for role in ("bos", "eos", "pad"))
    assert theirs.model_max_length == 128
