"""Samples of prepared tokens, by global number, for any rank.

Sample j of a split is tokens [j T, j T + T + 1 + D) of its documents laid end to end: T inputs, the next
token of the last, and D more that multi-token prediction looks ahead to. Documents are packed without a mask
between them, as in DeepSeek-V3 (report section 4.1). Which sample has global number k is ``order``'s
business, so a global batch is a range of k, whatever number of ranks reads it.

Shape suffixes: B samples, T tokens of a window (sequence length + 1 + lookahead).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from deepseek_train.data.corpus import Split
from deepseek_train.data.errors import DataError
from deepseek_train.data.manifest import read_manifest
from deepseek_train.data.order import ORDER_VERSION, SampleOrder
from deepseek_train.data.shards import REMAKE, TokenStream


@dataclass(frozen=True)
class StreamIdentity:
    """All that decides which tokens global sample number k holds."""

    order_version: int
    manifest_hash: str
    seed: int
    sequence_length: int
    num_sequences: int  # of one epoch


@dataclass(frozen=True)
class Cursor:
    """Where the stream of samples stands: the next sample to train on is number ``consumed_sequences``."""

    consumed_sequences: int = 0

    def as_dict(self, identity: StreamIdentity) -> dict[str, Any]:
        """JSON-able: this cursor and the stream it belongs to."""
        return {**asdict(self), **asdict(identity)}

    @staticmethod
    def from_dict(values: Mapping[str, Any], identity: StreamIdentity) -> "Cursor":
        """The cursor that ``as_dict`` wrote.

        Raises:
            DataError: it belongs to another stream than ``identity``; the message says what differs.
        """
        wanted = asdict(identity)
        differing = [
            f"{name} was {values.get(name)!r} and is now {now!r}"
            for name, now in wanted.items()
            if values.get(name) != now
        ]
        if differing:
            raise DataError(
                "the saved position belongs to another stream of samples: " + "; ".join(differing),
                "data cursor of the checkpoint",
                "resume with the data, seed and sequence length of that run, start a new run, or go on with "
                "this data from its beginning (data.allow_change=true)",
            )
        consumed = values.get("consumed_sequences")
        if not isinstance(consumed, int) or isinstance(consumed, bool) or consumed < 0:
            raise DataError(
                f"consumed_sequences={consumed!r} is not a count",
                "data cursor of the checkpoint",
                "resume from another checkpoint",
            )
        return Cursor(consumed)


class TokenSource:
    """One split of prepared tokens as an endless, randomly accessible sequence of samples.

    Raises:
        DataError: files missing, cut short or at odds with the manifest; ids beyond ``vocab_size``; too few
        tokens.
    """

    def __init__(
        self, path: str, split: Split, sequence_length: int, lookahead: int, seed: int, vocab_size: int
    ) -> None:
        manifest = read_manifest(path)
        if manifest.max_token_id >= vocab_size:
            raise DataError(
                f"token id {manifest.max_token_id} occurs; the model's vocabulary is {vocab_size}",
                path,
                f"set model.vocab_size={manifest.vocab_size} or more, or prepare with a smaller tokenizer",
            )
        self._stream = TokenStream(Path(path), manifest.of_split(split))
        self._stride, self._window = sequence_length, sequence_length + 1 + lookahead
        self._vocab_size = vocab_size
        self.manifest_hash = manifest.content_hash()
        self.tokenizer_hash = manifest.settings.tokenizer_sha256
        self.num_sequences = max(0, (len(self._stream) - self._window) // self._stride + 1)
        if self.num_sequences == 0:
            raise DataError(
                f"the {split} split has {len(self._stream)} tokens; one sequence needs {self._window}",
                path,
                "prepare more text, or another data.validation_percent, or lower data.sequence_length",
            )
        self._order = SampleOrder(self.num_sequences, seed, self.manifest_hash)

    @property
    def identity(self) -> StreamIdentity:
        """What a cursor of this source is bound to."""
        return StreamIdentity(
            ORDER_VERSION, self.manifest_hash, self._order.seed, self._stride, self.num_sequences
        )

    def sequences(self, indices: Sequence[int]) -> npt.NDArray[np.int64]:
        """The samples with the global numbers ``indices``, of any epoch.

        Returns:
            tokens_BT, shape [len(indices), sequence_length + 1 + lookahead].

        Raises:
            DataError: an id that is not in [0, vocab_size), with its file and offset.
        """
        tokens_BT = np.empty((len(indices), self._window), np.int64)
        starts = [self._order.sample(k) * self._stride for k in indices]
        for tokens_T, start in zip(tokens_BT, starts, strict=True):
            self._stream.read_into(tokens_T, start)
        outside_BT = (tokens_BT < 0) | (tokens_BT >= self._vocab_size)
        if outside_BT.any():
            row, column = (int(place) for place in np.argwhere(outside_BT)[0])
            raise DataError(
                f"token id {tokens_BT[row, column]} is not in [0, {self._vocab_size})",
                self._stream.locate(starts[row] + column),
                f"'deepseek-data verify' tells which files are damaged; {REMAKE}",
            )
        return tokens_BT
