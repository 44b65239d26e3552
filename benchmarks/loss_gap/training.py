"""One run in one process: the framework's own stage, executor and optimizer, without process groups."""

import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.loss_gap.cases import Case, Size, optim_of
from deepseek_kernels.choice import choose
from deepseek_train.config.curve import value_at
from deepseek_train.data.loader import TokenSource
from deepseek_train.fp8.room import Fp8
from deepseek_train.model.context import ModelContext
from deepseek_train.model.init import init_stage
from deepseek_train.model.stage import Stage
from deepseek_train.optim.balance import update_bias
from deepseek_train.optim.groups import WeightGroup
from deepseek_train.optim.replicated import Replicated
from deepseek_train.parallel.p2p import Links
from deepseek_train.phases.recompute import Recomputation
from deepseek_train.phases.values import MicroBatch
from deepseek_train.phases.wgrad import WeightGradQueue
from deepseek_train.pipeline.executor import Executor, PreparedSchedule
from deepseek_train.pipeline.values import Boundary, LossScales, Ran
from deepseek_train.schedule.catalog import make_schedule
from deepseek_train.schedule.forward_only import forward_only
from deepseek_train.spec.stages import split_layers
from deepseek_train.spec.weights import all_weights
from deepseek_train.train.build import DTYPES

# Attention is not FP8 in either run: the one that BF16 training calls, for both.
KERNELS = choose("cpu", {"attention": "torch"})
_DATA_SEED = 0


@dataclass(frozen=True)
class Looks:
    """How often and on how much the loss on held-out text is measured; most at the end."""

    times: int = 12
    batches: int = 8
    batches_at_end: int = 128


@dataclass(frozen=True)
class Curve:
    """What a run came to. Losses in nats a token."""

    name: str
    tokens_per_step: int
    losses: tuple[float, ...]  # of each step's batch
    held_out: tuple[tuple[int, float], ...]  # (steps, loss on the same held-out text)
    skipped: int  # steps whose gradient was not finite
    seconds: float  # wall clock
    cpu_seconds: float

    @property
    def tokens(self) -> int:
        return len(self.losses) * self.tokens_per_step


class Trainee:
    """The model of a case and all that trains it."""

    def __init__(self, case: Case, size: Size, data: str) -> None:
        m, precision = size.model, case.precision
        self._case, self._size = case, size
        self._optim = optim_of(case.steps * size.tokens)
        queue, recompute, dtype = WeightGradQueue(), Recomputation(), DTYPES[precision.params]
        self._fp8 = Fp8.of(precision.fp8, KERNELS, queue, recompute) if precision.fp8 is not None else None
        context = ModelContext(m, queue, dtype=dtype, recompute=recompute, kernels=KERNELS, fp8=self._fp8)
        self._stage = Stage(context, split_layers(m, 1)[0], size.length)
        init_stage(self._stage, m, case.seed)
        decayed = {w.name for w in all_weights(m) if w.decayed}
        weights = self._stage.weights()
        groups = [
            WeightGroup({n: w for n, w in weights.items() if (n in decayed) == flag}, None, decay)
            for flag, decay in ((True, self._optim.weight_decay), (False, 0.0))
        ]
        self._optimizer = Replicated(groups, None, self._optim, DTYPES[precision.moments])
        boundary = Boundary((size.sequences, size.length, m.hidden_size), dtype, torch.device("cpu"))
        self._executor = Executor({0: self._stage}, Links({}, ranks=(0,), me=0), queue, boundary)
        self._train, self._held_out = (
            TokenSource(data, split, size.length, 0, _DATA_SEED, m.vocab_size)
            for split in ("train", "validation")
        )
        schedule = make_schedule("1f1b", 1, 1)
        self._training = PreparedSchedule(schedule, 0)
        self._evaluation = PreparedSchedule(forward_only(schedule.placement), 0)

    def step(self, number: int) -> tuple[float, bool]:
        """Step ``number`` from 0: its loss, and whether it was skipped."""
        before = number * self._size.tokens
        ran = self._accumulate(number)
        self._optimizer.reduce()
        outcome = self._optimizer.step(value_at(self._optim.lr, before + self._size.tokens))
        self._weights_changed()
        if not outcome.skipped:
            speed = value_at(self._optim.balance_speed, before)
            for layer, router in self._stage.routers():
                update_bias(router.bias, ran.loads[layer], speed, self._optim.balance_rule)
        return float(ran.main[0]), outcome.skipped

    def gradients(self, number: int) -> Tensor:
        """Of all weights on step ``number``'s batch, flat, without a step."""
        self._accumulate(number)
        grads = [weight.main_grad.flatten().clone() for weight in self._stage.weights().values()]
        for weight in self._stage.weights().values():
            weight.main_grad.zero_()
        return torch.cat(grads)

    def take_weights(self, other: "Trainee") -> None:
        """Weights and balance biases. For ``gradients``: the optimizer keeps its own."""
        self._stage.load_state_dict(other._stage.state_dict())
        self._weights_changed()

    def validate(self, batches: int) -> float:
        """Mean loss over the first ``batches`` batches that are held out."""
        return sum(self._held_out_loss(number) for number in range(batches)) / batches

    def _held_out_loss(self, number: int) -> float:
        ran = self._executor.run(self._evaluation, lambda _: self._batch(self._held_out, number), None)
        return float(ran.main[0])

    def _weights_changed(self) -> None:
        if self._fp8 is not None:
            self._fp8.copies.forget()

    def _accumulate(self, number: int) -> Ran:
        scales = LossScales(main=1.0, mtp=0.0, balance=self._optim.sequence_balance_weight)
        return self._executor.run(self._training, lambda _: self._batch(self._train, number), scales)

    def _batch(self, source: TokenSource, number: int) -> MicroBatch:
        size = self._size.sequences
        return MicroBatch(torch.from_numpy(source.sequences(range(number * size, (number + 1) * size))))


def train(case: Case, size: Size, data: str, looks: Looks) -> Curve:
    """Runs ``case`` from its first step to its last."""
    torch.set_num_threads(1)
    started, cpu_started = time.perf_counter(), time.process_time()
    trainee = Trainee(case, size, data)
    every = max(1, case.steps // looks.times)
    losses, seen, skipped = [], [], 0
    for done in range(1, case.steps + 1):
        loss, bad = trainee.step(done - 1)
        losses.append(loss)
        skipped += bad
        last = done == case.steps
        if not last and (done % every or done + every > case.steps):
            continue
        seen.append((done, trainee.validate(looks.batches_at_end if last else looks.batches)))
        recent, passed = losses[-20:], time.perf_counter() - started
        print(
            f"{case.name}: {done * size.tokens} tokens, {passed:.0f} s, loss {sum(recent) / len(recent):.4f}, "
            f"held out {seen[-1][1]:.4f}",
            flush=True,
        )
    return Curve(
        name=case.name,
        tokens_per_step=size.tokens,
        losses=tuple(losses),
        held_out=tuple(seen),
        skipped=skipped,
        seconds=time.perf_counter() - started,
        cpu_seconds=time.process_time() - cpu_started,
    )


def seconds_per_step(case: Case, size: Size, data: str, steps: int) -> float:
    """Wall clock, mean over all steps but the first."""
    torch.set_num_threads(1)
    trainee, times = Trainee(case, size, data), []
    for number in range(steps):
        started = time.perf_counter()
        trainee.step(number)
        times.append(time.perf_counter() - started)
    return statistics.mean(times[1:])
