"""Hill climbing over schedules: change a step that decides the makespan, keep what is not slower."""

from collections import deque
from random import Random

from deepseek_train.schedule.search.compiled import (
    BACKWARD,
    FORWARD,
    INPUT,
    PAIR,
    WEIGHT,
    Compiled,
    Ends,
    Rows,
    last_end,
)
from deepseek_train.schedule.search.memory import Limits

_CRITICAL = 0.8  # share of moves on the critical path, the others anywhere
_SAME = 1 + 1e-12  # makespans within this factor differ by rounding only
_MIRRORED = 0.8  # share of moves made on both ends at once, where the placement is its own mirror image


class Climber:
    """Moves over rows of ``work`` within ``limits``."""

    def __init__(self, work: Compiled, limits: Limits, seed: int) -> None:
        self.work, self.limits = work, limits
        self.random = Random(seed)
        placement = work.placement
        both_ends = all(sum(ranks) == placement.num_ranks - 1 for ranks in placement.ranks_SX)
        self.is_mirrored = both_ends and placement.num_directions == 2 and placement.num_microbatches % 2 == 0

    def climb(self, rows: Rows, num_moves: int) -> Rows:
        """The fastest rows found, ``rows`` or better. Moves that cost no time are made as well: they lead on to
        others.
        """
        best, best_span = rows, self.work.makespan(rows)
        span, path = best_span, self._critical_path(rows, self.work.ends(rows))
        for _ in range(num_moves):
            rank, index = self.random.choice(path)
            if self.random.random() > _CRITICAL:
                rank = self.random.randrange(len(rows))
                index = self.random.randrange(len(rows[rank]))
            row = self._in_order(self._moved(rows[rank], index))
            if row is None or not self.limits.allow(row, self.work.num_chunks):
                continue
            changed = [*rows[:rank], row, *rows[rank + 1 :]]
            if self.is_mirrored and self.random.random() < _MIRRORED:
                changed[-1 - rank] = [self._mirror_image(code) for code in row]
            ends_R = self.work.ends(changed)
            changed_span = last_end(changed, ends_R)
            if changed_span > span * _SAME:
                continue
            rows, span, path = changed, changed_span, self._critical_path(changed, ends_R)
            if span < best_span:
                best, best_span = rows, span
        return best

    def _critical_path(self, rows: Rows, ends_R: Ends) -> list[tuple[int, int]]:
        """(rank, index) of steps without a gap between them that take the whole makespan; ties are drawn."""
        sent = {
            message: (rank, index, ends_R[rank][index] + latency)
            for rank, row in enumerate(rows)
            for index, code in enumerate(row)
            for message, latency in self.work.ops[code][1]
        }
        rank = max(range(len(rows)), key=lambda r: ends_R[r][-1])
        at = (rank, len(rows[rank]) - 1)
        path = [at]
        while True:
            rank, index = at
            inputs, _, length = self.work.ops[rows[rank][index]]
            start = ends_R[rank][index] - length * (1 + 1e-9)
            before = [(r, i) for r, i, arrival in (sent[m] for m in inputs if m in sent) if arrival >= start]
            if index and ends_R[rank][index - 1] >= start:
                before.append((rank, index - 1))
            if not before:
                return path
            at = self.random.choice(before)
            path.append(at)

    def _moved(self, row: list[int], index: int) -> list[int]:
        """A copy of ``row`` with the step at ``index`` split, joined with the next, or shifted. Its weight gradients
        may be out of order, or come too early.
        """
        size, dice = self.work.num_chunks, self.random.random()
        row = list(row)
        code = row[index]
        kind, chunk = divmod(code, size)
        if dice < 0.4 and (kind == BACKWARD or kind >= PAIR):
            backward = self.random.choice((INPUT, BACKWARD)) if kind >= PAIR else INPUT
            parts = [backward * size + chunk] + ([kind - PAIR] if kind >= PAIR else [])
            self.random.shuffle(parts)
            row[index : index + 1] = parts
            if backward == INPUT:
                later = index + len(parts) + int(self.random.expovariate(0.2))
                row.insert(later, WEIGHT * size)
        elif dice < 0.6 and index + 1 < len(row):
            first, second = sorted(row[index : index + 2])
            if first // size == FORWARD and second // size in (BACKWARD, INPUT):
                row[index : index + 2] = [self.work.pair(first, second % size)]
                if second // size == INPUT:
                    weights = [i for i in range(index, len(row)) if row[i] // size == WEIGHT]
                    del row[self.random.choice(weights[:3])]
        else:
            del row[index]
            shift = 1 + int(self.random.expovariate(0.7))
            row.insert(max(0, index + self.random.choice((-shift, shift))), code)
        return row

    def _in_order(self, row: list[int]) -> list[int] | None:
        """``row`` with its weight gradients in the order they are queued; None: one comes too early."""
        size = self.work.num_chunks
        queue: deque[int] = deque()
        bound = []
        for code in row:
            if code // size == INPUT:
                queue.append(code % size)
            elif code // size == WEIGHT:
                if not queue:
                    return None
                code = WEIGHT * size + queue.popleft()
            bound.append(code)
        return bound

    def _mirror_image(self, code: int) -> int:
        """The same step of the other direction."""
        kind, chunk = divmod(code, self.work.num_chunks)
        if kind >= PAIR:
            return self.work.pair(self._other(kind - PAIR), self._other(chunk))
        return kind * self.work.num_chunks + self._other(chunk)

    def _other(self, chunk: int) -> int:
        count = self.work.placement.num_microbatches
        return chunk // count * count + (chunk % count + count // 2) % count
