"""Text as its tokens come: never half a character."""

from deepseek_train.data.tokenizer import TextTokenizer

_HALF = "\N{REPLACEMENT CHARACTER}"  # what the tokenizer makes of bytes that are no UTF-8


class TextStream:
    """Takes token ids, gives text. All pieces together are what the tokenizer makes of all tokens at once."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._waiting: list[int] = []

    def add(self, token: int) -> str:
        """The text that is sure after ``token``; empty where a character, or what may be one, is not complete."""
        self._waiting.append(token)
        text = self._tokenizer.decode(self._waiting)
        return "" if text.endswith(_HALF) else self._said(text)

    def end(self) -> str:
        """What is left when no token follows."""
        return self._said(self._tokenizer.decode(self._waiting))

    def _said(self, text: str) -> str:
        self._waiting.clear()
        return text
