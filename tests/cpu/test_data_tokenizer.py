"""The tokenizer: DeepSeek's cuts, exact round trips, the same bytes each time it is trained."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_train.data.errors import DataError
from deepseek_train.data.text_files import Document
from deepseek_train.data.tokenizer import SPECIAL_TOKENS, TextTokenizer, load_tokenizer, train_tokenizer

TOKENIZER = load_tokenizer("builtin")


def cuts(tokenizer: TextTokenizer, text: str) -> list[str]:
    return [text[start:end] for _, (start, end) in tokenizer.backend.pre_tokenizer.pre_tokenize_str(text)]


def documents() -> list[Document]:
    text = Path(__file__).read_text(encoding="utf-8")
    return [Document(str(number), text[number:]) for number in range(0, 500, 50)]


def test_builtin_has_4096_tokens_and_deepseeks_special_tokens() -> None:
    assert TOKENIZER.vocab_size == 4096
    assert TOKENIZER.backend.get_vocab_size(with_added_tokens=True) == 4096
    assert (TOKENIZER.special.bos, TOKENIZER.special.eos, TOKENIZER.special.pad) == (0, 1, 2)
    assert TOKENIZER.decode([1]) == "<｜end▁of▁sentence｜>"
    assert sorted(vars(TOKENIZER.special).values()) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x = 1234567", ["x", " =", " ", "123", "456", "7"]),
        ("a.b(c)\n\n", ["a", ".b", "(c", ")\n\n"]),
        ("你好world かな", ["你好", "world", " ", "かな"]),
        ("    return", ["   ", " return"]),
        ("don't", ["don", "'t"]),
    ],
)
def test_text_is_cut_as_deepseek_cuts_it(text: str, expected: list[str]) -> None:
    assert cuts(TOKENIZER, text) == expected


@given(st.text())
@settings(max_examples=150, deadline=None)
def test_decoding_gives_back_any_text(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_special_tokens_written_in_a_text_stay_text() -> None:
    text = "before" + "".join(SPECIAL_TOKENS.values()) + "after"
    ids = TOKENIZER.encode(text)
    assert min(ids) >= len(SPECIAL_TOKENS)
    assert TOKENIZER.decode(ids) == text


def test_training_again_gives_the_same_bytes() -> None:
    first, second = train_tokenizer(documents(), 400), train_tokenizer(documents(), 400)
    assert first.json == second.json
    assert first.vocab_size == 400
    assert first.decode(first.encode("naïve → 世界\n")) == "naïve → 世界\n"


def test_too_little_text_for_the_vocabulary_is_an_error() -> None:
    with pytest.raises(DataError, match="not 4096"):
        train_tokenizer([Document("a", "hello hello")], 4096)
    with pytest.raises(DataError, match="at least 262"):
        train_tokenizer(documents(), 261)


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        load_tokenizer(str(tmp_path / "none.json"))
    (tmp_path / "garbage.json").write_text("{}")
    with pytest.raises(DataError, match=r"not a tokenizer\.json"):
        load_tokenizer(str(tmp_path / "garbage.json"))
    foreign = tmp_path / "tokenizer.json"
    foreign.write_bytes(TOKENIZER.json.replace("fim▁hole".encode(), "fim▁gap".encode()))
    with pytest.raises(DataError, match="lacks the special tokens <｜fim▁hole｜>"):
        load_tokenizer(str(tmp_path))
