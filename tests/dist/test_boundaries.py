"""What a rank keeps of the tensors passed between stages: as many as there are stages, with any number of batches."""

import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from deepseek_train.parallel import p2p
from deepseek_train.phases.wgrad import allocate_main_grads
from deepseek_train.pipeline.executor import PreparedSchedule
from deepseek_train.schedule.catalog import NAMES
from deepseek_train.schedule.forward_only import forward_only
from tests.dist.grid import Case, on_grid
from tests.harness import run_ranks

PP = 4
COUNTS = (12, 24)  # micro-batches


class Buffers:
    """Stands in for ``torch.empty`` where receives get their buffers: counts those that still have memory."""

    def __init__(self) -> None:
        self.alive = self.peak = self.made = 0

    def empty(self, shape: tuple[int, ...], **_: Any) -> torch.Tensor:
        array = np.full(shape, np.nan)
        weakref.finalize(array, self._gone)  # the tensor's storage keeps the array alive, nothing else does
        self.alive += 1
        self.made += 1
        self.peak = max(self.peak, self.alive)
        return torch.from_numpy(array)

    def _gone(self) -> None:
        self.alive -= 1


class CountedLinks(p2p.Links):
    """Knows how many sends it has kept at most."""

    kept = 0

    def send(self, *args: Any, **kwargs: Any) -> None:
        super().send(*args, **kwargs)
        CountedLinks.kept = max(CountedLinks.kept, sum(map(len, self._sending.values())))


def case_of(name: str, microbatches: int) -> Case:
    return Case(name, PP, microbatches=microbatches, layers=7)


def peaks(rank: int, _world: int, name: str) -> list[tuple[int, ...]]:
    """For each number of micro-batches: buffers alive and sends kept at most, in training and in evaluation."""
    found = []
    for count in COUNTS:
        case = case_of(name, count)
        grid = on_grid(case, rank, torch.float64)
        allocate_main_grads([w for _, w, _ in grid.weights().values()], torch.float64)
        grid.mesh.links.__class__ = CountedLinks
        row = []
        for prepared, scales in (
            (grid.prepared(), case.scales),
            (PreparedSchedule(forward_only(case.placement), grid.mesh.pp_rank), None),
        ):
            buffers, CountedLinks.kept = Buffers(), 0
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(p2p, "torch", SimpleNamespace(empty=buffers.empty))
                grid.executor.run(prepared, grid.batch_of(), scales)
                assert buffers.alive == 0
            row += [buffers.peak, CountedLinks.kept]
        found.append(tuple(row))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_boundary_buffers_do_not_grow_with_the_number_of_microbatches(name: str) -> None:
    """A buffer lives as long as the activations it begins, so GPipe, which keeps all of these, keeps all buffers. Its
    sends, and all that evaluation keeps, are few even there."""
    stages = case_of(name, 8).placement.num_stages
    for some, twice_as_many in run_ranks(peaks, PP, name):
        if name == "gpipe":
            some, twice_as_many = some[1:], twice_as_many[1:]
        assert some == twice_as_many
        # A gain's gradient keeps the input of its norm, which is the buffer itself at the start of a stage, and of all
        # schedules zb_v lets most weight gradients wait.
        queued = stages if name == "zb_v" else 0
        assert max(some) <= stages + 4 + queued, "two messages of each kind may be on their way besides"
