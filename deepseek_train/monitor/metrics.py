"""Facts about one optimizer step, as they leave the step: plain numbers, no tensors."""

from dataclasses import dataclass

from deepseek_train.schedule.timeline import Timeline
from deepseek_train.spec.links import ExpertTraffic


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
    skipped: bool  # no weight moved
    expert_traffic: ExpertTraffic | None = (
        None  # sent by all ranks; None: experts on one rank, uneven nodes, DeepEP
    )
    timeline: Timeline | None = None  # only on steps that were traced
    tflops: float | None = (
        None  # per second and rank, by the causal count of ``spec.work``; None in older files
    )
    mfu: float | None = None  # share of the GPU's BF16 peak; None where no peak is known
    skipped_why: str | None = None
    skipped_steps: int = 0  # of the run up to now, this one included
    replica_check_seconds: float | None = None  # of the step; None: replicas were not compared in it

    def max_violations(self) -> dict[int, float]:
        """MaxVio of each MoE layer: its busiest expert's tokens / the mean of its experts - 1, over the global batch
        ("Auxiliary-Loss-Free Load Balancing Strategy", equation 4). 0 is perfect, experts / top-k - 1 the worst."""
        found = {}
        for layer, counts in self.expert_load.items():
            mean = sum(counts) / len(counts)
            found[layer] = (max(counts) - mean) / mean if mean else 0.0
        return found

    def worst_max_violation(self) -> float:
        """MaxVio of the worst layer; 0 without MoE layers."""
        return max(self.max_violations().values(), default=0.0)

    def mean_max_violation(self) -> float:
        """MaxVio averaged over layers; 0 without MoE layers."""
        found = self.max_violations().values()
        return sum(found) / max(1, len(found))

    def load_max_over_mean(self) -> float:
        """Worst layer's busiest expert over its mean (1 is perfect); 1 without MoE layers."""
        return 1.0 + self.worst_max_violation()


@dataclass(frozen=True)
class EvalMetrics:
    """One pass over held-out data."""

    step: int
    tokens: int  # consumed by training so far
    loss: float  # mean next-token cross-entropy, nats
    mtp_loss: float | None
    num_tokens: int  # evaluated
    ema_loss: float | None = None  # of the averaged weights; None where there are none
