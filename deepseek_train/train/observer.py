"""What a run shows and leaves behind: rank 0 owns the monitor and writes the report, other ranks are silent."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from deepseek_train.checkpoint.places import Place
from deepseek_train.config.schema import RunConfig, TilesConfig
from deepseek_train.monitor.console import ConsoleSink
from deepseek_train.monitor.events import Event, record_event
from deepseek_train.monitor.jsonl import JsonlSink, read_history
from deepseek_train.monitor.machine import machine_facts
from deepseek_train.monitor.nvml import GpuProbe
from deepseek_train.monitor.report import ReportFacts, Sample, write_report
from deepseek_train.monitor.sinks import Monitor, Sink
from deepseek_train.monitor.wandb_sink import open_wandb
from deepseek_train.schedule.timeline import Timeline
from deepseek_train.spec.layout import ParallelLayout
from deepseek_train.spec.weights import all_weights, count_active_parameters, count_parameters
from deepseek_train.train.batching import microbatches_for
from deepseek_train.train.device import planned_device
from deepseek_train.train.expert_plan import plan_experts
from deepseek_train.train.folder import METRICS_FILE, SAVED_FILE, config_yaml, note_saved
from deepseek_train.train.kernel_plan import plan_kernels
from deepseek_train.train.state import Progress


@dataclass(frozen=True)
class Observer:
    """``monitor`` takes the metrics of every step; without sinks on ranks other than 0."""

    config: RunConfig
    layout: ParallelLayout
    folder: Path
    monitor: Monitor
    speaks: bool
    wandb_id: str | None

    def say(self, text: str) -> None:
        if self.speaks and text:
            print(text, flush=True)

    def event(self, event: Event) -> None:
        """Adds to events.jsonl, and says so where it is no step's own line."""
        if not self.speaks:
            return
        try:
            record_event(self.folder, event)
        except OSError as error:
            self.say(f"WARNING: {error}; only here it is told:")
        if event.what != "skipped":
            print(f"!!! step {event.step}, {event.what}: {event.why}", flush=True)

    def saved(self, step: int, path: Place) -> None:
        """Keeps in mind that there is a checkpoint, and where."""
        if not self.speaks:
            return
        try:
            note_saved(self.folder, step, path)
        except OSError as error:  # all that matters is saved
            self.say(f"WARNING: {self.folder / SAVED_FILE} could not be written: {error}")

    def report(
        self, progress: Progress, timeline: tuple[int, Timeline] | None, sample: Sample | None
    ) -> None:
        """Writes report.md from what metrics.jsonl holds."""
        if not self.speaks:
            return
        config, model = self.config, self.config.model
        path = write_report(
            self.folder,
            ReportFacts(
                name=config.name,
                history=read_history(self.folder / METRICS_FILE),
                total_tokens=config.train.total_tokens,
                total_parameters=count_parameters(all_weights(model)),
                active_parameters=count_active_parameters(model),
                layout=describe(config, self.layout),
                config_yaml=config_yaml(config),
                machine=machine_facts(),
                wall_seconds=progress.wall_seconds,
                timeline=timeline[1] if timeline else None,
                timeline_step=timeline[0] if timeline else None,
                sample=sample,
            ),
        )
        print(f"report: {path}", flush=True)


def open_observer(
    config: RunConfig,
    layout: ParallelLayout,
    rank: int,
    folder: Path,
    progress: Progress,
    wandb_id: str | None,
) -> Observer:
    """On rank 0: console, metrics.jsonl and, if asked for, wandb, going on after ``progress``."""
    if rank != 0:
        return Observer(config, layout, folder, Monitor(()), False, wandb_id)
    print(f"{config.name}: {describe(config, layout)}", flush=True)
    device_type = planned_device(config.cluster.device, layout)
    print(f"kernels: {plan_kernels(config, device_type)}; linears in {linears_of(config)}", flush=True)
    m = config.monitor
    steps = progress.step + steps_to(config, layout, progress.tokens)
    gpu = GpuProbe().sample if config.cluster.device != "cpu" else None
    sinks: list[Sink] = [
        ConsoleSink(steps, config.train.total_tokens, m.log_every, m.progress_bar, gpu=gpu),
        JsonlSink(folder / METRICS_FILE, progress.step),
    ]
    wandb = open_wandb(m.wandb, m.wandb_project, config.name, folder, asdict(config), wandb_id)
    if wandb is not None:
        sinks.append(wandb)
        wandb_id = wandb.run_id
    return Observer(config, layout, folder, Monitor(tuple(sinks)), True, wandb_id)


def linears_of(config: RunConfig) -> str:
    """What they compute in, and where that is not V3's recipe."""
    fp8, params = config.precision.fp8, config.precision.params.upper()
    if fp8 is None:
        return params
    others = [
        f"{field.name} {_recipe(value)}"
        for field in fields(fp8)
        if (value := getattr(fp8, field.name)) != field.default
    ]
    return f"FP8 (V3's recipe{', but ' if others else ''}{', '.join(others)}), all else in {params}"


def _recipe(value: TilesConfig | str) -> str:
    return value if isinstance(value, str) else f"{value.tile} {value.scale}"


def describe(config: RunConfig, layout: ParallelLayout) -> str:
    """One line: the model's size and how the ranks share it."""
    total = count_parameters(all_weights(config.model))
    experts = plan_experts(config, layout)
    way = f" ({experts.dispatcher}: {experts.reason})" if layout.ep > 1 else ""
    wire = config.precision.dispatch
    if layout.ep > 1 and wire != "params":
        way += f", tokens travel in {wire.upper()}"
    shared = f"EP {layout.ep}{' across mirrors' if layout.mirrored else ''}{way}"
    return (
        f"{total / 1e6:,.1f}M parameters on {layout.world} ranks: PP {layout.pp} ({config.schedule.name}) x "
        f"DP {layout.dp}, {shared}, ZeRO-1, on {'GPUs' if torch.cuda.is_available() else 'CPUs'}"
    )


def steps_to(config: RunConfig, layout: ParallelLayout, tokens: int) -> int:
    """Steps from ``tokens`` consumed to the end of the run."""
    sequence = config.train.microbatch_size * layout.dp * config.data.sequence_length
    steps = 0
    while tokens < config.train.total_tokens:
        # The batch size changes slowly: leap over stretches of equal steps instead of walking 10^5 of them.
        step_tokens = microbatches_for(config, layout, tokens) * sequence
        ends = [
            s.until for s in config.optim.batch_size.segments if s.until > tokens and s.shape != "constant"
        ]
        leap = 1 if ends else -(-(config.train.total_tokens - tokens) // step_tokens)
        tokens += leap * step_tokens
        steps += leap
    return steps
