"""Limits of the quantisation kernels: registers that leave a multiprocessor 16 warps,
tiles that move 16 bytes at a time."""

from typing import Any

from deepseek_kernels.gate.case import Case, Limits
from deepseek_kernels.quant import column_kernels as columns
from deepseek_kernels.quant import e5m6_kernels as e5m6
from deepseek_kernels.quant import row_kernels as rows

_SIZE = {"bf16": 2, "fp32": 4, "fp8e4nv": 1, "u8": 1}
_NARROW = ("LDG.E.U8", "LDG.E.U16", "STG.E.U8", "STG.E.U16", "LDS.U8", "STS.U8")


def _case(
    name: str,
    kernel: Any,
    types: str,
    constants: dict[str, Any],
    launch: dict[str, int],
    registers: int,
    loaded: int,
    stored: int,
) -> Case:
    """``types``: of the pointers, in order; what is left of the arguments are sizes, all divisible by 16. ``loaded``,
    ``stored``: bytes of a program's tiles, all of which must move 16 at a time."""
    arguments = [one for one in kernel.arg_names if one not in constants]
    pointers = [f"*{one}" for one in types.split()]
    signature = dict(zip(arguments, pointers + ["i32"] * (len(arguments) - len(pointers)), strict=True))
    moved = 16 * 32 * launch["num_warps"]
    needs = {"LDG.E.128": loaded // moved, "STG.E.128": stored // moved}
    limits = Limits(registers, 24 * 1024, {name: n for name, n in needs.items() if n}, _NARROW)
    return Case(name, kernel, signature, constants, launch, tuple(arguments), limits)


def _row_cases() -> list[Case]:
    cases = []
    tile = rows.ROWS * 128
    for x in ("bf16", "fp32"):
        size = _SIZE[x]
        for pow2 in (False, True):
            kind = f"{x} {'pow2' if pow2 else 'plain'}"
            constants = {"POW2": pow2, "R": rows.ROWS}
            kernel, launch = rows.rows_kernel, rows.ROWS_LAUNCH
            types = f"{x} fp8e4nv fp32"
            cases.append(_case(f"rows {kind}", kernel, types, constants, launch, 64, tile * size, tile))
            kernel, launch = rows.blocks_kernel, rows.BLOCKS_LAUNCH
            block = 128 * 128
            constants = {"POW2": pow2}
            cases.append(_case(f"blocks {kind}", kernel, types, constants, launch, 96, block * size, block))
        kernel, launch, constants = rows.dequantise_kernel, rows.DEQUANTISE_LAUNCH, {"R": rows.ROWS}
        types = f"fp8e4nv fp32 {x}"
        cases.append(_case(f"dequantise {x}", kernel, types, constants, launch, 64, tile, tile * size))
    return cases


def _tile(tile: tuple[int, int]) -> dict[str, Any]:
    return {"C": tile[0], "TALL": tile[1]}


def _column_cases() -> list[Case]:
    cases = []
    for pow2 in (False, True):
        for x in ("bf16", "fp32"):
            kind = f"{x} {'pow2' if pow2 else 'plain'}"
            kernel, launch, moved = columns.columns_kernel, columns.COLUMNS_LAUNCH, 128 * columns.COLUMNS[0]
            constants = _tile(columns.COLUMNS) | {"POW2": pow2}
            types = f"{x} fp8e4nv fp32"
            cases.append(
                _case(f"columns {kind}", kernel, types, constants, launch, 128, moved * _SIZE[x], moved)
            )
            kernel, launch, moved = columns.both_kernel, columns.both_launch(_SIZE[x], pow2), 128 * 128
            constants = _tile(columns.BOTH) | {"POW2": pow2, "VECTOR": columns.both_vector(_SIZE[x])}
            types = f"{x} fp8e4nv fp32 fp8e4nv fp32"
            cases.append(
                _case(f"both {kind}", kernel, types, constants, launch, 128, moved * _SIZE[x], moved)
            )
        kind, types = "pow2" if pow2 else "plain", "fp8e4nv fp32 fp8e4nv fp32"
        kernel, launch, moved = (
            columns.requantise_kernel,
            columns.REQUANTISE_LAUNCH,
            128 * columns.REQUANTISE[0],
        )
        constants = _tile(columns.REQUANTISE) | {"POW2": pow2}
        cases.append(_case(f"requantise {kind}", kernel, types, constants, launch, 208, moved, moved))
    kernel, launch, moved = columns.transpose_kernel, columns.TRANSPOSE_LAUNCH, 128 * columns.TRANSPOSE[0]
    cases.append(_case("transpose", kernel, "u8 u8", _tile(columns.TRANSPOSE), launch, 64, moved, moved))
    return cases


def _e5m6_cases() -> list[Case]:
    cases = []
    for x in ("bf16", "fp32"):
        size = 128 * _SIZE[x]
        kernel, launch, types = e5m6.pack_kernel, e5m6.PACK_LAUNCH, f"{x} i32 fp32"
        r, words = e5m6.PACK_ROWS, e5m6.WORDS * 4
        cases.append(_case(f"pack {x}", kernel, types, {"R": r}, launch, 72, r * size, r * words))
        kernel, launch, types, r = e5m6.unpack_kernel, e5m6.UNPACK_LAUNCH, f"i32 fp32 {x}", e5m6.UNPACK_ROWS
        cases.append(_case(f"unpack {x}", kernel, types, {"R": r}, launch, 64, r * words, r * size))
    return cases


CASES = (*_row_cases(), *_column_cases(), *_e5m6_cases())
