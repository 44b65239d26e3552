"""What befalls a soaked run, drawn from a seed: kinds of faults, and a row of them over the run's steps."""

import random
from dataclasses import dataclass

LOST = r"lost at step|ended early|a peer is lost"
HUNG = r"^The cause:"
STOPPED = r"^stopped after step"
DAMAGED = r"set aside as"
ANYWHERE = ("forward", "optimizer", "update", "agreement", "save", "writing")
BUSY = ("forward", "optimizer", "update", "agreement")


@dataclass(frozen=True)
class Kind:
    """``strike`` and ``places``: as ``soak_faults`` has them."""

    name: str  # for the reader
    strike: str
    places: tuple[str, ...]
    sign: str  # the first line that tells of it, as a regular expression; empty: nobody is left who could
    by_rank_0: bool = False  # nobody else goes there


KINDS = (
    Kind("rank killed in a step", "kill", BUSY, LOST),
    Kind("rank killed while its file is half written", "kill", ("writing",), LOST),
    Kind("rank 0 killed before the commit", "kill", ("commit",), LOST, by_rank_0=True),
    Kind("rank 0 killed right behind the commit", "kill", ("committed",), LOST, by_rank_0=True),
    Kind("rank killed while it loads", "kill", ("loading",), LOST),
    Kind("rank frozen (SIGSTOP)", "stop", ANYWHERE, HUNG),
    Kind("rank hangs", "sleep", BUSY, HUNG),
    Kind("rank holds Python's lock", "hog", BUSY, HUNG),
    Kind("stop asked of one rank (SIGUSR1)", "ask", ANYWHERE, STOPPED),
    Kind("stop asked of the launcher (SIGTERM)", "term", ANYWHERE, STOPPED),
    Kind("launcher killed", "orphan", ANYWHERE, STOPPED),
    Kind("all killed at once", "outage", ANYWHERE, ""),
    Kind("newest checkpoint: a bit flipped", "flip", BUSY, DAMAGED),
    Kind("newest checkpoint: truncated", "cut", BUSY, DAMAGED),
    Kind("newest checkpoint: no manifest", "behead", BUSY, DAMAGED),
)


@dataclass(frozen=True)
class Fault:
    kind: Kind
    place: str
    rank: int
    step: int  # it strikes when its rank is at its place in this step, or next time

    def word(self) -> str:
        return f"{self.kind.strike} {self.place} {self.rank} {self.step}"


def plan(count: int, seed: int, ranks: int, every: int) -> list[Fault]:
    """``count`` faults, all kinds before any comes twice; ``every`` steps there is a checkpoint, and one of the newest
    two is always left when the next fault comes."""
    dice = random.Random(seed)
    kinds: list[Kind] = []
    while len(kinds) < count:
        kinds += dice.sample(KINDS, len(KINDS))
    kinds = kinds[:count]
    if kinds[-1].places == ("loading",):  # it needs another fault behind it, which makes the run load
        kinds[-2:] = kinds[-1], kinds[-2]
    faults, step = [], 2 * every
    for kind in kinds:
        step += dice.randint(every + 1, 3 * every)
        rank = 0 if kind.by_rank_0 else dice.randrange(ranks)
        faults.append(Fault(kind, dice.choice(kind.places), rank, step))
    return faults
