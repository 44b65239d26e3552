"""Fill-in-the-middle: which documents are rearranged, and where they are cut.

DeepSeek-V3 (report section 4.1) rearranges a tenth of the documents before packing, as prefix-suffix-middle
(PSM):

    <fim_begin> prefix <fim_hole> suffix <fim_end> middle <eos>

Whether and where a document is cut is a pure function of (seed, document name), so adding documents changes
no other.
"""

from dataclasses import dataclass

import xxhash

_PARTS_PER_MILLION = 1_000_000


@dataclass(frozen=True)
class Cut:
    """Where a document is cut, in characters: the middle is [start, end)."""

    start: int
    end: int

    def pieces(self, text: str) -> tuple[str, str, str]:
        """``text`` as (prefix, suffix, middle), the order in which PSM lays them out."""
        return text[: self.start], text[self.end :], text[self.start : self.end]


def choose_cut(name: str, length: int, rate: float, seed: int) -> Cut | None:
    """The cut of the document ``name`` of ``length`` characters; None where it stays as it is.

    ``rate`` in [0, 1] is the share of documents that are cut, to a millionth.
    """
    decision, first, second = (
        xxhash.xxh3_64_intdigest(f"{draw}/{name}".encode(), seed=seed)
        for draw in ("decision", "first", "second")
    )
    if decision % _PARTS_PER_MILLION >= round(rate * _PARTS_PER_MILLION):
        return None
    start, end = sorted((first % (length + 1), second % (length + 1)))
    return Cut(start, end)
