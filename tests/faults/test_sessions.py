"""One run in many sessions, none of which ends as it began: nobody reads its output, wandb is silent, the clock jumps,
a second run comes into its folder, it is told to stop once and twice, its launcher is killed. The bits are the same.
"""

import signal
import time
from pathlib import Path

import pytest

from deepseek_train.config.exit_codes import ExitCode
from tests.faults.commands import FAULTY, SMALL, Done, numbers, run, start, tensors, until

NAME = "sessions"
RUN = [*SMALL, f"name={NAME}"]


class Waiting:
    """A session that waits in ``step`` of rank 0, having said its first line, which was the last that anybody read."""

    def __init__(
        self, folder: Path, step: int, *arguments: str, module: tuple[str, ...] = FAULTY, **variables: str
    ) -> None:
        faults = f"clock forward 0 2; wait forward 0 {step}"
        self.folder = folder
        self.process = start(
            folder, *arguments, *RUN, module=module, FAULTS=faults, TZ="Asia/Tokyo", **variables
        )
        assert self.process.stdout is not None
        self.first_line = self.process.stdout.readline()
        self.process.stdout.close()
        mark = folder / f"struck-{NAME}-wait-forward-{step}"
        until(lambda: mark.exists() or self.process.poll() is not None)
        assert self.process.poll() is None, self.end()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)
        time.sleep(0.5)  # the launcher looks ten times a second

    def go(self) -> None:
        (self.folder / f"go-{NAME}").touch()

    def end(self) -> tuple[int, str]:
        """Exit code and stderr."""
        assert self.process.stderr is not None
        with self.process.stderr as stream:  # to its end, which is that of all who hold it
            err = stream.read()
        return self.process.wait(timeout=60), err


@pytest.fixture(scope="module")
def folder(whole: Path, workplace: Path) -> Path:
    assert whole.exists()  # it has prepared the data
    return workplace


@pytest.fixture(scope="module")
def refused(folder: Path) -> Done:
    """A second run in the folder of one that has no output, no wandb and a clock that jumped; that one is then told to
    stop."""
    key, nobody = "0123456789" * 4, "http://127.0.0.1:9"
    first = Waiting(folder, 4, "monitor.wandb=online", WANDB_API_KEY=key, WANDB_BASE_URL=nobody)
    second = run(folder, *RUN)
    first.signal(signal.SIGTERM)
    first.go()
    code, err = first.end()
    assert code == ExitCode.COMPLETE, err
    assert "stopping after this step" in err
    assert "wandb: could not start online: 127.0.0.1 port 9 does not answer" in err
    assert "Traceback" not in err
    assert first.first_line.startswith(f"{NAME}: ")
    return second


def test_a_second_run_in_the_folder_is_refused(refused: Done) -> None:
    assert refused.code == ExitCode.USER_ERROR
    assert f"another run works in runs/{NAME}: process " in refused.err
    assert "Traceback" not in refused.err
    assert "starting the ranks again" not in refused.err


@pytest.mark.usefixtures("refused")
def test_the_run_told_to_stop_has_saved(folder: Path) -> None:
    assert (folder / "runs" / NAME / "outcome").read_text() == "stopped after step 4\n"
    assert (folder / "runs" / NAME / "checkpoints" / "step-00000004" / "manifest.json").exists()
    assert not (folder / "runs" / f"{NAME}.lock").exists()


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")


@pytest.mark.slow_faults
@pytest.mark.usefixtures("refused")
@pytest.mark.parametrize(("number", "step"), [(signal.SIGTERM, 5), (signal.SIGKILL, 6)])
def test_torchrun_told_to_stop_or_killed(folder: Path, number: int, step: int) -> None:
    """Its ranks save and leave."""
    session = Waiting(folder, step, "tests.faults", module=TORCHRUN, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    session.signal(number)
    time.sleep(1.5)  # ranks look for torchrun once a second
    session.go()
    _, err = session.end()
    assert not (folder / "runs" / f"{NAME}.lock").exists()
    assert (folder / "runs" / NAME / "outcome").read_text() == f"stopped after step {step}\n", err


@pytest.mark.usefixtures("refused")
def test_told_twice_it_ends_now(folder: Path) -> None:
    session = Waiting(folder, 7)
    session.signal(signal.SIGTERM)
    assert session.process.poll() is None
    began = time.monotonic()
    session.signal(signal.SIGTERM)
    code, err = session.end()
    assert code == 128 + signal.SIGTERM, err
    assert time.monotonic() - began < 20
    assert "Traceback" not in err


@pytest.mark.usefixtures("refused")
def test_without_their_launcher_the_ranks_save_and_leave(folder: Path) -> None:
    session = Waiting(folder, 8)
    session.signal(signal.SIGKILL)
    session.go()
    session.end()
    assert not (folder / "runs" / f"{NAME}.lock").exists()
    assert (folder / "runs" / NAME / "outcome").read_text() == "stopped after step 8\n"


@pytest.mark.usefixtures("refused")
def test_the_run_ends_in_the_bits_of_one_that_nothing_befell(folder: Path, whole: Path) -> None:
    done = run(folder, *RUN)
    assert done.code == 0, done.err
    assert "after step 8" in done.out
    assert numbers(whole.with_name(NAME)) == numbers(whole)
    assert tensors(whole.with_name(NAME)) == tensors(whole)
