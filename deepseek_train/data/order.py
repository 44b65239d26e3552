"""The order of samples as a pure function: global sample number -> sample of the split.

Sample number k is position ``k % size`` of epoch ``k // size``; each epoch is a permutation of its own,
computed by a Feistel network whose cycles are walked until they re-enter ``[0, size)`` (Black and Rogaway,
"Ciphers with arbitrary finite domains", 2002). Integers only, O(1) memory, random access: the same on every
machine and for every number of ranks.
"""

from dataclasses import dataclass

import xxhash

ORDER_VERSION = 1  # of this file's arithmetic; checkpoints record it

_ROUNDS = 6
_MIN_HALF_BITS = 3  # narrower networks reach too few permutations
_MASK64 = (1 << 64) - 1


@dataclass(frozen=True)
class SampleOrder:
    """Order of ``size`` samples, for every epoch, fixed by ``seed`` and ``manifest_hash``."""

    size: int
    seed: int
    manifest_hash: str

    def sample(self, k: int) -> int:
        """The sample in ``[0, size)`` that global sample number ``k`` >= 0 stands for."""
        if k < 0:
            raise ValueError(f"sample number {k} is negative; the first sample of a run is number 0")
        epoch, position = divmod(k, self.size)
        return _permute(position, self.size, self._round_keys(epoch))

    def _round_keys(self, epoch: int) -> tuple[int, ...]:
        text = f"{ORDER_VERSION}/{self.seed}/{self.manifest_hash}/{epoch}"
        return tuple(xxhash.xxh3_64_intdigest(text.encode(), seed=number) for number in range(_ROUNDS))


def _permute(position: int, size: int, round_keys: tuple[int, ...]) -> int:
    half = max(_MIN_HALF_BITS, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = position >> half, position & mask
        for key in round_keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        position = left << half | right
        if position < size:
            return position


def _mix(value: int) -> int:
    """The finaliser of splitmix64: every input bit reaches every output bit."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK64
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK64
    return value ^ value >> 31
