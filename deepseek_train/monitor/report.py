"""``report.md``: what became of a run, readable by somebody who was not there.

It can be written in the middle of a run: a section whose facts are missing is left out.
"""

import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from deepseek_train.monitor.jsonl import History
from deepseek_train.monitor.machine import MachineFacts
from deepseek_train.monitor.markdown import fence, picture, table
from deepseek_train.monitor.numbers import count, data_size, duration, percent
from deepseek_train.monitor.pictures.lanes import draw_lanes
from deepseek_train.monitor.pictures.loss import draw_loss
from deepseek_train.monitor.pictures.timeline import draw_timeline
from deepseek_train.monitor.report_load import load_section
from deepseek_train.monitor.report_traffic import traffic_section
from deepseek_train.schedule.measured import durations_to_json, measured_durations
from deepseek_train.schedule.perfetto import write_trace
from deepseek_train.schedule.timeline import Timeline

_VALIDATION_ROWS = 20


@dataclass(frozen=True)
class Sample:
    """What the model makes of a prompt."""

    prompt: str
    continuation: str


@dataclass(frozen=True)
class ReportFacts:
    """Everything a report is made of."""

    name: str
    history: History  # ``read_history(run_dir / "metrics.jsonl")``
    total_tokens: int  # asked for
    total_parameters: int
    active_parameters: int  # per token
    layout: str  # one line, e.g. "2 ranks: PP 2 x DP 1, EP 1, schedule dualpipe"
    config_yaml: str  # resolved
    machine: MachineFacts
    wall_seconds: float  # from start to report, all sessions of the run together
    timeline: Timeline | None = None  # of one traced step
    timeline_step: int | None = None
    sample: Sample | None = None


def write_report(run_dir: Path, facts: ReportFacts) -> Path:
    """Writes ``report.md`` and its pictures and trace (``report/*``) into ``run_dir``; returns the former's path."""
    run_dir.mkdir(parents=True, exist_ok=True)
    sections = [
        [f"# {facts.name}"],
        _headline(facts),
        _loss(run_dir, facts.history),
        load_section(run_dir, facts.history.steps),
        traffic_section(facts.history.steps),
        _pipeline(run_dir, facts),
        _sample(facts.sample) if facts.sample else [],
        ["## Settings", fence(facts.config_yaml.rstrip(), "yaml")],
        ["## Machine", _machine_table(facts.machine)],
    ]
    text = "\n\n".join(paragraph for section in sections for paragraph in section) + "\n"
    path = run_dir / "report.md"
    path.write_text(text, encoding="utf-8", errors="replace")
    return path


def _headline(facts: ReportFacts) -> list[str]:
    steps, evaluations = facts.history.steps, facts.history.evaluations
    rows = [
        (
            "parameters",
            f"{count(facts.total_parameters)}, {count(facts.active_parameters)} active per token",
        ),
        ("layout", facts.layout),
        ("wall time", duration(facts.wall_seconds)),
    ]
    if steps:
        tokens = steps[-1].tokens
        share = percent(tokens / facts.total_tokens) if tokens < facts.total_tokens else "all"
        speed = f"{count(statistics.median(step.tokens_per_second for step in steps))} tokens/s (median step)"
        tflops = [step.tflops for step in steps if step.tflops is not None]
        if tflops:
            speed += f", {statistics.median(tflops):.3g} TFLOP/s a rank (causal count)"
        mfus = [step.mfu for step in steps if step.mfu is not None]
        if mfus:
            speed += f", MFU {percent(statistics.median(mfus))}"
        memory = max(step.memory_bytes for step in steps)
        losses = [step.loss for step in steps[-20:] if math.isfinite(step.loss)]
        rows += [
            (
                "trained on",
                f"{count(tokens)} tokens in {steps[-1].step} steps ({share} of what was asked for)",
            ),
            ("speed", speed),
            ("peak memory", f"{data_size(memory)} on the fullest rank"),
        ]
        if losses:
            rows.append(
                ("training loss", f"{statistics.fmean(losses):.4f} (mean of the last {len(losses)} steps)")
            )
        skipped = sum(step.skipped for step in steps)
        if skipped:
            reasons = sorted(
                {step.skipped_why or "a gradient was not finite" for step in steps if step.skipped}
            )
            rows.append(("skipped steps", f"**{skipped}** ({'; '.join(reasons[:3])})"))
        checks = [s.replica_check_seconds for s in steps if s.replica_check_seconds is not None]
        if checks:
            cost = percent(sum(checks) / sum(step.step_seconds for step in steps))
            rows.append(("replicas compared", f"{len(checks)} times all the same, {cost} of the steps' time"))
    if evaluations:
        last = evaluations[-1]
        averaged = "" if last.ema_loss is None else f"; averaged weights {last.ema_loss:.4f}"
        rows.append(("validation loss", f"**{last.loss:.4f}** after step {last.step}{averaged}"))
    return [table(("", ""), rows)]


