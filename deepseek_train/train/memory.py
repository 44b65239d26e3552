"""A rank that has run out of memory: what it says, and what to do about it."""

import torch

from deepseek_train.config.schema import RunConfig
from deepseek_train.monitor import numbers
from deepseek_train.monitor.memory import peak_memory_bytes
from deepseek_train.parallel.lost import causes

_NO_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "Cannot allocate memory")


def out_of_memory(error: BaseException) -> str | None:
    """The allocator's own words where ``error``, or what caused it, is that there is no memory; else None."""
    found = None
    for cause in causes(error):  # the last one that says so has the plainest words
        none_left = isinstance(cause, MemoryError | torch.OutOfMemoryError)
        if none_left or any(word in str(cause) for word in _NO_MEMORY):
            found = str(cause).partition("\n")[0] or type(cause).__name__
    return found


def memory_report(config: RunConfig, rank: int, place: str, words: str) -> str:
    """For the user. ``place``: step and phase; ``words``: the allocator's."""
    lines = [f"rank {rank} is out of memory at {place}: {words}"]
    device = "of the GPU reserved" if torch.cuda.is_available() else "resident"
    held = f"  at most {numbers.data_size(peak_memory_bytes())} {device} so far"
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        held += f", {numbers.data_size(free)} of {numbers.data_size(total)} free"
    size, forgets = config.train.microbatch_size, ", ".join(config.train.recompute) or "nothing"
    lines.append(
        f"{held}; micro-batches of {size} x {config.data.sequence_length} tokens, recomputed: {forgets}"
    )
    smaller = f"train.microbatch_size={size // 2}, " if size > 1 else ""
    lines.append(
        f"Try {smaller}more in train.recompute, or more ranks (parallel.pp, parallel.ep with parallel.dp): any layout "
        "goes on from the last checkpoint."
    )
    return "\n".join(lines)
