"""What quantised matrices look like in memory: the one home of tile sizes, largest values and scale rules.

Legend: M rows, K contraction axis (always last and contiguous), N outputs, E experts, P padded to a multiple of 128.

A value is E4M3, a scale is FP32 and multiplies it: x = value * scale. The scale of a tile comes from its largest
magnitude (V3 report section 3.3.2):

    scale = max(amax, SMALLEST_AMAX) / 448,  with ``pow2`` rounded up to a power of two;  value = E4M3(x * (1 / scale))

each operation rounded once to FP32, the last conversion to nearest-even and saturating. A NaN does not count for amax
and stays a NaN itself; an Inf gives its tile the scale Inf, and nothing in that tile is a number any more.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from deepseek_kernels.shapes import check_axes, check_dtype, check_shape

TILE = 128
E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of E4M3
SMALLEST_AMAX = 2.0**-100  # keeps scale and 1 / scale normal; gradients are far above it
LARGEST_E5M6 = 65024.0


@dataclass(frozen=True)
class Rows:
    """A matrix [M, K] in tiles of 1 x 128 along K: activations, their gradients, and (transposed, so that tokens are
    the contraction) the operands of weight gradients. Columns beyond ``width`` are zeros."""

    values: Tensor  # E4M3 [M, KP]
    scales: Tensor  # FP32 [KP / 128, M]
    width: int  # K

    def __post_init__(self) -> None:
        check_axes("Rows", "values", self.values, "M, KP")
        check_dtype("Rows", "values", self.values.dtype, E4M3)
        rows, width = len(self.values), padded(self.width)
        _check_sizes("Rows", self.values, (rows, width), self.scales, (width // TILE, rows))


@dataclass(frozen=True)
class Blocks:
    """A weight [N, K], or [E, N, K], in blocks of 128 x 128. What is beyond ``rows`` and ``width`` are zeros."""

    values: Tensor  # E4M3 [NP, KP] or [E, NP, KP]
    scales: Tensor  # FP32 [NP / 128, KP / 128] or [E, NP / 128, KP / 128]
    rows: int  # N
    width: int  # K

    def __post_init__(self) -> None:
        check_axes("Blocks", "values", self.values, "NP, KP", "E, NP, KP")
        check_dtype("Blocks", "values", self.values.dtype, E4M3)
        experts, n, k = tuple(self.values.shape[:-2]), padded(self.rows), padded(self.width)
        _check_sizes("Blocks", self.values, (*experts, n, k), self.scales, (*experts, n // TILE, k // TILE))


@dataclass(frozen=True)
class Packed:
    """A matrix [M, K] in E5M6: 1 sign, 5 exponent and 6 fraction bits (FP16 without its last 4, rounded to nearest
    even), each tile of 1 x 128 divided by a power of two so that its largest value is at most 65024. Eight values lie
    in three words, each value's 12 bits above those of the one before: value j begins at bit 12 j of the 96."""

    words: Tensor  # int32 [M, KP / 8 * 3]
    scales: Tensor  # FP32 [KP / 128, M]
    width: int  # K

    def __post_init__(self) -> None:
        check_axes("Packed", "words", self.words, "M, KP / 8 * 3")
        check_dtype("Packed", "words", self.words.dtype, torch.int32)
        rows, width = len(self.words), padded(self.width)
        _check_sizes("Packed", self.words, (rows, width // 8 * 3), self.scales, (width // TILE, rows))


@dataclass(frozen=True)
class Groups:
    """Rows sorted by expert, each expert's share padded to a multiple of 128 rows (padding rows are zeros)."""

    rows_E: tuple[int, ...]  # of each expert, without padding
    starts: Tensor  # int32 [E + 1]: first padded row of each expert, and the number of all
    tile_expert: Tensor  # int32 [padded rows / 128]: whose a tile of 128 rows is

    @property
    def padded(self) -> int:
        return sum(padded(rows) for rows in self.rows_E)

    @staticmethod
    def of(rows_E: tuple[int, ...], device: torch.device | str = "cpu") -> "Groups":
        if any(rows < 0 for rows in rows_E):
            raise ValueError(f"Groups.of: rows_E is {rows_E}, must not be negative")
        tiles = [padded(rows) // TILE for rows in rows_E]
        starts = [0]
        for count in tiles:
            starts.append(starts[-1] + count * TILE)
        owners = [expert for expert, count in enumerate(tiles) for _ in range(count)]
        numbers = torch.tensor(starts + owners, dtype=torch.int32).to(device, non_blocking=True)
        return Groups(rows_E, numbers[: len(starts)], numbers[len(starts) :])


def new_tiles(like: Tensor, rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Values and scales of a matrix [rows, width] in tiles along its rows, both still to be written."""
    values = like.new_empty(rows, padded(width), dtype=E4M3)
    return values, like.new_empty(padded(width) // TILE, rows, dtype=torch.float32)


def _check_sizes(
    kind: str, values: Tensor, shape: tuple[int, ...], scales: Tensor, scales_shape: tuple[int, ...]
) -> None:
    if values.shape != shape:
        raise ValueError(
            f"{kind}: values are {list(values.shape)}, of this width and rows they are {list(shape)}"
        )
    check_shape(kind, "scales", scales, scales_shape, "values", shape)
    check_dtype(kind, "scales", scales.dtype, torch.float32)


def padded(size: int) -> int:
    """The next multiple of 128."""
    return -(-size // TILE) * TILE
