"""What was asked of the guard: a slice of ``config/schema.py``."""

from dataclasses import dataclass


@dataclass(frozen=True)
class GuardConfig:
    """Steps that are not taken (``train/guard.py``). One whose loss or gradient is not finite never is; the rest is for
    spikes. V3 had none, but a run of a month may lose days to one; far from a spike the guard changes nothing."""

    # A step with more than this factor times the running mean is skipped; 0: whatever it is. Losses are nats: twice the
    # mean is the square of the perplexity, which no batch of a sound run comes near. Norms of single steps do reach
    # some means, and are clipped anyway.
    loss_factor: float = 2.0
    norm_factor: float = 10.0
    mean_steps: int = 100  # accepted steps that the means span; before as many no spike is seen
    # So many skipped steps in a row: the weights are to blame, or the data. Back to the checkpoint before them, and
    # past their data. 0: never.
    max_skips: int = 3
    max_rollbacks: int = 2  # to the same checkpoint; then the run stops
