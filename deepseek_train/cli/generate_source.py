"""What ``source`` of ``deepseek-generate`` names: a run, a checkpoint, or a Hugging Face folder."""

from dataclasses import dataclass
from pathlib import Path

import yaml

from deepseek_train.checkpoint.errors import CheckpointError
from deepseek_train.checkpoint.finder import CONFIG_FILE
from deepseek_train.checkpoint.folders import CHECKPOINTS
from deepseek_train.checkpoint.hf_config import CONFIG
from deepseek_train.checkpoint.manifest import NAME as MANIFEST_FILE
from deepseek_train.checkpoint.places import Place
from deepseek_train.checkpoint.stored import StoredCheckpoint, newest_whole
from deepseek_train.checkpoint.weight_source import CheckpointWeights, WeightSource, open_weights
from deepseek_train.cli.key_value import UsageError
from deepseek_train.config.schema import ModelConfig
from deepseek_train.data.errors import DataError
from deepseek_train.data.manifest import TOKENIZER_FILE
from deepseek_train.data.tokenizer import TextTokenizer, load_tokenizer

_NAMES = "write a run, as source=runs/tiny, one of its checkpoints, or a Hugging Face folder"
_NAME_IT = "name the right one, tokenizer=FILE"


@dataclass(frozen=True)
class Model:
    """Weights and what they go with."""

    name: str  # in words
    weights: WeightSource
    tokenizer: TextTokenizer
    context: int  # tokens of a sequence in training


def open_model(path: Place, *, ema: bool, tokenizer: str | None) -> Model:
    """Raises UsageError with what is wrong with the folder. ``tokenizer`` takes the place of the folder's own."""
    try:
        if (path / MANIFEST_FILE).is_file():
            stored, run = StoredCheckpoint.open(path), path.absolute().parent.parent
            return _of_checkpoint(stored, _sequence_length(run), ema, tokenizer or str(run / TOKENIZER_FILE))
        if isinstance(path, Path) and (path / CONFIG).is_file():
            return _of_export(path, ema, tokenizer or str(path / TOKENIZER_FILE))
        if (path / CONFIG_FILE).is_file() or (path / CHECKPOINTS).is_dir():
            length = _sequence_length(path)
            return _of_checkpoint(newest_whole(path), length, ema, tokenizer or str(path / TOKENIZER_FILE))
    except (CheckpointError, DataError, OSError) as error:
        raise UsageError([f"source={path}: {error}"]) from error
    what = f"has no {MANIFEST_FILE}, {CONFIG_FILE} or {CONFIG}" if path.is_dir() else "is no folder"
    raise UsageError([f"source={path} {what}; {_NAMES}"])


def _sequence_length(run: Place) -> int | None:
    """Tokens of the run's samples, as its configuration says; None for a checkpoint that has left its run."""
    path = run / CONFIG_FILE
    if not path.is_file():
        return None
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        length = content["data"]["sequence_length"]
    except (yaml.YAMLError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is no run's: it has no data.sequence_length") from error
    if not isinstance(length, int) or length < 1:
        raise CheckpointError(f"{path} says data.sequence_length {length!r}, which is no number of tokens")
    return length


def _of_checkpoint(stored: StoredCheckpoint, length: int | None, ema: bool, tokenizer_file: str) -> Model:
    if ema and not any(name.startswith("ema/") for name in stored.tensors):
        raise CheckpointError("ema=true, but it holds no averaged weights: leave ema away for the last ones")
    weights = CheckpointWeights(stored, "ema" if ema else "master")
    tokenizer = _tokenizer(tokenizer_file, weights.model)
    trained_with = stored.facts.get("tokenizer", tokenizer.sha256)
    if trained_with != tokenizer.sha256:
        raise CheckpointError(
            f"it was trained with another tokenizer (sha256 {trained_with}) than {tokenizer_file} "
            f"({tokenizer.sha256}): {_NAME_IT}"
        )
    name = f"{stored.path}, averaged weights" if ema else str(stored.path)
    return Model(name, weights, tokenizer, length or _longest(weights.model))


def _of_export(path: Path, ema: bool, tokenizer_file: str) -> Model:
    if ema:
        raise CheckpointError("ema=true, but an export has its weights once: leave ema away")
    weights = open_weights(path)
    return Model(str(path), weights, _tokenizer(tokenizer_file, weights.model), _longest(weights.model))


def _tokenizer(file: str, m: ModelConfig) -> TextTokenizer:
    tokenizer = load_tokenizer(file)
    if tokenizer.vocab_size > m.vocab_size:
        raise CheckpointError(
            f"{file} has {tokenizer.vocab_size} tokens, the model {m.vocab_size}: it is another model's; {_NAME_IT}"
        )
    return tokenizer


def _longest(m: ModelConfig) -> int:
    """What its RoPE is made for."""
    return int(m.yarn.original_length * m.yarn.factor)
