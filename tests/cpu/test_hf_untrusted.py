"""Folders from elsewhere: whatever is wrong in one is said before a tensor is read, all at once, and nothing of it is
run."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from deepseek_train.checkpoint.errors import CheckpointError
from deepseek_train.checkpoint.hf_config import CONFIG, FP8, from_hf, to_hf
from deepseek_train.checkpoint.hf_folder import INDEX, ONE_FILE, HfFolder
from deepseek_train.checkpoint.hf_import import import_hf
from deepseek_train.config.schema import ModelConfig
from tests.helpers.hf_folders import change_config, exported, random_weights, tensors_of
from tests.helpers.models import YARN, tiny
from tests.paper.models import models, shipped

M = tiny(
    num_layers=2, num_routed_experts=4, num_expert_groups=2, experts_per_token=2, expert_groups_per_token=1
)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        HfFolder.open(folder)
    return str(caught.value)


def rewrite(folder: Path, tensors: dict[str, Tensor]) -> None:
    """One file, no index."""
    for path in [*folder.glob("model-*.safetensors"), folder / INDEX]:
        path.unlink(missing_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / ONE_FILE, {"format": "pt"})


@given(models())
def test_a_model_comes_back_from_its_config(m: ModelConfig) -> None:
    for dtype in ("bf16", "fp32", "fp8"):
        for one in (m, replace(m, yarn=YARN, embed_init_std=0.5)):
            content = json.loads(json.dumps(to_hf(one, dtype, {})))
            assert from_hf(content, "here", "other") == one


def test_deepseek_v3_as_published() -> None:
    """The fields of DeepSeek-V3's own config.json."""
    published: dict[str, Any] = {
        "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "auto_map": {"AutoModel": "modeling_deepseek.DeepseekV3Model"}, "bos_token_id": 0, "eos_token_id": 1,
        "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168,
        "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512,
        "max_position_embeddings": 163840, "model_type": "deepseek_v3", "moe_intermediate_size": 2048,
        "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True,
        "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
        "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "quantization_config": FP8, "rms_norm_eps": 1e-06,
        "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                         "original_max_position_embeddings": 4096, "type": "yarn"},
        "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
        "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16",
        "transformers_version": "4.33.1", "use_cache": True, "v_head_dim": 128, "vocab_size": 129280,
    }  # fmt: skip
    m = from_hf(published, "here", "deepseek_v3")
    ours = shipped("deepseek_v3")
    assert m == replace(ours, init_std=0.02, yarn=m.yarn)
    assert (m.yarn.factor, m.yarn.original_length, m.yarn.mscale_all_dim) == (40, 4096, 1)
    written = to_hf(m, "fp8", {"bos_token_id": 0, "eos_token_id": 1})
    beside = {"auto_map", "transformers_version"}
    assert {key: written[key] for key in published.keys() - beside} == {
        key: value for key, value in published.items() if key not in beside
    }


def test_all_that_is_wrong_with_a_config_at_once() -> None:
    content = to_hf(tiny(yarn=YARN), "bf16", {}) | {
        "hidden_size": "wide",
        "num_hidden_layers": -3,
        "vocab_size": 10**30,
        "scoring_func": "softmax",
        "num_key_value_heads": 1,
        "quantization_config": {"quant_method": "awq"},
        "rope_scaling": {"type": "yarn", "factor": 4, "long_factor": [1]},
    }
    del content["kv_lora_rank"]
    with pytest.raises(CheckpointError) as caught:
        from_hf(content, "place/config.json", "x")
    for said in (
        "place/config.json", "hidden_size: expected int, found 'wide'", "kv_lora_rank: missing",
        "scoring_func: is 'softmax'", "num_key_value_heads: is 1", "quantization_config.quant_method: is 'awq'",
        "rope_scaling.original_max_position_embeddings: missing", "rope_scaling.long_factor: is not known",
    ):  # fmt: skip
        assert said in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("num_hidden_layers", 10**9, "num_hidden_layers: is 1000000000"),
        ("n_routed_experts", 2**40, "n_routed_experts: is"),
        ("vocab_size", 0, "vocab_size: must be at least 1"),
        ("n_group", 3, "n_group: 3 groups do not divide"),
        ("rms_norm_eps", float("nan"), "rms_norm_eps: is nan"),
        ("rope_theta", 0, "rope_theta: is 0"),
        ("moe_layer_freq", True, "moe_layer_freq: is True"),
        ("rope_scaling", [1], "rope_scaling: expected an object"),
        ("rope_scaling", {"type": "linear", "factor": 2}, "rope_scaling.type: is linear"),
        ("model_type", "llama", "model_type: is 'llama'"),
    ],
)
def test_a_field_that_cannot_be(field: str, value: object, says: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        from_hf(to_hf(tiny(), "bf16", {}) | {field: value}, "here", "x")
    assert says in str(caught.value)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(to_hf(tiny(yarn=YARN), "fp8", {}))), ANYTHING, max_size=3))
