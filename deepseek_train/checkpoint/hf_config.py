"""config.json, as DeepSeek publishes it with its models <-> our ``ModelConfig``.

A folder from elsewhere may hold anything, so every field is looked at before one is believed. What DeepSeek's file has
and a ``ModelConfig`` has not (initial values of the embedding, our name) is an object of its own, ``deepseek_train``,
that others pass over.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

from deepseek_train.checkpoint.errors import CheckpointError
from deepseek_train.config.check import model_problems
from deepseek_train.config.parse import ConfigError, Problem, parse
from deepseek_train.config.schema import ModelConfig, YarnConfig

CONFIG = "config.json"
OURS = "deepseek_train"
LARGEST_SIZE = 2**24  # of any one axis, and of what there can be many of
MOST_LAYERS = 2**12

FP8 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}

_NAMES = {  # ours -> theirs
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_dense_layers": "first_k_dense_replace",
    "num_heads": "num_attention_heads",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "dense_ffn_size": "intermediate_size",
    "num_routed_experts": "n_routed_experts",
    "num_shared_experts": "n_shared_experts",
    "expert_ffn_size": "moe_intermediate_size",
    "experts_per_token": "num_experts_per_tok",
    "num_expert_groups": "n_group",
    "expert_groups_per_token": "topk_group",
    "routed_scale": "routed_scaling_factor",
    "mtp_depth": "num_nextn_predict_layers",
    "norm_eps": "rms_norm_eps",
    "init_std": "initializer_range",
    "tie_embeddings": "tie_word_embeddings",
}
_YARN = {
    "factor": "factor",
    "original_length": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
}
_ONLY = {  # what our model is, and others may not be; where a file is silent, it is meant
    "model_type": "deepseek_v3",
    "hidden_act": "silu",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",  # serving engines make room for the balance biases if they read this
    "norm_topk_prob": True,
    "moe_layer_freq": 1,
    "attention_bias": False,
}


def context_length(m: ModelConfig) -> int:
    """Tokens that the model's positions were made for."""
    return int(m.yarn.original_length * m.yarn.factor)


def to_hf(m: ModelConfig, dtype: str, tokens: Mapping[str, int]) -> dict[str, Any]:
    """The content of config.json. ``dtype``: bf16, fp32 or fp8. ``tokens``: ids, as bos_token_id."""
    fields = asdict(m)
    yarn = fields["yarn"]
    rope = {"type": "yarn", **{theirs: yarn[ours] for ours, theirs in _YARN.items()}}
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        **_ONLY,
        **{theirs: fields[ours] for ours, theirs in _NAMES.items()},
        "num_key_value_heads": m.num_heads,
        "attention_dropout": 0.0,
        "max_position_embeddings": context_length(m),
        "rope_theta": m.rope_theta,
        "rope_scaling": rope if m.yarn.factor > 1 else None,
        "ep_size": 1,
        "pretraining_tp": 1,
        "use_cache": True,
        "torch_dtype": "float32" if dtype == "fp32" else "bfloat16",
        **tokens,
        **({"quantization_config": FP8} if dtype == "fp8" else {}),
        OURS: {"name": m.name, "embed_init_std": m.embed_init_std},
    }


def from_hf(content: Mapping[str, Any], where: str, name: str) -> ModelConfig:
    """The model that a config.json describes; ``name`` where it does not say.

    Raises:
        CheckpointError: everything about it that is missing, of a wrong type or size, or another model's.
    """
    problems: list[Problem] = list(_other_model(content))
    fields = {ours: content[theirs] for ours, theirs in _NAMES.items() if theirs in content}
    if fields.get("num_shared_experts") is None:
        fields["num_shared_experts"] = 0
    rope_theta, fields["yarn"] = _rope(content, problems)
    own = content.get(OURS)
    own = own if isinstance(own, dict) else {}
    fields |= {"name": own.get("name", name), "rope_theta": rope_theta}
    fields["embed_init_std"] = own.get("embed_init_std")
    try:
        m = parse(ModelConfig, fields)
        problems += _sizes(m) or model_problems(m)
    except ConfigError as error:
        problems += error.problems
    if problems:
        told = "\n".join(f"  - {_theirs(problem)}" for problem in problems)
        raise CheckpointError(f"{where} describes no model that can be read here:\n{told}")
    return m


def _theirs(problem: Problem) -> Problem:
    """The problem under the name that the file has for the field."""
    ours = problem.where.removeprefix("model.")
    yarn = ours.removeprefix("yarn.")
    theirs = f"rope_scaling.{_YARN[yarn]}" if ours != yarn and yarn in _YARN else _NAMES.get(ours, ours)
    return replace(problem, where=theirs)


