"""What ``deepseek-placement`` can be asked, and what can be wrong with it: all of it at once, each with its mend."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deepseek_train.cli.key_value import UsageError, parse_key_values
from deepseek_train.cli.placement_load import ExpertLoads, groups_of_run, loads_of_file, loads_of_run
from deepseek_train.parallel.expert.placement_problems import load_problems, size_problems


@dataclass(frozen=True)
class PlacementRequest:
    """Keys of ``deepseek-placement``."""

    run: str | None = None
    steps: int | None = None  # 100
    load: str | None = None
    groups: int | None = None
    gpus: int | None = None
    nodes: int = 1
    redundant: int = 0
    output: str = "text"


@dataclass(frozen=True)
class Question:
    """Loads and sizes that fit one another."""

    loads: ExpertLoads
    experts: int  # of a layer
    redundant: int
    groups: int
    nodes: int
    gpus: int
    output: str  # text or json


def understand(words: Sequence[str]) -> Question:
    """Reads what the words name. Raises UsageError with every mistake, those that only the files show included."""
    understood: list[Question] = []
    parse_key_values(PlacementRequest, words, lambda request: _understand(request, understood))
    return understood[0]


def _understand(request: PlacementRequest, understood: list[Question]) -> list[str]:
    """What is wrong; the question is appended to ``understood`` if nothing is."""
    problems = _problems(request)
    loads, groups = None, request.groups
    try:
        loads = _loads(request)
    except UsageError as error:
        problems += error.problems
    try:
        groups = groups_of_run(Path(request.run)) if groups is None and request.run is not None else groups
    except UsageError as error:
        problems += error.problems
    groups = 1 if groups is None else groups
    wrong_loads = [] if loads is None else [f"{loads.source}: {p}" for p in load_problems(loads.by_layer)]
    problems += wrong_loads
    if request.gpus is None:
        return problems
    redundant, experts = max(request.redundant, 0), max(groups * request.gpus, 1)
    if loads is None or wrong_loads:  # then as many experts as fit these groups and GPUs
        return problems + size_problems(experts, experts, groups, request.nodes, request.gpus)
    experts = len(next(iter(loads.by_layer.values())))
    problems += size_problems(experts, experts + redundant, groups, request.nodes, request.gpus)
    understood.append(
        Question(loads, experts, redundant, groups, request.nodes, request.gpus, request.output)
    )
    return problems


def _problems(request: PlacementRequest) -> list[str]:
    """What the request itself shows."""
    problems = []
    if request.run is None and request.load is None:
        problems.append("nothing says the loads: write run=FOLDER, as run=runs/tiny, or load=FILE.json")
    if request.run is not None and request.load is not None:
        problems.append("run and load are both given: write one of them")
    if request.steps is not None and request.load is not None:
        problems.append("steps are those of a run: leave steps=.. away with load=..")
    if request.steps is not None and request.steps < 1:
        problems.append(f"steps={request.steps}: write 1 or more")
    if request.gpus is None:
        problems.append("gpus: say how many hold the experts, as gpus=32")
    if request.redundant < 0:
        problems.append(f"redundant={request.redundant}: write 0 or more")
    if request.output not in ("text", "json"):
        problems.append(f"output={request.output}: write one of text json")
    return problems


def _loads(request: PlacementRequest) -> ExpertLoads | None:
    if request.load is not None:
        return loads_of_file(Path(request.load))
    if request.run is not None:
        return loads_of_run(Path(request.run), 100 if request.steps is None else max(request.steps, 1))
    return None
