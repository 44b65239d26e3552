"""Medians of GPU times, with the L2 cache flushed before every call; on a CPU single calls, to rehearse."""

import time
from collections.abc import Callable
from functools import cache, partial

import torch
from torch.nn import functional

from benchmarks.kernel.contest import Ceilings, Contest, Result

REHEARSAL = Ceilings(1e12, 1e12, 1e12)
MEMORY_FLOOR_BYTES = 2 << 30
HEAD_START = 400_000  # cycles, some 0.2 ms: launching takes the CPU less


def median_ms(call: Callable[[], object], device: torch.device, milliseconds: int = 40) -> float:
    """Events around each call, after a warm-up that compiles. The GPU sleeps before each until the CPU has launched it
    all: otherwise short calls would be timed at the speed of launching."""
    call()
    if device.type != "cuda":
        started = time.perf_counter()
        call()
        return (time.perf_counter() - started) * 1e3
    flush = torch.empty(256 << 20, dtype=torch.int8, device=device)
    torch.cuda.synchronize()
    spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    started = time.perf_counter()
    while len(spans) < 10 or (time.perf_counter() - started) * 1e3 < milliseconds:
        torch.cuda._sleep(HEAD_START)
        flush.zero_()
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        call()
        last.record()
        spans.append((first, last))
        if len(spans) % 10 == 0:
            torch.cuda.synchronize()
        if len(spans) == 100:
            break
    torch.cuda.synchronize()
    times = sorted(first.elapsed_time(last) for first, last in spans)
    return times[len(times) // 2]


def ceilings(device: torch.device) -> Ceilings:
    if device.type != "cuda":
        return REHEARSAL
    source = torch.randn(MEMORY_FLOOR_BYTES // 8, device=device)
    target = torch.empty_like(source)
    copy_ms = median_ms(lambda: target.copy_(source), device)
    a, b = (torch.randn(8192, 8192, device=device).bfloat16() for _ in range(2))
    bf16_ms = median_ms(lambda: functional.linear(a, b), device)
    one = torch.ones((), device=device)
    qa, qb = (t.clamp(-448, 448).to(torch.float8_e4m3fn) for t in (a, b))
    fp8_ms = median_ms(
        lambda: torch._scaled_mm(qa, qb.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True),
        device,
    )
    flops = 2 * 8192**3
    return Ceilings(MEMORY_FLOOR_BYTES / copy_ms * 1e3, flops / bf16_ms * 1e3, flops / fp8_ms * 1e3)


@cache
def copy_ms(moved: int, device: torch.device) -> float:
    """Of a copy that reads and writes so many bytes together: a short one is slower a byte than a long one."""
    source = torch.empty(moved // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return median_ms(partial(target.copy_, source), device, 20)


def race(contest: Contest, limits: Ceilings, device: torch.device) -> list[Result]:
    """All entries, one after the other. An entry that cannot run is a result that says why."""
    floor = limits.floor_ms(contest)
    results = []
    for entry, call in contest.entries.items():
        try:
            ms = median_ms(call, device)
        except Exception as error:
            note = (
                f"{type(error).__name__}: {str(error).splitlines()[0][:160]}" if str(error) else repr(error)
            )
            results.append(
                Result(contest.op, contest.shape, contest.bound, entry, None, floor, None, None, note=note)
            )
            continue
        rate = contest.work / ms * 1e3 / (1e9 if contest.bound == "memory" else 1e12)
        copy = copy_ms(contest.work, device) / ms if contest.bound == "memory" else None
        results.append(
            Result(contest.op, contest.shape, contest.bound, entry, ms, floor, rate, floor / ms, copy)
        )
    return results
