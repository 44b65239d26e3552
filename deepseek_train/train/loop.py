"""A run from start to end: resume, train, evaluate, save, report."""

import signal
import threading
import time
from functools import partial
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from deepseek_train.checkpoint.retention import Retention
from deepseek_train.checkpoint.saver import Saver
from deepseek_train.data.tokenizer import load_tokenizer
from deepseek_train.monitor.events import Event
from deepseek_train.monitor.metrics import StepMetrics
from deepseek_train.monitor.report import Sample
from deepseek_train.schedule.timeline import Timeline
from deepseek_train.train.batching import is_due
from deepseek_train.train.begin import begin
from deepseek_train.train.build import Job
from deepseek_train.train.folder import checkpoints_of, keep_config, note_outcome, run_folder_told
from deepseek_train.train.observer import Observer, open_observer, steps_to
from deepseek_train.train.replicas import ReplicaError
from deepseek_train.train.rollback import roll_back
from deepseek_train.train.sample import continuation
from deepseek_train.train.saving import Saving
from deepseek_train.train.schedule_store import told_by_rank_0
from deepseek_train.train.state import Progress, checkpoint_of
from deepseek_train.train.step import evaluate, train_step

TRACED_STEP = 5  # of a session: the first ones warm up


class StopRequest:
    """SIGINT, SIGTERM and SIGUSR1 ask for a stop after the running step."""

    def __init__(self, seconds: float | None) -> None:
        self._asked = threading.Event()
        self._deadline = None if seconds is None else time.monotonic() + seconds
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._ask)

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        self._asked.set()

    @property
    def asked(self) -> bool:
        """Whether this rank was asked to stop, or the session's time is over."""
        return self._asked.is_set() or (self._deadline is not None and time.monotonic() >= self._deadline)


def train(job: Job, folder: Path) -> None:
    """Trains until ``train.total_tokens`` are consumed or a stop is asked for; then saves and reports."""
    config, root = job.config, checkpoints_of(job.config, folder)
    stop = StopRequest(config.train.stop_after_seconds)
    job.where.phase("loading", long=True)
    begun = begin(job, root)
    progress = begun.progress
    with run_folder_told(folder):
        other_length = told_by_rank_0(lambda: keep_config(config, folder))
        observer = open_observer(config, job.layout, job.place.rank, folder, progress, begun.wandb_id)
    observer.say(begun.how)
    observer.say(other_length if progress.step else "")
    if begun.other_data is not None:
        observer.event(Event(progress.step, "other data", begun.other_data))
    if progress.tokens >= config.train.total_tokens:
        observer.monitor.close()
        if job.place.rank == 0:
            note_outcome(folder, complete=True, step=progress.step)
        observer.say(
            f"this run is complete: {progress.tokens} tokens of {config.train.total_tokens} asked for. Raise "
            f"train.total_tokens to go on (curves that are shares of it stretch), or start afresh with resume=never "
            f"(which moves {folder} aside)."
        )
        return

    kept = config.checkpoint
    retention = Retention(kept.keep, kept.keep_every, kept.keep_best)
    patience = 0.8 * config.cluster.timeout_seconds  # the others wait in a collective
    saving = Saving(Saver(root, retention, job.where, patience), kept, observer.say, observer.saved)
    timeline: tuple[int, Timeline] | None = None
    traced_step = min(TRACED_STEP, steps_to(config, job.layout, progress.tokens))
    finished = stopping = False
    with observer.monitor as monitor:
        for session_step in range(1, 1 << 62):
            try:
                progress, metrics = train_step(job, progress, traced=session_step == traced_step)
            except ReplicaError as error:
                observer.event(Event(progress.step + 1, "replicas differ", str(error)))
                raise
            monitor.step(metrics)
            if metrics.skipped:
                observer.event(_skipped(progress, metrics))
                if 0 < config.train.guard.max_skips <= progress.guard.in_a_row:
                    job.where.phase("going back to a checkpoint", long=True)
                    saving.settle()
                    progress = roll_back(job, root, progress, observer)
                    continue
            if metrics.timeline is not None:
                timeline = metrics.step, metrics.timeline
            job.where.phase("agreement to go on")
            asked, writing = any_rank(job.place.device, stop.asked, saving.writing)
            if saving.running and not writing:
                job.where.phase("saving", long=True)
                saving.finish()
            finished = progress.tokens >= config.train.total_tokens
            # While steps are being skipped a checkpoint would only push out the one to go back to: a few steps' wait.
            in_row = 0 < progress.guard.in_a_row < config.train.guard.max_skips
            stopping = not finished and asked and not in_row
            held_out = None
            if finished or is_due(config.train.eval_every, progress.step):
                held_out = evaluate(job, progress)
                monitor.evaluation(held_out)
            content = partial(
                checkpoint_of, job, progress, observer.wandb_id, held_out.loss if held_out else None
            )
            job.where.phase("saving", long=True)
            if finished or stopping:
                saving.insist(progress.step, content)
                break
            if saving.due(progress.step):
                if in_row:
                    saving.put_off(progress.step)
                else:
                    saving.begin(progress.step, content)
    saving.close()
    job.where.phase("sample and report", long=True)
    sample = _sample(job, observer) if finished else None
    if job.place.rank == 0:
        try:
            note_outcome(folder, complete=finished, step=progress.step)
            observer.report(progress, timeline, sample)
        except OSError as error:  # all that matters is saved
            observer.say(f"WARNING: how the run ended could not be written in {folder}: {error}")
    if stopping:
        again = "the same command" + (", without resume=never," if config.resume == "never" else "")
        observer.say(f"stopped after step {progress.step}; {again} goes on from there")


def _skipped(progress: Progress, metrics: StepMetrics) -> Event:
    cursor, behind = progress.cursor, progress.cursor.consumed_sequences
    window = cursor.number(behind - metrics.batch_size), cursor.number(behind - 1) + 1
    return Event(metrics.step, "skipped", metrics.skipped_why or "", window)


def any_rank(device: torch.device, *flags: bool) -> list[bool]:
    """Each flag, where any rank has set it (collective)."""
    told = torch.tensor([int(flag) for flag in flags], device=device)
    dist.all_reduce(told, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in told.tolist()]


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
