"""When a rank fails in the middle of a schedule all ranks end, and each says in which action it was.

Whoever has nothing left to wait for may finish its row first, so faults strike early.
"""

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from deepseek_train.phases.wgrad import allocate_main_grads
from deepseek_train.pipeline.executor import StepFailed
from deepseek_train.schedule.action import Action, Kind, Pair, Schedule
from deepseek_train.schedule.catalog import make_schedule
from deepseek_train.schedule.dataflow import actions_of
from tests.dist.grid import Case, on_grid
from tests.dist.tripwire import Tripwire
from tests.harness import RanksFailed, run_ranks

PATIENCE = 3.0  # seconds, of the groups where a rank stalls
SLEEP = 60.0  # the harness ends the stalled rank soon after the others have failed


@dataclass(frozen=True)
class Fault:
    """``how`` pipeline rank ``rank`` (of data-parallel rank 0) ends in ``action``, text form; an I or W of a B as
    well."""

    case: Case
    rank: int
    action: str
    how: str = "raises"  # raises, dies, stalls

    def __str__(self) -> str:
        return f"{self.case}-rank{self.rank}-{self.how}-in-{self.action}"

    @property
    def schedule(self) -> Schedule:
        return make_schedule(self.case.schedule, self.case.pp, self.case.microbatches)

    @property
    def struck(self) -> Action:
        stage, letter, microbatch = re.fullmatch(r"(\d+)([FIW])(\d+)", self.action).groups()  # type: ignore[union-attr]
        return Action(int(stage), Kind(letter), int(microbatch))

    @property
    def step(self) -> Action | Pair:
        """The step of the schedule in which it happens."""
        wanted = self.struck
        kinds = {wanted.kind} if wanted.kind is Kind.FORWARD else {wanted.kind, Kind.BACKWARD}
        return next(
            step
            for step in self.schedule.steps_R[self.rank]
            for a in actions_of(step)
            if (a.stage, a.microbatch) == (wanted.stage, wanted.microbatch) and a.kind in kinds
        )


PP2, PP4 = Case("1f1b", 2), Case("1f1b", 4)
DUAL2, DUAL4 = Case("dualpipe", 2), Case("dualpipe", 4)
EXPERTS, TWO_HOPS = Case("dualpipe", 2, dp=2, ep=2), Case("1f1b", 1, dp=4, ep=4, node=2)
FAULTS = [
    Fault(PP2, 1, "1F2"),
    Fault(PP2, 0, "0I1"),
    Fault(PP4, 2, "2W1"),
    Fault(PP4, 1, "1F3", "dies"),
    Fault(PP2, 0, "0I3", "dies"),
    Fault(DUAL4, 2, "2I3"),
    Fault(DUAL4, 0, "3W4"),
    Fault(DUAL2, 0, "0F2"),
    Fault(DUAL4, 3, "3F2"),
    Fault(DUAL4, 0, "3I4"),
    Fault(DUAL4, 1, "1F2", "dies"),
    Fault(DUAL2, 1, "1W2", "dies"),
    Fault(EXPERTS, 0, "0F2"),
    Fault(EXPERTS, 1, "1I1", "dies"),
    Fault(TWO_HOPS, 0, "0F2", "dies"),
    Fault(TWO_HOPS, 0, "0I3", "dies"),
    Fault(TWO_HOPS, 0, "0F3", "stalls"),
    Fault(Case("zb_v", 2), 1, "2F2"),
    Fault(Case("zb_h1", 4), 2, "2W1"),
    Fault(Case("interleaved_1f1b", 2), 0, "2I1", "dies"),
    Fault(Case("dualpipe_v", 2), 0, "3I1", "dies"),
    Fault(PP4, 1, "1I1", "stalls"),
    Fault(DUAL2, 0, "1I4", "stalls"),
]
WAITS = re.compile(
    r"pipeline rank (?P<rank>\d+), (?P<action>\d+[FBIW]\d+) "
    r"\((forward|backward|backward_input|backward_weight) of micro-batch \d+ in stage \d+\): MessageLost: "
    r"(waiting for the (activation|gradient) of micro-batch \d+ for stage \d+ from rank \d+"
    r"|sending the (activation|gradient) of micro-batch \d+ for stage \d+ to rank \d+"
    r"|getting ready for the (activation|gradient) of micro-batch \d+ for stage \d+ from rank \d+"
    r"|waiting until all it sent has left): \S+"
)


