"""Facts about one optimizer step, as they leave the step: plain numbers, no tensors."""

from dataclasses import dataclass

from deepseek_train.schedule.timeline import Timeline


@dataclass(frozen=True)
class StepMetrics:
    """One training step of the whole job (all ranks together)."""

    step: int  # 1 is the first
    tokens: int  # consumed since the start of the run
    loss: float  # mean next-token cross-entropy, nats
    mtp_loss: float | None  # mean cross-entropy of the MTP modules, unweighted; None without MTP
    balance_loss: float  # mean sequence-wise balance loss, unweighted by alpha
    grad_norm: float  # before clipping
    lr: float
    batch_size: int  # sequences
    step_seconds: float
    tokens_per_second: float
    expert_load: dict[int, tuple[int, ...]]  # MoE layer -> tokens each expert got in this step's global batch
    memory_bytes: int  # peak of the fullest rank: device memory on GPUs, resident set on CPUs
    skipped: bool  # a gradient was not finite; no weight moved
    timeline: Timeline | None = None  # only on steps that were traced

    def load_max_over_mean(self) -> float:
        """Worst layer's busiest expert over its mean (1 is perfect; MaxVio = this - 1); 1 without MoE layers."""
        worst = 1.0
        for counts in self.expert_load.values():
            mean = sum(counts) / len(counts)
            worst = max(worst, max(counts) / mean if mean else 1.0)
        return worst


@dataclass(frozen=True)
class EvalMetrics:
    """One pass over held-out data."""

    step: int
    tokens: int  # consumed by training so far
    loss: float  # mean next-token cross-entropy, nats
    mtp_loss: float | None
    num_tokens: int  # evaluated
