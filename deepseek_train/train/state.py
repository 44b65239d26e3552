"""What changes while a run trains, and its form as a checkpoint."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch.distributed as dist

from deepseek_train.checkpoint.agree import on_first
from deepseek_train.checkpoint.errors import CheckpointError
from deepseek_train.checkpoint.manifest import read_manifest
from deepseek_train.checkpoint.pieces import Piece, Snapshot
from deepseek_train.checkpoint.places import Place
from deepseek_train.checkpoint.store import load, read_index
from deepseek_train.data.errors import DataError
from deepseek_train.data.loader import Cursor
from deepseek_train.train.build import Job
from deepseek_train.train.folder import as_json
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


def checkpoint_of(
    job: Job, progress: Progress, wandb_id: str | None, validation_loss: float | None = None
) -> Snapshot:
    """Everything of ``progress`` that goes into a checkpoint (collective). Random numbers need no state: order,
    initial weights and samples are functions of the seed, and FP8 scales of the tensors at hand."""
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
        "model": as_json(job.config.model),
        "tokenizer": job.train_source.tokenizer_hash,
        "validation_loss": validation_loss,
        "wandb_id": only_rank_0_knows[1],
    }
    return snapshot(job, facts)


def load_checkpoint(job: Job, path: Place) -> tuple[Progress, str | None]:
    """Puts a checkpoint into the job (collective): bitwise the state that was saved, whatever layout saved it. Returns
    progress and wandb id. Raises CheckpointError, DataError."""
    has_averages = on_first(lambda: _has_averages(path))
    whole = snapshot(job, {})
    wanted = [piece for piece in whole.pieces if has_averages or not piece.name.startswith("ema/")]
    # Averages may be begun with, or given up, in the middle of a run.
    facts = load(path, Snapshot(wanted, whole.replicated), some=has_averages and job.ema is None)
    if job.ema is not None and not has_averages:
        job.ema.restart()
    job.optimizer.restore(facts["optimizer_steps"])
    job.weights_changed()
    progress = Progress(
        step=facts["step"],
        tokens=facts["tokens"],
        cursor=_cursor(job, facts["cursor"]),
        wall_seconds=facts["wall_seconds"],
        guard=GuardState.from_dict(facts["guard"]),
    )
    return progress, facts["wandb_id"]


def other_data(job: Job, path: Place) -> str | None:
    """What differs between the data of a checkpoint and the job's, where the job may go on with other ones; None where
    nothing does (collective)."""
    saved = on_first(lambda: read_manifest(path).facts["cursor"])
    try:
        Cursor.from_dict(saved, job.train_source.identity)
    except DataError as error:
        return error.what
    return None


def _has_averages(path: Place) -> bool:
    manifest = read_manifest(path)
    if "optimizer_steps" not in manifest.facts:
        raise CheckpointError(
            f"{path} holds weights alone, of no run that could go on (deepseek-convert makes such): "
            f"begin one with them, init_from={path} and another name=... or run_dir=..."
        )
    return any(name.startswith("ema/") for name in read_index(path, manifest))


def load_weights(job: Job, path: Place) -> None:
    """Begins with the weights and balance biases of a checkpoint, of another run or made by ``deepseek-convert``
    (collective). Raises CheckpointError."""
    whole = snapshot(job, {})
    load(
        path, Snapshot([p for p in whole.pieces if p.name.startswith("master/")], whole.replicated), some=True
    )
    job.optimizer.restore(0)
    job.weights_changed()
    if job.ema is not None:
        job.ema.restart()


def _cursor(job: Job, saved: dict[str, Any]) -> Cursor:
    """Where the data goes on; at its beginning, where it is other data and may be."""
    try:
        return Cursor.from_dict(saved, job.train_source.identity)
    except DataError:
        if not job.config.data.allow_change:
            raise
        return Cursor()
