"""``deepseek-schedule``: simulate, compare and draw pipeline schedules. Needs no GPU and no data.

usage: deepseek-schedule name=dualpipe [key=value ...]

  name=dualpipe           gpipe 1f1b interleaved_1f1b zb_h1 zb_v dualpipe dualpipe_v; all: a table of these;
                          auto, which is not in it: search for these times (up to some 10 seconds) a schedule never
                          slower than 1f1b and dualpipe, where they are legal and fit max_activations
  file=my.schedule        instead of name: a schedule as output=schedule prints it; it is checked first
  stages=8                pipeline stages of the model; zb_v, dualpipe_v and interleaved_1f1b put 2 on a rank
  ranks=4                 instead of stages: the same model on as many ranks. The times are then those of 1/ranks of
                          the model; where a rank holds 2 stages, each is half of that and takes half as long.
  microbatches=20         of one step
  stages_per_rank=2       of interleaved_1f1b
  max_activations=9       name=auto: most live activations of a rank, queued weight gradients counted with them;
                          default: stages + 1, what dualpipe needs: with less it does not fit
  times.forward=1         of one micro-batch in one stage, in any unit; or a list: times.forward=[1,2,1,1]
  times.backward_input=1    input gradients; a full backward takes this and the next
  times.backward_weight=1   weight gradients
  times.overlapped=3        a forward and a full backward run as one; default: the sum of the three above
  times.latency=0           of a message to another rank
  measured=FILE           instead of times: what a run measured, its report/durations.json; stages are
                          as many as it lists unless you give them, and no other number will do
  output=text             text: drawing and facts, json: facts, schedule: the steps of every rank;
                          svg, png: a picture, perfetto: a trace for ui.perfetto.dev
  path=FILE               where to write svg, png, perfetto; default: NAME-STAGESxMICROBATCHES in this folder

output=json is one object: name, stages, ranks, microbatches, times, makespan, bubble (of each rank: makespan minus
busy), bubble_fraction, peak_activations (of each rank, in micro-batches of one stage), peak_weight_queue (of each
rank), formula_bubble (the published closed form, or null). name=all prints a list of them; a schedule that these
sizes do not allow is an object with its name and problems.

examples:
  deepseek-schedule name=dualpipe stages=8 microbatches=20
  deepseek-schedule name=all stages=8 microbatches=20
  deepseek-schedule name=all ranks=4 microbatches=16 times.backward_input=1.3 times.backward_weight=0.7
  deepseek-schedule name=dualpipe output=svg path=dualpipe.svg

exit codes: 0 done; 2 something is wrong with the arguments or the schedule, and the message says what.
"""

import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from deepseek_train.cli.answer import answer
from deepseek_train.cli.key_value import UsageError, parse_key_values
from deepseek_train.cli.schedule_case import durations, make, make_case, time_problems, with_measured
from deepseek_train.cli.schedule_problems import request_problems
from deepseek_train.cli.schedule_request import ALL, WRITTEN, ScheduleRequest, schedule_name
from deepseek_train.cli.schedule_words import Row, facts_line, legend, table
from deepseek_train.monitor.pictures.timeline import draw_timeline
from deepseek_train.schedule import catalog
from deepseek_train.schedule.action import Schedule
from deepseek_train.schedule.check import ScheduleError, check
from deepseek_train.schedule.facts import Facts, facts_of
from deepseek_train.schedule.perfetto import write_trace
from deepseek_train.schedule.render import render
from deepseek_train.schedule.simulate import Durations, simulate
from deepseek_train.schedule.text import ScheduleSyntaxError, from_text, to_text
from deepseek_train.schedule.timeline import Timeline


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code. ``arguments`` defaults to the command line."""
    return answer("deepseek-schedule", __doc__, sys.argv[1:] if arguments is None else arguments, _say)


def _say(words: Sequence[str]) -> None:
    request = with_measured(parse_key_values(ScheduleRequest, words, request_problems))
    try:
        if request.file is None and schedule_name(request) == ALL:
            _compare(request)
        else:
            _show(request, *_chosen(request))
    except (ScheduleSyntaxError, ScheduleError, UnicodeDecodeError) as error:
        raise UsageError([f"{request.file}: {error}"]) from error
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UsageError([f"{error.filename}: {error.strerror}"]) from error


def _chosen(request: ScheduleRequest) -> tuple[Schedule, Durations, float | None]:
    """The one schedule that is asked for, its times and the closed form of its bubble."""
    if request.file is not None:
        schedule = from_text(Path(request.file).read_text(encoding="utf-8"))
        check(schedule)
        if problems := time_problems(request.times, schedule.placement.num_stages):
            raise UsageError(problems)
        return schedule, durations(request.times), None
    case = make_case(request, schedule_name(request))
    if isinstance(case, list):
        raise UsageError(case)
    return make(case, request.max_activations)


def _show(request: ScheduleRequest, schedule: Schedule, times: Durations, formula: float | None) -> None:
    if request.output == "schedule":
        print(to_text(schedule), end="")
        return
    timeline = simulate(schedule, times)
    facts = facts_of(schedule, timeline, times, formula)
    match request.output:
        case "json":
            print(json.dumps(asdict(facts)))
        case "text":
            columns = shutil.get_terminal_size(fallback=(0, 0)).columns or None  # a pipe has no width
            print(render(timeline, columns, sys.stdout.isatty() and "NO_COLOR" not in os.environ))
            print(f"\n{legend(timeline)}\n{facts_line(facts)}")
        case _:
            print(facts_line(facts))
            print(f"written to {_write(request, timeline, facts)}")


def _write(request: ScheduleRequest, timeline: Timeline, facts: Facts) -> Path:
    size = f"{facts.stages}x{facts.microbatches}"
    path = Path(request.path or f"{facts.name.replace('/', '_')}-{size}{WRITTEN[request.output]}")
    if request.output == "perfetto":
        return write_trace(timeline, path, f"{facts.name} {size}")
    title = f"{facts.name}, {facts.stages} stages on {facts.ranks} ranks, {facts.microbatches} micro-batches"
    return draw_timeline(timeline, path, title, unit="")


def _compare(request: ScheduleRequest) -> None:
    rows: list[Row] = []
    for name in catalog.NAMES:
        case = make_case(request, name)
        if isinstance(case, list):
            rows.append((name, case))
            continue
        schedule, times, formula = make(case)
        rows.append((name, facts_of(schedule, simulate(schedule, times), times, formula)))
    if request.output == "json":
        found = [r if isinstance(r, list) else asdict(r) for _, r in rows]
        both = zip(rows, found, strict=True)
        print(json.dumps([{"name": n, "problems": f} if isinstance(f, list) else f for (n, _), f in both]))
    else:
        print(table(rows, request.ranks is not None))


if __name__ == "__main__":
    sys.exit(main())
