"""Whoever wants to know what a tape does, and when: a trace."""

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from deepseek_train.phases.parcel import Pending
from deepseek_train.phases.phase import Move, Phase


class Watch(Protocol):
    """Is told what a tape does while it does it."""

    def computing(self, phase: Phase) -> AbstractContextManager[None]:
        """Around a computation, forward or backward."""

    def started(self, move: Move, pending: Pending) -> None:
        """A transfer has just been started."""


class Unwatched:
    """Nobody looks."""

    def computing(self, phase: Phase) -> AbstractContextManager[None]:
        return nullcontext()

    def started(self, move: Move, pending: Pending) -> None:
        pass


UNWATCHED = Unwatched()