def _other_model(content: Mapping[str, Any]) -> Iterator[Problem]:
    mend = "Models of another kind cannot be read."
    for key, value in {**_ONLY, "rope_interleave": True}.items():
        found = content.get(key, value)
        if found != value or isinstance(found, bool) != isinstance(value, bool):
            yield Problem(key, f"is {found!r}, DeepSeek-V3's is {value!r}", mend)
    heads = content.get("num_attention_heads")
    if content.get("num_key_value_heads", heads) not in (heads, None):
        found = content["num_key_value_heads"]
        yield Problem("num_key_value_heads", f"is {found!r}, not num_attention_heads = {heads!r}", mend)
    quantised = content.get("quantization_config")
    if quantised is None:
        return
    if not isinstance(quantised, dict):
        yield Problem("quantization_config", f"expected an object, found {quantised!r}", f"Write {FP8}.")
        return
    for key in ("quant_method", "fmt", "weight_block_size"):
        if quantised.get(key, FP8[key]) != FP8[key]:
            yield Problem(f"quantization_config.{key}", f"is {quantised[key]!r}, not {FP8[key]!r}", mend)


def _rope(content: Mapping[str, Any], problems: list[Problem]) -> tuple[Any, dict[str, Any]]:
    """rope_theta, and the fields of YarnConfig. transformers 5 writes both into ``rope_parameters``."""
    rope = content.get("rope_scaling") or content.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        problems.append(
            Problem("rope_scaling", f"expected an object, found {rope!r}", "Write null for none.")
        )
        return None, {}
    rope = {key: value for key, value in rope.items() if value is not None}
    theta = content.get("rope_theta", rope.pop("rope_theta", None))
    kinds = {str(rope.pop(key)) for key in ("type", "rope_type") if key in rope} or {"default"}
    if kinds == {"default"}:
        return theta, {"original_length": content.get("max_position_embeddings")}
    if kinds != {"yarn"}:
        problems.append(
            Problem("rope_scaling.type", f"is {' and '.join(sorted(kinds))}", "Only yarn is known.")
        )
        return theta, {}
    missing = [key for key in ("factor", "original_max_position_embeddings") if key not in rope]
    problems += [Problem(f"rope_scaling.{key}", "missing", "Give it a value.") for key in missing]
    for key in rope.keys() - _YARN.values():
        problems.append(Problem(f"rope_scaling.{key}", "is not known here", "DeepSeek-V3 has no such key."))
    fields = {ours: rope[theirs] for ours, theirs in _YARN.items() if theirs in rope}
    # transformers' reading: without mscale_all_dim, attention is not scaled, and rotations are by mscale 1.
    return theta, {"mscale": 1.0, "mscale_all_dim": 0.0, **fields}


def _sizes(m: ModelConfig) -> list[Problem]:
    """Sizes beyond any model's, before something is counted by them; numbers that are none."""
    problems = []
    for ours, value in {**asdict(m), **{f"yarn.{key}": v for key, v in asdict(m.yarn).items()}}.items():
        if isinstance(value, float) and not (math.isfinite(value) and value >= 0):
            problems.append(Problem(ours, f"is {value}", "Give a finite number, not below 0."))
        most = MOST_LAYERS if ours in ("num_layers", "mtp_depth") else LARGEST_SIZE
        if isinstance(value, int) and value > most:
            problems.append(Problem(ours, f"is {value}", f"At most {most} can be read."))
    for ours in ("norm_eps", "rope_theta"):
        if getattr(m, ours) == 0:
            problems.append(Problem(ours, "is 0", "Give a positive number."))
    return problems + list(unsaid(m))


def unsaid(m: ModelConfig) -> Iterator[Problem]:
    """What other readers of config.json would compute differently, so that it can neither be written nor believed."""
    yarn: YarnConfig = m.yarn
    if yarn.factor < 1 or yarn.original_length < 1:
        yield Problem("yarn.factor", f"{yarn.factor} times {yarn.original_length}", "Neither is below 1.")
    # transformers takes mscale only together with mscale_all_dim, and 1 without it.
    if yarn.factor > 1 and yarn.mscale != 1 and not (yarn.mscale and yarn.mscale_all_dim):
        mend = "Use 1, or a positive mscale_all_dim."
        yield Problem("yarn.mscale", f"is {yarn.mscale} without mscale_all_dim", mend)
