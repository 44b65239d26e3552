"""How often everything that recomputation and split backwards could run once too often has run."""

from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from deepseek_train.model.block import DenseBlock, MoeBlock
from deepseek_train.model.embed import _Embed
from deepseek_train.model.head import _CrossEntropy
from deepseek_train.model.linear import _GroupedLinear, _Linear
from deepseek_train.model.norm import _RmsNorm
from deepseek_train.model.swiglu import _SwiGlu
from deepseek_train.phases.recompute import Recomputation
from deepseek_train.phases.wgrad import WeightGradQueue, Work

WITH_WEIGHT = (_Linear, _GroupedLinear, _RmsNorm, _Embed)
FUNCTIONS = (*WITH_WEIGHT, _SwiGlu, _CrossEntropy)
PHASES = (
    (DenseBlock, "attend"),
    (DenseBlock, "feed_forward"),
    (MoeBlock, "attend"),
    (MoeBlock, "share"),
    (MoeBlock, "compute"),
)
EXCHANGES = ((MoeBlock, "plan"), (MoeBlock, "add"))
Setter = Callable[[object, str, object], None]


@dataclass
class Region:
    """One call of a region. ``makes``: whether its results are memory of its own."""

    kind: str
    makes: bool = False
    runs: int = 0


@dataclass
class Counts:
    forward: Counter[str] = field(default_factory=Counter)  # by function
    backward: Counter[str] = field(default_factory=Counter)
    works: list[list[int]] = field(default_factory=list)  # of each weight-gradient closure, how often it ran
    regions: list[Region] = field(default_factory=list)
    phases: Counter[str] = field(default_factory=Counter)

    @property
    def functions_with_weight(self) -> int:
        return sum(self.backward[function.__name__] for function in WITH_WEIGHT)

    def clear(self) -> None:
        for one in (self.forward, self.backward, self.works, self.regions, self.phases):
            one.clear()

    def copy(self) -> "Counts":
        return deepcopy(self)


def count(set_attribute: Setter) -> Counts:
    """Counts from now on, for good or as long as ``set_attribute`` (``monkeypatch.setattr``) holds."""
    counts = Counts()
    for function in FUNCTIONS:
        for name, counter in (("forward", counts.forward), ("backward", counts.backward)):
            set_attribute(
                function, name, staticmethod(_counted(getattr(function, name), counter, function.__name__))
            )
    for owner, name in (*PHASES, *EXCHANGES):
        set_attribute(owner, name, _counted(getattr(owner, name), counts.phases, f"{owner.__name__}.{name}"))
    _count_works(counts, set_attribute)
    _count_regions(counts, set_attribute)
    return counts


def _counted(call: Callable[..., Any], counter: Counter[str], name: str) -> Callable[..., Any]:
    def counted(*args: Any) -> Any:
        counter[name] += 1
        return call(*args)

    return counted


def _count_works(counts: Counts, set_attribute: Setter) -> None:
    add = WeightGradQueue.add

    def counting(queue: WeightGradQueue, work: Work) -> None:
        ran = [0]
        counts.works.append(ran)

        def counted() -> None:
            ran[0] += 1
            work()

        add(queue, counted)

    set_attribute(WeightGradQueue, "add", counting)


def _count_regions(counts: Counts, set_attribute: Setter) -> None:
    region = Recomputation.region

    def counting(self: Recomputation, kind: Any, run: Callable[..., Any], *inputs: Tensor) -> Any:
        called = Region(kind)
        counts.regions.append(called)

        def counted(*given: Tensor) -> Any:
            called.runs += 1
            return run(*given)

        made = region(self, kind, counted, *inputs)
        outputs = made if isinstance(made, tuple) else (made,)
        known = [one.untyped_storage() for one in inputs]
        called.makes = not any(one.untyped_storage() is other for one in outputs for other in known)
        return made

    set_attribute(Recomputation, "region", counting)
