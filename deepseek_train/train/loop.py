"""A run from start to end: resume, train, evaluate, save, report."""

import signal
import threading
import time
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from deepseek_train.checkpoint import CheckpointError
from deepseek_train.checkpoint.store import newest
from deepseek_train.data.tokenizer import load_tokenizer
from deepseek_train.monitor.report import Sample
from deepseek_train.schedule.timeline import Timeline
from deepseek_train.train.build import Job
from deepseek_train.train.folder import CHECKPOINTS, note_outcome
from deepseek_train.train.observer import Observer, open_observer, steps_to
from deepseek_train.train.sample import continuation
from deepseek_train.train.state import Progress, load_checkpoint, save_checkpoint
from deepseek_train.train.step import evaluate, train_step

TRACED_STEP = 5  # of a session: the first ones warm up


class StopRequest:
    """SIGINT, SIGTERM and SIGUSR1 ask for a stop after the running step; ranks agree on it together."""

    def __init__(self, seconds: float | None) -> None:
        self._asked = threading.Event()
        self._deadline = None if seconds is None else time.monotonic() + seconds
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._ask)

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        self._asked.set()

    def agreed(self, device: torch.device) -> bool:
        """Whether any rank was asked to stop, or the session's time is over (collective)."""
        late = self._deadline is not None and time.monotonic() >= self._deadline
        flag = torch.tensor([int(late or self._asked.is_set())], device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)


def train(job: Job, folder: Path) -> None:
    """Trains until ``train.total_tokens`` are consumed or a stop is asked for; then saves and reports."""
    config, root = job.config, folder / CHECKPOINTS
    stop = StopRequest(config.train.stop_after_seconds)
    progress, wandb_id = Progress(), None
    checkpoint = _newest(root)
    if checkpoint is None and (config.resume == "must" or any(root.glob("step-*"))):
        raise CheckpointError(
            f"no checkpoint in {root} is whole (a checkpoint without a valid manifest.json does not count). Mend or "
            f"remove that folder, or start afresh with resume=never."
        )
    job.where.phase("loading", long=True)
    if checkpoint is not None:
        progress, wandb_id = load_checkpoint(job, checkpoint)
    observer = open_observer(config, job.layout, job.place.rank, folder, progress, wandb_id)
    if checkpoint is not None:
        observer.say(f"resumed from {checkpoint} after step {progress.step}")
    if progress.tokens >= config.train.total_tokens:
        observer.monitor.close()
        observer.say(
            f"this run is complete: {progress.tokens} tokens of {config.train.total_tokens} asked for. Raise "
            f"train.total_tokens to go on (curves that are shares of it stretch), or start afresh with resume=never "
            f"(which moves {folder} aside)."
        )
        return

    timeline: tuple[int, Timeline] | None = None
    traced_step = min(TRACED_STEP, steps_to(config, job.layout, progress.tokens))
    finished = stopping = False
    with observer.monitor as monitor:
        for session_step in range(1, 1 << 62):
            progress, metrics = train_step(job, progress, traced=session_step == traced_step)
            monitor.step(metrics)
            if metrics.timeline is not None:
                timeline = metrics.step, metrics.timeline
            finished = progress.tokens >= config.train.total_tokens
            stopping = not finished and stop.agreed(job.place.device)
            if finished or _due(config.train.eval_every, progress):
                monitor.evaluation(evaluate(job, progress))
            if finished or stopping or _due(config.checkpoint.every, progress):
                job.where.phase("saving", long=True)
                saved = save_checkpoint(job, root, progress, observer.wandb_id)
            if finished or stopping:
                break
    job.where.phase("sample and report", long=True)
    if job.place.rank == 0:
        note_outcome(folder, complete=finished, step=progress.step)
    observer.say(f"checkpoint: {saved}")
    sample = _sample(job, observer) if finished else None
    observer.report(progress, timeline, sample)
    if stopping:
        again = "the same command" + (", without resume=never," if config.resume == "never" else "")
        observer.say(f"stopped after step {progress.step}; {again} goes on from there")


def _newest(root: Path) -> Path | None:
    """The checkpoint to go on from, by rank 0's eyes (with resume=never it has moved older ones aside)."""
    found = [newest(root) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def _due(every: int, progress: Progress) -> bool:
    return every > 0 and progress.step % every == 0


def _sample(job: Job, observer: Observer) -> Sample | None:
    """A continuation of the configured prompt (collective)."""
    config = job.config
    if not config.train.sample_prompt:
        return None
    tokenizer = load_tokenizer(str(Path(config.data.path) / "tokenizer.json"))
    prompt = tokenizer.encode(config.train.sample_prompt)
    ids = continuation(job, prompt, config.train.sample_tokens, temperature=0.6, stop=tokenizer.special.eos)
    sample = Sample(config.train.sample_prompt, tokenizer.decode(ids))
    observer.say(f"sample: {sample.prompt}⟶{sample.continuation}")
    return sample
