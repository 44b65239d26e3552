"""Byte-level BPE as DeepSeek-V3 does it: its three splits in sequence, its special tokens.

The splits are those of DeepSeek-V3's published tokenizer.json: digits in threes, runs of Chinese and
Japanese, then words, punctuation (with the newlines after it) and white space. They run one after the other,
each on the pieces of the last; one alternation of the three would cut differently around digits.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from deepseek_train.data.errors import DataError
from deepseek_train.data.text_files import Document

# made from Python 3.11.7, torch 2.13.0, numpy 2.4.6, sympy 1.14.0, networkx 3.6.1 by
# deepseek-data tokenizer source=builtin vocab_size=4096 max_megabytes=24 output=..
BUILTIN_TOKENIZER = Path(__file__).parent / "assets" / "tokenizer_4k.json"

SPECIAL_TOKENS = {
    "bos": "<｜begin▁of▁sentence｜>",
    "eos": "<｜end▁of▁sentence｜>",
    "pad": "<｜▁pad▁｜>",
    "fim_hole": "<｜fim▁hole｜>",
    "fim_begin": "<｜fim▁begin｜>",
    "fim_end": "<｜fim▁end｜>",
}

_DIGITS = r"\p{N}{1,3}"
_CHINESE_AND_JAPANESE = r"[一-龥぀-ゟ゠-ヿ]+"
_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    r"""|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*"""
    r"""|\s*[\r\n]+"""
    r"""|\s+(?!\S)"""
    r"""|\s+"""
)


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the special tokens."""

    bos: int
    eos: int
    pad: int
    fim_hole: int
    fim_begin: int
    fim_end: int


@dataclass(frozen=True)
class TextTokenizer:
    """Text to token ids and back. Special tokens written out in a text are encoded as plain text."""

    backend: Tokenizer
    special: SpecialTokens
    vocab_size: int  # largest id + 1
    json: bytes  # content of its tokenizer.json

    @property
    def sha256(self) -> str:
        """Digest of its tokenizer.json, as manifests record it."""
        return hashlib.sha256(self.json).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``; no special token is added."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, all cores at once; no special token is added."""
        return [found.ids for found in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, special tokens by their names."""
        return str(self.backend.decode(ids, skip_special_tokens=False))


def load_tokenizer(name_or_path: str) -> TextTokenizer:
    """The tokenizer called ``builtin`` (4,096 tokens), or the one in the tokenizer.json at a path.

    Raises:
        DataError: there is no such file, it is no tokenizer.json, or it lacks one of DeepSeek's special
        tokens.
    """
    path = BUILTIN_TOKENIZER if name_or_path == "builtin" else Path(name_or_path)
    if path.is_dir():
        path = path / "tokenizer.json"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"the tokenizer cannot be read: {error.strerror}",
            str(path),
            "data.tokenizer is 'builtin' or the path of a tokenizer.json",
        ) from error
    return parse_tokenizer(content, str(path))


def parse_tokenizer(content: bytes, where: str) -> TextTokenizer:
    """The tokenizer in the bytes of a tokenizer.json; ``where`` is named in errors."""
    try:
        backend = Tokenizer.from_buffer(content)
    except ValueError as error:
        raise DataError(
            f"this is not a tokenizer.json of the tokenizers library: {error}",
            where,
            "make one with: deepseek-data tokenizer source=.. vocab_size=.. output=..",
        ) from error
    ids = {role: backend.token_to_id(token) for role, token in SPECIAL_TOKENS.items()}
    found = {role: token_id for role, token_id in ids.items() if token_id is not None}
    missing = [SPECIAL_TOKENS[role] for role in ids if role not in found]
    if missing:
        raise DataError(
            f"the tokenizer lacks the special tokens {' '.join(missing)}",
            where,
            "use one made by 'deepseek-data tokenizer', or DeepSeek's own",
        )
    backend.encode_special_tokens = True
    vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
    return TextTokenizer(backend, SpecialTokens(**found), vocab_size, content)


def train_tokenizer(documents: Iterable[Document], vocab_size: int) -> TextTokenizer:
    """A byte-level BPE of exactly ``vocab_size`` tokens, special tokens included; the same bytes each time.

    Raises:
        DataError: ``vocab_size`` is too small for the bytes, or larger than the documents can fill.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise DataError(
            f"vocab_size={vocab_size} has no room for the {len(alphabet)} bytes and the special tokens",
            "vocab_size",
            f"use at least {smallest}",
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(split), "isolated") for split in (_DIGITS, _CHINESE_AND_JAPANESE, _WORDS)]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator((document.text for document in documents), trainer)
    reached = backend.get_vocab_size(with_added_tokens=True)
    if reached != vocab_size:
        raise DataError(
            f"the text yields a vocabulary of {reached} tokens only, not {vocab_size}",
            "source",
            f"give more text, or vocab_size={reached} or less",
        )
    return parse_tokenizer(backend.to_str(pretty=True).encode() + b"\n", "the tokenizer just trained")
