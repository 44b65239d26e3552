import io
import math
import os
import pty
import select
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from deepseek_train.monitor.console import ConsoleSink
from deepseek_train.monitor.metrics import EvalMetrics
from deepseek_train.monitor.nvml import GpuSample
from deepseek_train.monitor.progress import Pace, open_display
from tests.cpu.monitor_samples import STEP


def run(sink: ConsoleSink, steps: int, skip: int = 0) -> None:
    for step in range(1, steps + 1):
        skipped = step == skip
        loss = math.nan if skipped else 9.0 - step / 100
        sink.step(replace(STEP, step=step, tokens=step * 16_384, loss=loss, skipped=skipped))


def plain(steps: int = 30, skip: int = 0, log_every: int = 10) -> list[str]:
    stream = io.StringIO()
    run(ConsoleSink(30, 30 * 16_384, log_every, stream=stream), steps, skip)
    return stream.getvalue().splitlines()


def test_first_every_tenth_and_last_step_in_aligned_columns() -> None:
    lines = plain()
    assert [line.split()[0] for line in lines] == ["step", "1/30", "10/30", "20/30", "30/30"]
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split()[7] == "maxvio"  # of the worst layer / of the mean layer
    assert lines[2].split() == [
        "10/30", "164k", "8.9000", "3.4210", "0.842", "2.20e-04", "12.3k", "0.50/0.25", "1.20", "GiB", "0", "26.5s",
    ]  # fmt: skip
    assert lines[-1].endswith("0ms")  # nothing left


def test_header_comes_again() -> None:
    assert sum(line.lstrip().startswith("step") for line in plain(log_every=1)) == 2


def test_a_skipped_step_is_shouted_between_logged_ones() -> None:
    lines = plain(skip=13)
    assert "STEP 13 SKIPPED" in next(line for line in lines if "!!!" in line)
    assert any(line.split()[:3] == ["13/30", "213k", "nan"] for line in lines)
    stream = io.StringIO()
    sink = ConsoleSink(30, 30 * 16_384, stream=stream)
    sink.step(replace(STEP, skipped=True, skipped_why="loss 9 is a spike", skipped_steps=2))
    header, row, warning = (line.split() for line in stream.getvalue().splitlines())
    assert row[header.index("skipped") + 1] == "2"  # "1.20 GiB" are two words
    assert " ".join(warning) == "!!! STEP 120 SKIPPED: loss 9 is a spike; no weight moved !!!"
    assert not any("!!!" in line for line in plain())


def test_validation_line() -> None:
    stream = io.StringIO()
    sink = ConsoleSink(30, 30 * 16_384, stream=stream)
    sink.evaluation(EvalMetrics(20, 327_680, math.log(20), 3.5, 65_536))
    expected = "validation after step 20: loss 2.9957 (perplexity 20), MTP loss 3.5000, over 65.5k tokens\n"
    assert stream.getvalue() == expected
    sink.evaluation(EvalMetrics(20, 327_680, 3.0, None, 65_536, ema_loss=2.9))
    assert "loss 3.0000 (perplexity 20.09), averaged weights 2.9000, over" in stream.getvalue()


def test_columns_without_facts_are_left_out_and_gpu_is_shown() -> None:
    stream = io.StringIO()
    sink = ConsoleSink(30, 10**6, stream=stream, gpu=lambda: GpuSample(0.98, 2**36, 512.3, 61))
    sink.step(replace(STEP, mtp_loss=None, expert_load={}))
    header, line = stream.getvalue().splitlines()
    assert "mtp" not in header
    assert "maxvio" not in header
    assert line.split()[-4:-1] == ["98%", "512W", "61°C"]


def test_terminal_shows_bar_below_the_lines() -> None:
    master, slave = pty.openpty()
    with os.fdopen(slave, "w", encoding="utf-8") as terminal:
        sink = ConsoleSink(30, 30 * 16_384, stream=terminal)
        run(sink, 15)
        sink.close()
        shown = b""
        while select.select([master], [], [], 0.2)[0]:  # a pseudo-terminal hands over a page at a time
            shown += os.read(master, 1 << 20)
    os.close(master)
    shown = shown.decode()
    assert "10/30" in shown
    assert "step 15/30  loss 8.8500" in shown
    assert "50%" in shown


def test_bar_can_be_switched_off_on_a_terminal() -> None:
    master, slave = pty.openpty()
    with os.fdopen(slave, "w", encoding="utf-8") as terminal:
        display = open_display(terminal, 100, progress_bar=False)
        display.progress(50, "beside")
        display.line("a line", style="bold red")
        display.close()
        shown = os.read(master, 1 << 20)
    os.close(master)
    assert shown == b"a line\r\n"


def test_a_reader_that_goes_away_does_not_stop_the_run() -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stream:
        sink = ConsoleSink(30, 30 * 16_384, stream=stream)
        run(sink, 30)
        sink.close()


def test_a_closed_terminal_does_not_stop_the_run() -> None:
    master, slave = pty.openpty()
    with os.fdopen(slave, "w", encoding="utf-8") as terminal:
        sink = ConsoleSink(30, 30 * 16_384, stream=terminal)
        run(sink, 5)
        os.close(master)
        run(sink, 30)
        sink.close()


def test_piped_into_head_the_process_ends_cleanly(tmp_path: Path) -> None:
    """Python's own flush of stdout at exit must not fail either."""
    program = """
import sys
from tests.cpu.monitor_samples import STEP
from deepseek_train.monitor.console import ConsoleSink
sink = ConsoleSink(100, 10**9, log_every=1)
sink.step(STEP)
sys.stdin.readline()
for _ in range(100):
    sink.step(STEP)
sink.close()
print("something else")
sys.stderr.write("reached the end")
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    assert b"step" in process.stdout.readline()
    process.stdout.close()
    process.stdin.write(b"go\n")
    process.stdin.close()
    assert process.stderr.read() == b"reached the end"
    process.stderr.close()
    assert process.wait(timeout=30) == 0


def test_an_ascii_stream_gets_question_marks_not_an_error() -> None:
    raw = io.BytesIO()
    display = open_display(io.TextIOWrapper(raw, encoding="ascii"), 100, progress_bar=False)
    display.line("61°C")
    assert raw.getvalue() == b"61?C\n"


def test_pace_averages_and_ends_at_zero() -> None:
    pace = Pace(total_tokens=1000)
    assert math.isnan(pace.update(0, 0.0))
    assert pace.update(100, 10.0) == 90.0
    assert pace.update(200, 10.0 / 3) == 160.0  # (0.1 + 0.3) / 2 seconds per token
    assert pace.update(1000, 10.0) == 0.0


def test_operations_per_second_and_their_share_of_the_peak() -> None:
    def last(**changes: float | None) -> tuple[list[str], list[str]]:
        stream = io.StringIO()
        ConsoleSink(30, 10**6, stream=stream).step(replace(STEP, step=12, **changes))
        header, line = stream.getvalue().splitlines()
        assert len(header) == len(line)
        return header.split(), line.split()

    header, line = last(tflops=402.24, mfu=0.4066)
    assert header[header.index("tok/s") + 1 :][:2] == ["TFLOP/s", "MFU"]
    assert line[line.index("12.3k") + 1 :][:2] == ["402", "40.7%"]
    header, line = last(tflops=0.01234)
    assert "MFU" not in header
    assert "0.0123" in line
    assert "TFLOP/s" not in last()[0]
