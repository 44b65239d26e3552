"""Which token comes next.

Legend: V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen among its logits."""

    temperature: float = 0.6  # 0: always the likeliest
    top_p: float = 0.95  # only of the likeliest tokens that together reach this probability; 1: of all

    def problems(self) -> list[str]:
        """What is wrong with the values, each with its mend."""
        found = []
        if not 0 <= self.temperature < float("inf"):
            found.append(f"temperature={self.temperature}: write 0 for the likeliest token, or more, as 0.6")
        if not 0 < self.top_p <= 1:
            found.append(f"top_p={self.top_p}: write a probability above 0, up to 1 for all tokens")
        return found


def choose(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """A token id. ``generator`` is on the CPU, so a seed means the same on every device; at temperature 0 it is not
    asked. Of several likeliest tokens, the first."""
    logits_V = logits_V.float().cpu()
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    shares_V = torch.softmax((logits_V - logits_V.max()) / sampling.temperature, -1)
    kept_V = nucleus(shares_V, sampling.top_p)
    return int(torch.multinomial(kept_V, 1, generator=generator))


def nucleus(shares_V: Tensor, top_p: float) -> Tensor:
    """``shares`` of the fewest likeliest tokens that together have ``top_p``, at least one; zero elsewhere (Holtzman et
    al. 2020). Of equally likely tokens the first are kept."""
    if top_p == 1:
        return shares_V
    sorted_V, order_V = shares_V.sort(descending=True, stable=True)
    before_V = sorted_V.double().cumsum(-1) - sorted_V
    return torch.zeros_like(shares_V).scatter_(0, order_V, sorted_V.where(before_V < top_p, 0.0))
