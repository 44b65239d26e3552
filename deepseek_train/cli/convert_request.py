"""What ``deepseek-convert`` is asked, and what is wrong with it."""

import os
from dataclasses import dataclass
from typing import get_args

from deepseek_train.checkpoint.hf_export import HfType
from deepseek_train.checkpoint.hf_tokenizer import TOKENIZER
from deepseek_train.checkpoint.places import Place
from deepseek_train.cli.key_value import UsageError, like
from deepseek_train.config.schema import ModelConfig
from deepseek_train.data.tokenizer import TextTokenizer, load_tokenizer


@dataclass(frozen=True)
class ToHf:
    """Keys of ``deepseek-convert to_hf``."""

    source: str = like("runs/tiny")
    target: str = like("exports/tiny")
    dtype: str = "bf16"
    weights: str = "master"
    tokenizer: str = "auto"
    shard_gigabytes: float = 4.0


@dataclass(frozen=True)
class FromHf:
    """Keys of ``deepseek-convert from_hf``."""

    source: str = like("exports/tiny")
    target: str = like("runs/mine")
    tokenizer: str = "auto"


def to_hf_problems(request: ToHf) -> list[str]:
    """What the request itself shows."""
    problems = target_problems(request.target)
    if request.dtype not in get_args(HfType):
        problems.append(f"dtype={request.dtype}: write one of {' '.join(get_args(HfType))}")
    if request.weights not in ("master", "ema"):
        problems.append(f"weights={request.weights}: write one of master ema")
    if not 0 < request.shard_gigabytes < float("inf"):
        problems.append(f"shard_gigabytes={request.shard_gigabytes}: write a positive number")
    return problems


def target_problems(target: str) -> list[str]:
    """Nothing is written over."""
    return [f"target={target} exists already: name a folder that does not"] if os.path.lexists(target) else []


def find_tokenizer(wanted: str, source: Place, m: ModelConfig) -> TextTokenizer | None:
    """The tokenizer that ``wanted`` means: auto, none or a path.

    Raises UsageError where there is none, or one with more tokens than the model; DataError where it is no tokenizer.
    """
    if wanted == "none":
        return None
    # In the folder itself, of a run or a Hugging Face folder; of a checkpoint, in its run's.
    beside = [folder / TOKENIZER for folder in (source, source.parent, source.parent.parent)]
    path = next((str(path) for path in beside if path.is_file()), None) if wanted == "auto" else wanted
    if path is None:
        raise UsageError([f"no {TOKENIZER} is in {source}: write tokenizer=FILE, or tokenizer=none"])
    tokenizer = load_tokenizer(path)
    if tokenizer.vocab_size > m.vocab_size:
        raise UsageError(
            [f"{path} has {tokenizer.vocab_size} tokens, the model {m.vocab_size}: write tokenizer=FILE"]
        )
    return tokenizer


def check_same(tokenizer: TextTokenizer, trained_with: str | None) -> None:
    """Raises UsageError where the model was trained with another tokenizer than this."""
    if trained_with not in (None, tokenizer.sha256):
        raise UsageError(
            [
                f"the tokenizer's sha256 is {tokenizer.sha256}, the model was trained with {trained_with}: "
                "write tokenizer=FILE for that one, or tokenizer=none"
            ]
        )
