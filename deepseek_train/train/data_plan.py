"""Prepared data against what a run wants of them, before a process group starts."""

from pathlib import Path
from typing import Any

from deepseek_train.config.parse import Problem
from deepseek_train.config.schema import RunConfig
from deepseek_train.config.storage import storage_failed
from deepseek_train.data.errors import DataError
from deepseek_train.data.loader import TokenSource
from deepseek_train.data.manifest import MANIFEST_FILE
from deepseek_train.data.prepare import check_prepared
from deepseek_train.spec.layout import ParallelLayout
from deepseek_train.train.batching import eval_microbatches


def data_problems(config: RunConfig, layout: ParallelLayout) -> list[Problem]:
    """Problems of prepared data. Missing data is none here: the command prepares it, or says how."""
    if not (Path(config.data.path) / MANIFEST_FILE).exists():
        return []
    try:
        check_prepared(config.data)
        open_source(config, "train")
        held_out = open_source(config, "validation").num_sequences
    except DataError as error:
        return [Problem(f"data ({error.where})", error.what, error.mend, storage_failed(error))]
    wanted = eval_microbatches(config) * layout.dp * config.train.microbatch_size
    if wanted > held_out:
        what = f"an evaluation takes {wanted} sequences of {config.data.sequence_length} tokens, {held_out} exist"
        most = held_out // (layout.dp * config.train.microbatch_size) // 2 * 2
        mend = f"Use at most {most}" if most else "Use shorter sequences (data.sequence_length)"
        return [Problem("train.eval_microbatches", what, f"{mend}, or prepare more text for validation.")]
    return []


def open_source(config: RunConfig, split: Any) -> TokenSource:
    """One split of the run's data, with the lookahead its MTP modules need."""
    m = config.model
    return TokenSource(
        config.data.path, split, config.data.sequence_length, m.mtp_depth, config.seed, m.vocab_size
    )
