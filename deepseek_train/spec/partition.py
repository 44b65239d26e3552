"""A row of costs cut into consecutive parts, as evenly as can be."""

from collections.abc import Callable, Sequence
from itertools import accumulate

_Cut = tuple[int, tuple[int, ...]]  # what it is worth (less is better), and the sizes of its parts


def even_parts(costs: Sequence[int], num_parts: int, before: int = 0, after: int = 0) -> tuple[int, ...]:
    """Sizes of ``num_parts`` consecutive parts of ``costs`` whose dearest part is the cheapest there is, and among
    those the sum of squares the smallest; of equals, the one with more in front.

    ``before`` is added to the first part and ``after`` to the last; these two may be empty, the others not. Raises
    ValueError where there are too few costs for that.
    """
    if len(costs) < num_parts - 2:
        raise ValueError(
            f"{len(costs)} costs do not fill the {num_parts - 2} inner ones of {num_parts} parts"
        )
    sums = list(accumulate(costs, initial=0))

    def part(index: int, start: int, stop: int) -> int:
        ends = before * (index == 0) + after * (index == num_parts - 1)
        return sums[stop] - sums[start] + ends

    def best(join: Callable[[int, int], int | None]) -> _Cut:
        """Cheapest cut, where ``join(worth, cost)`` adds a part to a cut; None: not this part."""
        cuts: dict[int, _Cut] = {0: (0, ())}  # by how many costs the parts so far have used
        for index in range(num_parts):
            fewest = 0 if index in (0, num_parts - 1) else 1
            longer: dict[int, _Cut] = {}
            for start, (worth, sizes) in cuts.items():
                stops = (len(costs),) if index == num_parts - 1 else range(start + fewest, len(costs) + 1)
                for stop in stops:
                    joined = join(worth, part(index, start, stop))
                    if joined is None:
                        continue
                    cut = joined, (*sizes, stop - start)
                    if stop not in longer or _rank(cut) < _rank(longer[stop]):
                        longer[stop] = cut
            cuts = longer
        return cuts[len(costs)]

    dearest, _ = best(max)
    return best(lambda worth, cost: worth + cost**2 if cost <= dearest else None)[1]


def _rank(cut: _Cut) -> tuple[int, tuple[int, ...]]:
    worth, sizes = cut
    return worth, tuple(-size for size in sizes)