def test_any_config_is_read_or_refused(fields: dict[str, Any]) -> None:
    try:
        m = from_hf(to_hf(tiny(yarn=YARN), "fp8", {}) | fields, "here", "x")
    except CheckpointError:
        return
    assert from_hf(to_hf(m, "fp8", {}), "here", "x") == m


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b'{"a":' * 9000, b'"' + b"x" * 2**20 + b'"'])
def test_what_is_no_config(tmp_path: Path, content: bytes) -> None:
    (tmp_path / CONFIG).write_bytes(content)
    assert str(tmp_path / CONFIG) in refused(tmp_path)


@pytest.mark.parametrize(
    "name", ["../other.safetensors", "/etc/passwd", "sub/a.safetensors", "a.bin", ".safetensors", 3, None]
)
def test_no_path_leads_out_of_the_folder(tmp_path: Path, name: object) -> None:
    folder = exported(tmp_path, M, random_weights(M))
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = name
    (folder / INDEX).write_text(json.dumps(index))
    assert f"names what is no safetensors file of this folder: {name}" in refused(folder)


def test_all_that_is_wrong_with_tensors_at_once(tmp_path: Path) -> None:
    folder = exported(tmp_path, M, random_weights(M), "fp8")
    tensors = tensors_of(folder)
    norm, gate, down = (
        "model.norm.weight",
        "model.layers.1.mlp.gate.weight",
        "model.layers.0.mlp.down_proj.weight",
    )
    tensors[norm] = tensors[norm].int()
    tensors[gate] = tensors[gate].t()
    tensors[down + "_scale_inv"] = tensors[down + "_scale_inv"].repeat(2, 1)
    tensors["model.layers.1.self_attn.indexer.weight"] = torch.zeros(1)
    del tensors["lm_head.weight"]
    rewrite(folder, tensors)
    said = refused(folder)
    for line in (
        f"{norm} is of type I32", f"{gate} has shape [32, 4], the configuration asks for [4, 32]",
        f"{down}_scale_inv is F32 [2, 1], not F32 [1, 1]", "indexer.weight has no place in the model",
        "lm_head.weight is missing",
    ):  # fmt: skip
        assert line in said
    assert said.count("\n  - ") == 5


def test_a_larger_model_than_there_are_tensors(tmp_path: Path) -> None:
    """Refused by the first few of a million missing names, before any memory is asked for."""
    folder = exported(tmp_path, M, random_weights(M))
    change_config(folder, num_hidden_layers=4000, n_routed_experts=2**14)
    said = refused(folder)
    assert "is missing" in said
    assert "... and more" in said


def test_shards_that_are_not_there_or_damaged(tmp_path: Path) -> None:
    folder = exported(tmp_path, M, random_weights(M), shard_bytes=10**5)
    first, second, *_ = sorted(folder.glob("model-*.safetensors"))
    content = second.read_bytes()
    second.write_bytes(content[:-1])
    assert f"{second} cannot be read" in refused(folder)
    second.write_bytes(b"\xff" * 8 + content[8:])
    assert f"{second} cannot be read" in refused(folder)
    second.unlink()
    assert f"{second} is missing" in refused(folder)
    second.write_bytes(first.read_bytes())
    assert f"is not in {second}, where the index has it" in refused(folder)


def test_pickles_are_not_even_looked_for(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text(json.dumps(to_hf(M, "bf16", {})))
    torch.save(random_weights(M), tmp_path / "pytorch_model.bin")
    assert f"{tmp_path / ONE_FILE} is missing" in refused(tmp_path)


def test_one_file_and_fp16_and_no_copies(tmp_path: Path) -> None:
    """As others may publish: MTP modules without a second embedding and head."""
    weights = random_weights(M)
    folder = exported(tmp_path, M, weights)
    copies = ("embed_tokens.weight", "shared_head.head.weight")
    tensors = {n: t.half() for n, t in tensors_of(folder).items() if not n.endswith(copies)}
    tensors["model.embed_tokens.weight"] = weights["embed"].half()
    rewrite(folder, tensors)
    assert set(load_file(folder / ONE_FILE)) == set(tensors)
    import_hf(HfFolder.open(folder), tmp_path / "in", {})
    assert torch.equal(
        HfFolder.open(folder).read("layers.1.experts.down"), weights["layers.1.experts.down"].half()
    )


def test_an_mtp_module_with_a_head_of_its_own(tmp_path: Path) -> None:
    folder = exported(tmp_path, M, random_weights(M))
    tensors = tensors_of(folder)
    tensors["model.layers.2.shared_head.head.weight"][3, 4] += 1
    rewrite(folder, tensors)
    with pytest.raises(
        CheckpointError, match=r"layers.2.shared_head.head.weight .* differs from lm_head.weight"
    ):
        import_hf(HfFolder.open(folder), tmp_path / "in", {})
    assert not (tmp_path / "in").exists()


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    folder = exported(tmp_path, M, random_weights(M))
    tensors = tensors_of(folder)
    tensors["model.layers.1.mlp.experts.3.up_proj.weight"][0, 0] = torch.nan
    rewrite(folder, tensors)
    with pytest.raises(CheckpointError, match=r"experts.3.up_proj.weight holds values that are not finite"):
        import_hf(HfFolder.open(folder), tmp_path / "in", {})
    assert list((tmp_path / "in").iterdir()) == []