def _loss(run_dir: Path, history: History) -> list[str]:
    if not history.steps and not history.evaluations:
        return []
    section = [
        "## Loss",
        picture(run_dir, draw_loss(history, run_dir / "report" / "loss.png"), "Loss over tokens"),
    ]
    if history.evaluations:
        stride = -(-len(history.evaluations) // _VALIDATION_ROWS)
        shown = history.evaluations[::-stride][::-1]  # always the last one
        rows = [
            (
                str(e.step),
                count(e.tokens),
                f"{e.loss:.4f}",
                "-" if e.mtp_loss is None else f"{e.mtp_loss:.4f}",
            )
            for e in shown
        ]
        section.append(table(("step", "tokens", "validation loss", "MTP loss"), rows))
    return section


def _pipeline(run_dir: Path, facts: ReportFacts) -> list[str]:
    timeline = facts.timeline
    if timeline is None or not timeline.spans:
        return []
    name = "Pipeline" if facts.timeline_step is None else f"Pipeline of step {facts.timeline_step}"
    path = draw_timeline(timeline, run_dir / "report" / "timeline.png", name)
    words = (
        f"Measured on {timeline.num_ranks} pipeline ranks: {duration(timeline.makespan())} from the first "
        f"forward to the last backward, of which ranks were idle {percent(timeline.bubble_fraction())}."
    )
    section = [f"## {name}", words, picture(run_dir, path, "What each pipeline rank did when")]
    if timeline.phases:
        section += _lanes(run_dir, timeline, name)
    return section


def _lanes(run_dir: Path, timeline: Timeline, name: str) -> list[str]:
    path = draw_lanes(timeline, run_dir / "report" / "lanes.png", f"Lanes of {name[0].lower()}{name[1:]}")
    trace = write_trace(timeline, run_dir / "report" / "trace.json", name)
    num_stages = 1 + max(span.stage for span in timeline.spans)
    measured = run_dir / "report" / "durations.json"
    measured.write_text(durations_to_json(measured_durations(timeline, num_stages)))
    exposed = [timeline.exposed_communication(rank) for rank in range(timeline.num_ranks)]
    words = (
        f"Communication that no computation of its rank hid, in the whole step: {duration(max(exposed))} on the worst "
        f"rank. All phases are in [{trace.name}]({trace.relative_to(run_dir).as_posix()}), for ui.perfetto.dev; what "
        f"each stage took, for `deepseek-schedule name=all measured=...` and `schedule=auto`, in "
        f"[{measured.name}]({measured.relative_to(run_dir).as_posix()})."
    )
    return [words, picture(run_dir, path, "Compute and communication lanes during one pair")]


def _sample(sample: Sample) -> list[str]:
    return ["## Sample", "Prompt:", fence(sample.prompt), "Continuation:", fence(sample.continuation)]


def _machine_table(machine: MachineFacts) -> str:
    gpus = [f"{machine.gpus.count(name)} x {name}" for name in sorted(set(machine.gpus))]
    rows = [
        ("CPU", f"{machine.cpu}, {machine.cores} cores"),
        ("memory", data_size(machine.memory_bytes)),
        ("GPUs", ", ".join(gpus) or "none"),
        ("system", machine.system),
        ("versions", ", ".join(f"{name} {version}" for name, version in machine.versions)),
    ]
    if machine.git_revision:
        rows.append(("git revision", f"`{machine.git_revision}`"))
    return table(("", ""), rows)
