"""What ``source`` of ``deepseek-generate`` names: a run, a checkpoint, or a Hugging Face folder."""

import logging
from dataclasses import dataclass
from pathlib import Path

import yaml

from deepseek_train.checkpoint.agree import CheckpointError
from deepseek_train.checkpoint.folders import committed
from deepseek_train.checkpoint.hf_folder import CONFIG
from deepseek_train.checkpoint.manifest import NAME as MANIFEST_FILE
from deepseek_train.checkpoint.stored import StoredCheckpoint
from deepseek_train.checkpoint.weight_source import CheckpointWeights, WeightSource, open_weights
from deepseek_train.cli.key_value import UsageError
from deepseek_train.config.schema import ModelConfig
from deepseek_train.data.errors import DataError
from deepseek_train.data.manifest import TOKENIZER_FILE
from deepseek_train.data.tokenizer import TextTokenizer, load_tokenizer
from deepseek_train.train.folder import CHECKPOINTS, CONFIG_FILE

_NAMES = "write a run, as source=runs/tiny, one of its checkpoints, or a Hugging Face folder"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Model:
    """Weights and what they go with."""

    name: str  # in words
    weights: WeightSource
    tokenizer: TextTokenizer
    context: int  # tokens of a sequence in training


def open_model(path: Path, *, ema: bool, tokenizer: str | None) -> Model:
    """Raises UsageError with what is wrong with the folder. ``tokenizer`` takes the place of the folder's own."""
    try:
        if (path / MANIFEST_FILE).is_file():
            return _of_checkpoint(StoredCheckpoint.open(path), path.absolute().parents[1], ema, tokenizer)
        if (path / CHECKPOINTS).is_dir():
            return _of_checkpoint(_newest(path / CHECKPOINTS), path, ema, tokenizer)
        if (path / CONFIG).is_file():
            return _of_export(path, ema, tokenizer)
    except (CheckpointError, DataError, OSError) as error:
        raise UsageError([f"source={path}: {error}"]) from error
    what = f"has no {CHECKPOINTS}, {MANIFEST_FILE} or {CONFIG}" if path.is_dir() else "is no folder"
    raise UsageError([f"source={path} {what}; {_NAMES}"])


def _newest(root: Path) -> StoredCheckpoint:
    """The newest whole checkpoint. Damaged ones before it are named in warnings, and left as they are."""
    for found in committed(root):
        try:
            return StoredCheckpoint.open(found.path)
        except CheckpointError as error:
            log.warning("passed over: %s", error)
    raise CheckpointError(f"{root} holds no whole checkpoint yet")


def _of_checkpoint(stored: StoredCheckpoint, run: Path, ema: bool, named: str | None) -> Model:
    if ema and not any(name.startswith("ema/") for name in stored.tensors):
        raise CheckpointError("ema=true, but it holds no averaged weights: leave ema away for the last ones")
    weights = CheckpointWeights(stored, "ema" if ema else "master")
    tokenizer = load_tokenizer(named or str(run / TOKENIZER_FILE))
    trained_with = stored.facts.get("tokenizer", tokenizer.sha256)
    if trained_with != tokenizer.sha256:
        raise CheckpointError(
            f"it was trained with another tokenizer (sha256 {trained_with}) than {named or run / TOKENIZER_FILE} "
            f"({tokenizer.sha256}): name that one, tokenizer=FILE"
        )
    kind = "averaged weights" if ema else "weights"
    name = f"{stored.path} ({kind})"
    return Model(name, weights, _fitting(tokenizer, weights.model), _trained_length(run, weights.model))


def _of_export(path: Path, ema: bool, named: str | None) -> Model:
    if ema:
        raise CheckpointError("ema=true, but an export has its weights once: leave ema away")
    weights = open_weights(path)
    tokenizer = load_tokenizer(named or str(path / TOKENIZER_FILE))
    return Model(str(path), weights, _fitting(tokenizer, weights.model), _longest(weights.model))


def _fitting(tokenizer: TextTokenizer, m: ModelConfig) -> TextTokenizer:
    if tokenizer.vocab_size > m.vocab_size:
        raise CheckpointError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {m.vocab_size}: it is another model's; "
            "name the right one, tokenizer=FILE"
        )
    return tokenizer


def _trained_length(run: Path, m: ModelConfig) -> int:
    """The run's ``data.sequence_length``; for a checkpoint that has left its run, what RoPE is made for."""
    path = run / CONFIG_FILE
    if not path.is_file():
        return _longest(m)
    try:
        length = yaml.safe_load(path.read_text(encoding="utf-8"))["data"]["sequence_length"]
    except (yaml.YAMLError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} has no data.sequence_length, so it is no run's") from error
    if not isinstance(length, int) or length < 1:
        raise CheckpointError(f"{path} says data.sequence_length {length!r}, which is no number of tokens")
    return length


def _longest(m: ModelConfig) -> int:
    return int(m.yarn.original_length * m.yarn.factor)
