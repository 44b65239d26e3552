"""One optimizer step and one evaluation, on every rank.

Legend: L MoE layers, E experts.
"""

import time
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from deepseek_train.config.curve import value_at
from deepseek_train.monitor.memory import peak_memory_bytes
from deepseek_train.monitor.metrics import EvalMetrics, StepMetrics
from deepseek_train.optim.balance import update_bias
from deepseek_train.phases.values import MicroBatch
from deepseek_train.pipeline.trace import Trace
from deepseek_train.pipeline.values import LossScales, Ran
from deepseek_train.schedule.timeline import Timeline
from deepseek_train.spec.links import ExpertTraffic
from deepseek_train.train.averaged import averaged_weights
from deepseek_train.train.batching import is_due, microbatches_for, sequence_numbers
from deepseek_train.train.build import Job
from deepseek_train.train.replicas import check_replicas
from deepseek_train.train.state import Progress
from deepseek_train.train.straggler import warn_of_stragglers


def train_step(job: Job, progress: Progress, *, traced: bool) -> tuple[Progress, StepMetrics]:
    """Forward, backward, reduce, update, balance. The metrics are the same on every rank, but for times."""
    started = time.perf_counter()
    config, layout = job.config, job.layout
    num_microbatches = microbatches_for(config, layout, progress.tokens)
    num_total = num_microbatches * layout.dp
    sequences = num_total * config.train.microbatch_size
    tokens = sequences * config.data.sequence_length
    lr = value_at(
        config.optim.lr, progress.tokens + tokens
    )  # a warm-up from 0 moves weights from its first step on
    mtp_weight = value_at(config.optim.mtp_weight, progress.tokens)
    scales = LossScales(
        main=1.0 / num_total,
        mtp=mtp_weight / num_total,
        balance=config.optim.sequence_balance_weight / num_total,
    )

    def batch_of(microbatch: int) -> MicroBatch:
        start, size = progress.cursor.consumed_sequences, config.train.microbatch_size
        places = sequence_numbers(start, microbatch, layout, job.mesh.dp_rank, size)
        numbers = [progress.cursor.number(place) for place in places]
        return on_device(job.train_source.sequences(numbers), job.place.device)

    where, number = job.where, progress.step + 1
    where.phase("choice of a schedule", number, long=True)
    schedule = job.training_schedule(num_microbatches)  # may be a search: before the clocks start
    where.phase("forward and backward")
    compared = is_due(config.cluster.watchdog.straggler_every, number)
    if traced:
        dist.barrier()  # ranks of a pipeline start their clocks together
    trace = Trace(job.mesh.pp_rank, job.place.device) if traced or compared else None
    job.mesh.expert_group.traffic.take()  # a sample's
    ran = job.executor.run(schedule, batch_of, scales, trace)
    where.phase("optimizer")
    where.waits(f"reduce-scatter of gradients among the replicas {job.replicas}")
    job.optimizer.reduce()
    where.waits("all-reduce of losses and loads among all ranks")
    totals = _total(job, ran)
    loss, mtp_loss, balance_loss = (s / num_total for s in (totals.main, totals.mtp, totals.balance))
    check_seconds = None
    if is_due(config.train.check_replicas_every, number):
        # Before the update: it writes all replicas anew from the masters, and with them what went wrong since the last.
        where.waits(f"comparison of weights among the replicas {job.replicas}")
        check_seconds = check_replicas(job, number)
    if job.ema is not None:
        job.ema.release_masters()
    guard, watch = progress.guard, config.train.guard
    where.waits(f"all-reduce of the gradient's norm, all-gather of weights among {job.replicas}")
    outcome = job.optimizer.step(
        lr, lambda norm: guard.objection(watch, (loss, mtp_loss, balance_loss), norm)
    )
    where.goes_on()
    if outcome.skipped:
        guard = guard.after_skipped(progress.step, progress.cursor.consumed_sequences)
    else:
        guard = guard.after_accepted(watch, loss, outcome.grad_norm)
        job.weights_changed()
        if job.ema is not None:
            job.ema.update(job.optimizer.steps_taken())
        gamma = value_at(config.optim.balance_speed, progress.tokens)
        for layer, bias in job.router_biases():
            update_bias(bias, totals.load_LE[_row(job, layer)], gamma, config.optim.balance_rule)

    if compared and trace is not None:
        warn_of_stragglers(job, trace, number)
    timeline = _gather_timeline(job, trace) if traced and trace is not None else None
    seconds = time.perf_counter() - started
    after = progress.after(sequences, tokens, seconds, guard)
    speed = tokens / seconds
    tflops = job.throughput.tflops(speed, layout.world)
    metrics = StepMetrics(
        step=after.step,
        tokens=after.tokens,
        loss=loss,
        mtp_loss=mtp_loss if config.model.mtp_depth else None,
        balance_loss=balance_loss / max(1, len(totals.load_LE)),
        grad_norm=outcome.grad_norm,
        lr=lr,
        batch_size=sequences,
        step_seconds=seconds,
        tokens_per_second=speed,
        expert_load={_layer(job, row): tuple(load_E) for row, load_E in enumerate(totals.load_LE.tolist())},
        memory_bytes=totals.memory_bytes,
        skipped=outcome.skipped,
        skipped_why=outcome.refused,
        skipped_steps=guard.skipped,
        replica_check_seconds=check_seconds,
        expert_traffic=totals.traffic if layout.ep > 1 and job.counts_traffic else None,
        timeline=timeline,
        tflops=tflops,
        mfu=job.throughput.mfu(tflops),
    )
    return after, metrics


