"""Streamed text is the text, and never shows half a character."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_train.data.tokenizer import load_tokenizer
from deepseek_train.generate.stream import TextStream

TOKENIZER = load_tokenizer("builtin")


def pieces(ids: list[int]) -> list[str]:
    stream = TextStream(TOKENIZER)
    return [*(stream.add(token) for token in ids), stream.end()]


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40))
def test_text_comes_back_character_by_character(text: str) -> None:
    """Where the text itself has none, no piece has a replacement character."""
    found = pieces(TOKENIZER.encode(text))
    assert "".join(found) == text
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert "\N{REPLACEMENT CHARACTER}" not in "".join(found)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=30))
def test_any_tokens_give_what_they_give_together(ids: list[int]) -> None:
    """Special tokens and bytes that are no UTF-8 as well."""
    assert "".join(pieces(ids)) == TOKENIZER.decode(ids)


def test_a_character_of_several_tokens_comes_with_its_last() -> None:
    ids = TOKENIZER.encode("a\N{SNAKE}b")
    assert len(ids) == 6, "the snake is four tokens in this vocabulary"
    assert pieces(ids) == ["a", "", "", "", "\N{SNAKE}", "b", ""]


def test_ascii_is_never_held_back() -> None:
    generator = torch.Generator().manual_seed(0)
    text = "".join(chr(c) for c in torch.randint(32, 127, (200,), generator=generator).tolist())
    found = pieces(TOKENIZER.encode(text))
    assert all(found[:-1])
