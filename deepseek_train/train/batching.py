"""How a global batch is cut: sequences -> micro-batches of each data-parallel rank.

Step batch = ``microbatches x dp x microbatch_size`` consecutive sequences of the stream. Which rank reads which of them
depends on the layout, which sequences they are does not.
"""

from deepseek_train.config.curve import value_at
from deepseek_train.config.schema import RunConfig
from deepseek_train.spec.layout import ParallelLayout
from deepseek_train.train.schedule_plan import schedule_problems


def microbatches_for(config: RunConfig, layout: ParallelLayout, tokens: int) -> int:
    """Micro-batches of one pipeline in the step that starts at ``tokens``: the batch-size curve, rounded down to what
    the schedule can run. 0: the batch is too small for the layout."""
    batch = round(value_at(config.optim.batch_size, tokens))
    count = batch // (layout.dp * config.train.microbatch_size)
    while count > 0 and schedule_problems(config.schedule, layout.pp, count):
        count -= 1
    return count


def is_due(every: int, step: int) -> bool:
    """Whether what is done every so many steps (0: never) is done at ``step``."""
    return every > 0 and step % every == 0


def eval_microbatches(config: RunConfig) -> int:
    """Micro-batches of one pipeline in an evaluation: as configured, rounded up to an even number, which is all that
    any placement asks for (both directions)."""
    return config.train.eval_microbatches + config.train.eval_microbatches % 2


def sequence_numbers(
    start: int, microbatch: int, layout: ParallelLayout, dp_rank: int, microbatch_size: int
) -> range:
    """Global numbers of the sequences in ``microbatch`` of ``dp_rank``, for a batch that begins at ``start``."""
    first = start + (microbatch * layout.dp + dp_rank) * microbatch_size
    return range(first, first + microbatch_size)
