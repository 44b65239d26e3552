"""A schedule made for measured durations and a memory limit (beyond the report).

Known schedules and list scheduling under many policies give starting points; hill climbing makes the best of them
faster, with the simulator's makespan as judge. Nothing depends on the clock: the same processor and Python find the
same again. Sums of times are compared, so other processors may not: a job's rank 0 searches for all.
"""

from deepseek_train.schedule import dualpipe
from deepseek_train.schedule.action import Placement, Schedule
from deepseek_train.schedule.check import check
from deepseek_train.schedule.placements import straight
from deepseek_train.schedule.search.climb import Climber
from deepseek_train.schedule.search.compiled import INPUT, WEIGHT, Compiled, Rows
from deepseek_train.schedule.search.memory import Limits
from deepseek_train.schedule.search.starts import starts
from deepseek_train.schedule.simulate import Durations

_STARTS = 3  # the fastest of all are climbed from
_STEPS = 5_000_000  # the most that moves simulate, about 5 seconds: of long schedules fewer moves are tried


def best(
    num_ranks: int,
    num_microbatches: int,
    durations: Durations,
    max_activations: int | None = None,
    seed: int = 0,
    *,
    max_held: int | None = None,
    max_moves: int = 12_000,
) -> Schedule:
    """The faster of ``search`` with micro-batches from both ends (P and M even) and from one end, with as many stages
    as ranks. Raises ValueError as ``search`` does, and where P or M is not positive.
    """

    def search_in(placement: Placement, moves: int) -> tuple[float, Schedule]:
        schedule = search(placement, durations, max_activations, seed, max_held=max_held, max_moves=moves)
        work = Compiled(placement, durations)
        return work.makespan(work.rows(schedule)), schedule

    one_end = straight(num_ranks, num_microbatches)
    if num_ranks % 2 or num_microbatches % 2:
        return search_in(one_end, max_moves)[1]
    found = search_in(dualpipe.mirrored(num_ranks, num_microbatches), max_moves)
    if Compiled(one_end, durations).bound() < found[0]:  # one end seldom wins: a short search will do
        found = min(found, search_in(one_end, max_moves // 6), key=lambda pair: pair[0])
    return found[1]


def search(
    placement: Placement,
    durations: Durations,
    max_activations: int | None = None,
    seed: int = 0,
    *,
    max_held: int | None = None,
    max_moves: int = 12_000,
) -> Schedule:
    """A schedule of ``placement`` whose simulated makespan is at most that of the known schedules that fit the limits.

    ``max_activations``: the most ``peak_activations`` of any rank (default: stages + 1, what DualPipe needs).
    ``max_held``: the most activations and queued weight gradients together (default: ``max_activations``; DualPipe
    needs as many). ``max_moves``: how long to search; the moves of a long schedule are fewer (12,000 up to about 400
    steps on all ranks, 3,300 for P 16, M 64), so that a search of up to 16 ranks and 64 micro-batches stays under about
    10 seconds. The result passes ``check``. Raises ValueError for limits no
    schedule can keep, naming the smallest that can, and for durations of another number of stages.
    """
    activations = placement.num_stages + 1 if max_activations is None else max_activations
    limits = Limits(activations, activations if max_held is None else max_held)
    _refuse(placement, durations, limits)
    work = Compiled(placement, durations)

    chosen: list[Rows] = []
    for rows in sorted(starts(work, limits, seed), key=work.makespan):
        if len(chosen) < _STARTS and rows not in chosen:
            chosen.append(rows)
    climber = Climber(work, limits, seed)
    moves = min(max_moves, _STEPS // sum(map(len, chosen[0])))
    bound = work.bound() * (1 + 1e-9)
    climbed = [climber.climb(rows, moves // 6 if work.makespan(chosen[0]) > bound else 0) for rows in chosen]
    rows = min(climbed, key=work.makespan)
    for _ in range(8):
        if work.makespan(rows) > bound:
            rows = climber.climb(rows, moves // 16)
    schedule = work.schedule("auto", _joined(work, rows))
    check(schedule)
    return schedule


def _joined(work: Compiled, rows: Rows) -> Rows:
    """Full backwards where splitting them gains nothing."""
    size, span = work.num_chunks, work.makespan(rows)
    for rank in range(len(rows)):
        for index in reversed(range(len(rows[rank]) - 1)):
            row = rows[rank]
            code, chunk = row[index], row[index] % size
            if code // size == INPUT and row[index + 1] == WEIGHT * size + chunk:
                joined = [*rows[:rank], [*row[:index], size + chunk, *row[index + 2 :]], *rows[rank + 1 :]]
                if work.makespan(joined) <= span:
                    rows = joined
    return rows


def _refuse(placement: Placement, durations: Durations, limits: Limits) -> None:
    """Raise for what cannot be kept or used."""
    ranks_XS = tuple(zip(*placement.ranks_SX, strict=True))
    least = max(ranks.count(rank) for ranks in ranks_XS for rank in ranks)
    for name, limit in (("max_activations", limits.activations), ("max_held", limits.held)):
        if limit < least:
            raise ValueError(
                f"{name}={limit}: a micro-batch on its way through {placement.num_stages} stages on "
                f"{placement.num_ranks} ranks keeps {least} activations on one rank: use {least} or more"
            )
    for name, seconds in vars(durations).items():
        if isinstance(seconds, tuple) and len(seconds) != placement.num_stages:
            raise ValueError(
                f"durations.{name} has {len(seconds)} stages, the placement {placement.num_stages}: "
                f"give one number, or one for each stage"
            )