def evaluate(job: Job, progress: Progress) -> EvalMetrics:
    """Mean loss over the first sequences of the validation split, the same ones every time
    in one layout; where there is an average of the weights, its loss on them, too."""
    metrics = _evaluate(job, progress)
    if job.ema is None:
        return metrics
    with averaged_weights(job, job.ema):
        return replace(metrics, ema_loss=_evaluate(job, progress).loss)


def _evaluate(job: Job, progress: Progress) -> EvalMetrics:
    config, layout = job.config, job.layout

    def batch_of(microbatch: int) -> MicroBatch:
        numbers = sequence_numbers(0, microbatch, layout, job.mesh.dp_rank, config.train.microbatch_size)
        return on_device(job.validation_source.sequences(numbers), job.place.device)

    job.where.phase("evaluation")
    totals = _total(job, job.executor.run(job.evaluation, batch_of, None))
    count = job.placement.num_microbatches * layout.dp
    return EvalMetrics(
        step=progress.step,
        tokens=progress.tokens,
        loss=totals.main / count,
        mtp_loss=totals.mtp / count if config.model.mtp_depth else None,
        num_tokens=count * config.train.microbatch_size * config.data.sequence_length,
    )


def on_device(sequences: NDArray[np.int64], device: torch.device) -> MicroBatch:
    """A micro-batch where it is computed. From pinned memory the copy waits its turn on the GPU, and nothing for it."""
    tokens = torch.from_numpy(sequences)
    return MicroBatch(tokens.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tokens)


@dataclass(frozen=True)
class _Totals:
    """Sums over all micro-batches of all ranks."""

    main: float
    mtp: float
    balance: float
    load_LE: Tensor  # int64, on this rank's device
    memory_bytes: int  # of the fullest rank
    traffic: ExpertTraffic


def _total(job: Job, ran: Ran) -> _Totals:
    """Two small all-reduces; every rank learns the same numbers, bit for bit."""
    m, device = job.config.model, job.place.device
    num_rows = m.num_layers - m.num_dense_layers + m.mtp_depth
    load_LE = torch.zeros(num_rows, m.num_routed_experts, dtype=torch.int64, device=device)
    for layer, tokens_E in ran.loads.items():
        load_LE[_row(job, layer)] = tokens_E
    dist.all_reduce(load_LE)

    world, rank = dist.get_world_size(), dist.get_rank()
    sent = job.mesh.expert_group.traffic.take().numbers()
    numbers = torch.zeros(3 + len(sent) + world, dtype=torch.float64)
    for i, losses in enumerate((list(ran.main.values()), list(ran.mtp.values()), ran.balance)):
        numbers[i] = torch.stack(losses).sum(dtype=torch.float64) if losses else 0.0
    numbers[3 : 3 + len(sent)] = torch.tensor(sent, dtype=torch.float64)
    numbers[3 + len(sent) + rank] = peak_memory_bytes()
    numbers = numbers.to(device)
    dist.all_reduce(numbers)
    main, mtp, balance, *rest = numbers.tolist()
    traffic = ExpertTraffic.of([round(n) for n in rest[: len(sent)]])
    return _Totals(main, mtp, balance, load_LE, round(max(rest[len(sent) :])), traffic)


def _row(job: Job, layer: int) -> int:
    """Place of a MoE layer among the MoE layers, MTP modules last."""
    return layer - job.config.model.num_dense_layers


def _layer(job: Job, row: int) -> int:
    return row + job.config.model.num_dense_layers


def _gather_timeline(job: Job, trace: Trace) -> Timeline:
    """What this rank's pipeline did, on every one of its ranks."""
    everyone: list[Timeline | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, Timeline(1, tuple(trace.spans), tuple(trace.phases)))
    mine = [everyone[rank] for rank in job.layout.pipeline_group(job.place.rank)]
    return Timeline(
        job.layout.pp,
        tuple(span for one in mine if one is not None for span in one.spans),
        tuple(phase for one in mine if one is not None for phase in one.phases),
    )
