"""What changes while a run trains, and its form as a checkpoint."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from deepseek_train.checkpoint.pieces import Piece, Snapshot
from deepseek_train.checkpoint.store import load, save
from deepseek_train.data.loader import Cursor
from deepseek_train.train.build import Job
from deepseek_train.train.guard import GuardState


@dataclass(frozen=True)
class Progress:
    """How far the run has come. Whatever else changes is in tensors: weights, optimizer state, router biases."""

    step: int = 0  # optimizer steps tried, skipped ones included
    tokens: int = 0
    cursor: Cursor = Cursor()
    wall_seconds: float = 0.0  # spent training, all sessions together
    guard: GuardState = GuardState()

    def after(self, sequences: int, tokens: int, seconds: float, guard: GuardState) -> "Progress":
        """One more step."""
        return replace(
            self,
            step=self.step + 1,
            tokens=self.tokens + tokens,
            cursor=replace(self.cursor, consumed_sequences=self.cursor.consumed_sequences + sequences),
            wall_seconds=self.wall_seconds + seconds,
            guard=guard,
        )


def snapshot(job: Job, facts: dict[str, Any]) -> Snapshot:
    """Views of everything a checkpoint holds of this rank, under global names: each weight's FP32 master and moments as
    pieces of the logical (all experts), flattened tensor; router biases whole."""
    owned = {one.spec.name: one for one in job.weights}
    pieces = []
    for fragment in job.optimizer.fragments():
        one = owned[fragment.name]
        # Experts are split over expert-parallel ranks along the first axis: consecutive elements of the logical tensor.
        offset = job.mesh.expert_group.rank * one.weight.numel() if one.spec.expert else 0
        for kind, tensor in (
            ("master", fragment.master),
            ("exp_avg", fragment.exp_avg),
            ("exp_avg_sq", fragment.exp_avg_sq),
        ):
            pieces.append(Piece(f"{kind}/{fragment.name}", offset + fragment.start, one.spec.size, tensor))
    for average in job.ema.averages() if job.ema is not None else ():
        one = owned[average.name]
        offset = job.mesh.expert_group.rank * one.weight.numel() if one.spec.expert else 0
        pieces.append(Piece(f"ema/{average.name}", offset + average.start, one.spec.size, average.tensor))
    biases = {f"router_bias/{layer}": bias for layer, bias in job.router_biases()}
    return Snapshot(pieces, biases, facts)


def save_checkpoint(job: Job, root: Path, progress: Progress, wandb_id: str | None) -> Path:
    """Writes a checkpoint of ``progress`` (collective)."""
    only_rank_0_knows = [progress.wall_seconds, wandb_id]
    dist.broadcast_object_list(only_rank_0_knows, src=0)
    facts = {
        "step": progress.step,
        "tokens": progress.tokens,
        "wall_seconds": only_rank_0_knows[0],
        "cursor": progress.cursor.as_dict(job.train_source.identity),
        "guard": progress.guard.as_dict(),
        "optimizer_steps": job.optimizer.steps_taken(),
        "layout": asdict(job.layout),
        "wandb_id": only_rank_0_knows[1],
    }
    return save(root, progress.step, snapshot(job, facts), keep=job.config.checkpoint.keep)


def load_checkpoint(job: Job, path: Path) -> tuple[Progress, str | None]:
    """Puts a checkpoint into the job (collective): bitwise the state that was saved. Returns progress and wandb id."""
    facts = load(path, snapshot(job, {}))
    job.optimizer.restore(facts["optimizer_steps"])
    job.weights_changed()
    progress = Progress(
        step=facts["step"],
        tokens=facts["tokens"],
        cursor=Cursor.from_dict(facts["cursor"], job.train_source.identity),
        wall_seconds=facts["wall_seconds"],
        guard=GuardState.from_dict(facts["guard"]),
    )
    return progress, facts["wandb_id"]
