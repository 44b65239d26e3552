"""What a rank may hold, and whether a row of steps stays within it."""

from dataclasses import dataclass

from deepseek_train.schedule.search.compiled import BACKWARD, FORWARD, INPUT, PAIR, WEIGHT


@dataclass(frozen=True)
class Limits:
    """For every rank the most ``activations`` (micro-batches from F to B or I, a pair counting as both at once),
    and the most ``held``: activations and queued weight gradients together. DualPipe needs P + 1 of both.
    """

    activations: int
    held: int

    def allow(self, row: list[int], num_chunks: int) -> bool:
        """Whether the steps with these codes (``compiled``) never need more."""
        live = queued = 0
        for code in row:
            kind = code // num_chunks
            if kind == FORWARD or kind >= PAIR:
                live += 1
                if live > self.activations or live + queued > self.held:
                    return False
            if kind == BACKWARD or kind >= PAIR:
                live -= 1
            elif kind == INPUT:
                live, queued = live - 1, queued + 1
            elif kind == WEIGHT:
                queued -= 1
        return True