def run_until_it_fails(rank: int, _world_size: int, fault: Fault, folder: Path) -> None:
    grid = on_grid(fault.case, rank, torch.float32, PATIENCE if fault.how == "stalls" else 60)
    if grid.mesh.pp_rank == fault.rank and grid.mesh.dp_rank == 0:
        strike = {"raises": fail, "dies": die, "stalls": stall}[fault.how]
        wire = Tripwire(fault.schedule, fault.rank, fault.struck, strike)
        wire.stretch(grid.stages[fault.struck.stage])
        grid = grid.with_new_executor()
    allocate_main_grads([weight for _, weight, _ in grid.weights().values()], torch.float32)
    try:
        grid.executor.run(grid.prepared(), grid.batch_of(), fault.case.scales)
    except StepFailed as error:
        (folder / str(rank)).write_text(str(error))
        with pytest.raises(StepFailed, match="an earlier pass failed half-way"):
            grid.executor.run(grid.prepared(), grid.batch_of(), fault.case.scales)
        raise


def fail() -> None:
    raise ValueError("the stage broke")


def die() -> None:
    os._exit(9)


def stall() -> None:
    time.sleep(SLEEP)


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_all_ranks_end_and_say_where_they_were(fault: Fault, tmp_path: Path) -> None:
    with pytest.raises(RanksFailed) as failed:
        run_ranks(run_until_it_fails, fault.case.layout.world, fault, tmp_path, timeout=30)
    hung = re.findall(r"^--- ranks? (.*) hung", str(failed.value), re.MULTILINE)
    assert hung == ([str(fault.rank)] if fault.how == "stalls" else [])
    said = {int(path.name): path.read_text() for path in tmp_path.iterdir()}
    origin = fault.case.layout.rank_at(fault.rank, 0)
    if fault.how == "raises":
        assert said[origin] == in_its_own_words(fault)
    others = set(range(fault.case.layout.world)) - {origin}
    assert others <= said.keys()
    for rank in others:
        assert tells_where(said[rank], fault.case.layout.pp_rank(rank), fault.case), said[rank]
    if fault.how == "stalls":
        assert any("Timed out" in said[rank] for rank in others)


def in_its_own_words(fault: Fault) -> str:
    a = fault.struck
    halves = {x.kind for x in actions_of(fault.step) if x.microbatch == a.microbatch}
    kind = a.kind if a.kind in halves else Kind.BACKWARD
    said = f"{kind.name.lower()} of micro-batch {a.microbatch} in stage {a.stage}"
    where = f"{Action(a.stage, kind, a.microbatch)} ({said})"
    return f"pipeline rank {fault.rank}, {where}: ValueError: the stage broke"


def tells_where(message: str, pp_rank: int, case: Case) -> bool:
    """Names its rank, an action of its own row and the message it was busy with; with experts on several ranks it may
    have been an exchange between them instead."""
    found = WAITS.match(message)
    if found is None and case.ep > 1:
        found = re.match(
            r"pipeline rank (?P<rank>\d+), (?P<action>\d+[FBIW]\d+) \(.*\): TransferLost: "
            r"(routers' decisions|dispatch to experts|combine of experts' results|gradients' way (to|from) experts), "
            rf"expert rank \d of {case.ep} on \d node\(s\): \S+",
            message,
        )
    if found is None or int(found["rank"]) != pp_rank:
        return False
    row = make_schedule(case.schedule, case.pp, case.microbatches).steps_R[pp_rank]
    return found["action"] in {str(action) for step in row for action in actions_of(step)}


def test_faults_strike_every_kind_of_step() -> None:
    kinds = {"a pair" if isinstance(fault.step, Pair) else fault.step.kind.name for fault in FAULTS}
    assert kinds == {"a pair", "FORWARD", "BACKWARD", "BACKWARD_INPUT", "BACKWARD_WEIGHT"}


def test_a_neighbour_names_the_message_and_the_rank_it_waits_for(tmp_path: Path) -> None:
    fault = Fault(PP2, 1, "1F2", "dies")
    with pytest.raises(RanksFailed):
        run_ranks(run_until_it_fails, 2, fault, tmp_path, timeout=30)
    said = (tmp_path / "0").read_text()
    # Where the other one dies early, it is missed before: when the receive is made ready, or the next activation sent.
    action = r"0(B[12] \(backward of micro-batch [12]|F3 \(forward of micro-batch 3) in stage 0\)"
    received = r"(waiting|getting ready) for the gradient of micro-batch 2 for stage 0 from rank 1: "
    sent = r"sending the activation of micro-batch 3 for stage 1 to rank 1: "
    assert re.match(rf"pipeline rank 0, {action}: MessageLost: ({received}|{sent})", said), said
