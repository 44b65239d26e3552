"""Smaller SVG files: what matplotlib repeats for every path and every word is written once."""

import re
from collections import Counter

_STYLE = re.compile(r' style="([^"]+)"')
_RULES = "</style>"  # where matplotlib's own rules end
_TAG = re.compile(r"<[^>]*>")
_PRECISE = re.compile(r"\b\d+\.\d{3,}\b")


def shrink(text: str) -> str:
    """The same picture to a hundredth of a point: equal styles as one class, no line breaks in paths, no turns by 0."""
    text = re.sub(r' transform="rotate\(-0 [^"]*\)"', "", text)
    text = text.replace(" \n", " ").replace("\nz\n", " z ").replace('z\n"', 'z"')
    text = _TAG.sub(lambda tag: _PRECISE.sub(lambda number: _rounded(number[0]), tag[0]), text)
    counts = Counter(_STYLE.findall(text))
    classes = {style: f"s{number}" for number, style in enumerate(s for s, n in counts.items() if n > 1)}
    text = _STYLE.sub(lambda m: f' class="{classes[m[1]]}"' if m[1] in classes else m[0], text)
    rules = "".join(f"\n.{name}{{{style}}}" for style, name in classes.items())
    return text.replace(_RULES, rules + _RULES, 1)


def _rounded(number: str) -> str:
    """Points and pixels; factors of transformations, which are small, stay as they are."""
    return f"{float(number):.2f}".rstrip("0").rstrip(".") if float(number) >= 1 else number
