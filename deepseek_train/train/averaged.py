"""The averaged weights in the place of the trained ones, for as long as something is evaluated with them."""

from collections.abc import Iterator
from contextlib import contextmanager

from deepseek_train.optim.ema import Ema
from deepseek_train.train.build import Job


@contextmanager
def averaged_weights(job: Job, ema: Ema) -> Iterator[None]:
    """Inside ``with`` the job's weights are ``ema``'s; afterwards they and the masters are bitwise what they were
    (collective). Nothing is put back after an exception: other ranks may not come to that."""
    steps = job.optimizer.steps_taken()
    with ema.in_masters():
        job.optimizer.restore(steps)
        job.weights_changed()
        yield
    job.optimizer.restore(steps)
    job.weights_changed()
