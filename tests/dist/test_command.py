"""``deepseek-train`` as a user runs it: a run folder, Ctrl-C and resume to the same bits, torchrun, wrong input."""

import errno
import json
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from deepseek_train.cli import train
from deepseek_train.cli.compose import CONFIG_DIR
from deepseek_train.cli.train import run
from deepseek_train.config.exit_codes import MEANING, ExitCode
from deepseek_train.train import folder_plan
from tests.faults import commands
from tests.faults.commands import write_text

SMALL = [
    "experiment=tiny",
    "model.hidden_size=32",
    "model.num_layers=2",
    "model.dense_ffn_size=48",
    "model.expert_ffn_size=16",
    "model.kv_lora_rank=16",
    "model.q_lora_rank=16",
    "data.sequence_length=16",
    "data.source=text",
    "data.path=shards",
    "data.validation_percent=20",
    "train.microbatch_size=1",
    "optim.batch_size.start=8",
    "train.total_tokens=2048",  # 16 steps
    "train.eval_every=8",
    "train.eval_microbatches=2",
    "train.sample_tokens=4",
    "checkpoint.every=4",
]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with some text in it."""
    folder = tmp_path_factory.mktemp("command")
    write_text(folder)
    return folder


def start(
    folder: Path, *arguments: str, module: tuple[str, ...] = ("deepseek_train.cli.train",)
) -> "subprocess.Popen[str]":
    return commands.start(folder, *arguments, module=module)


def finish(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def steps(run: Path) -> list[dict[str, object]]:
    if not (run / "metrics.jsonl").exists():
        return []
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == "step"]


def tensor_files(run: Path) -> dict[str, object]:
    """Checksums of the newest checkpoint's tensor files."""
    newest = max((run / "checkpoints").iterdir())
    return {
        k: v
        for k, v in json.loads((newest / "manifest.json").read_text())["files"].items()
        if "metadata" not in k
    }


@pytest.fixture(scope="module")
def whole(workplace: Path) -> Path:
    """The folder of a run that nothing interrupted."""
    code, out, err = finish(start(workplace, *SMALL, "name=whole"))
    assert code == 0, err
    assert "4 ranks: PP 2 (dualpipe) x DP 2, EP 2" in out
    assert (
        "kernels: reference, but moe torch, attention torch, rope torch, optim torch; linears in FP32" in out
    )
    assert "validation after step 16" in out
    assert "sample: " in out
    return workplace / "runs" / "whole"


def test_a_run_leaves_its_folder(whole: Path) -> None:
    for name in ("config.yaml", "metrics.jsonl", "report.md", "report/loss.png", "report/timeline.png"):
        assert (whole / name).stat().st_size > 0
    assert "report/expert_load.png" in (whole / "report.md").read_text()
    assert len(list((whole / "checkpoints").iterdir())) == 2  # checkpoint.keep


def test_a_run_interrupted_and_resumed_ends_in_the_same_bits(workplace: Path, whole: Path) -> None:
    process, cut = start(workplace, *SMALL, "name=cut"), workplace / "runs" / "cut"
    while len(steps(cut)) < 5:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    assert code == 0, err
    assert "the same command goes on from there" in out
    interrupted_after = len(steps(cut))
    assert 5 <= interrupted_after < 16

    code, out, err = finish(start(workplace, *SMALL, "name=cut"))
    assert code == 0, err
    assert f"after step {interrupted_after}, saved by pp 2 dp 2 ep 2\n" in out
    assert losses_and_loads(cut) == losses_and_loads(whole)
    assert tensor_files(cut) == tensor_files(whole)


def test_experts_across_mirrors_resume_to_the_same_bits(workplace: Path) -> None:
    """Two ranks, half of the experts on each: stopped after one step, then gone on with."""
    two_ranks = ["parallel.dp=1", "parallel.ep_across_mirrors=true", "train.total_tokens=512"]
    found = []
    for name, sessions in (("mirrored", [[]]), ("mirrored-cut", [["train.stop_after_seconds=0"], []])):
        for extra in sessions:
            code, out, err = finish(start(workplace, *SMALL, *two_ranks, f"name={name}", *extra))
            assert code == 0, err
            assert "2 ranks: PP 2 (dualpipe) x DP 1, EP 2 across mirrors" in out
            assert ("stopped after step 1" in out) == bool(extra)
            assert ("sample: " in out) == (not extra)
        folder = workplace / "runs" / name
        assert len(steps(folder)) == 4
        sample = next(line for line in out.splitlines() if line.startswith("sample: "))
        found.append((losses_and_loads(folder), tensor_files(folder), sample))
    whole, cut = found
    assert whole == cut


def test_torchrun_joins_and_gives_the_same_bits(workplace: Path, whole: Path) -> None:
    arguments = ("--standalone", "--nproc-per-node", "4", "-m", "deepseek_train.cli.train", *SMALL)
    code, _, err = finish(start(workplace, *arguments, "name=joined", module=("torch.distributed.run",)))
    assert code == 0, err
    assert losses_and_loads(workplace / "runs" / "joined") == losses_and_loads(whole)


def test_a_rank_that_breaks_ends_them_all_and_names_its_action(workplace: Path) -> None:
    code, _, err = finish(start(workplace, *SMALL, "name=broken", module=("tests.dist.broken_train",)))
    assert code == 1, err
    last = err.rstrip().splitlines()[-1]
    assert re.fullmatch(
        r"\[rank 1\] deepseek_train\.pipeline\.executor\.StepFailed: pipeline rank 0, \d+F\d+ "
        r"\(forward of micro-batch \d+ in stage \d+\): ValueError: the experts broke",
        last,
    ), last


def losses_and_loads(run: Path) -> list[list[object]]:
    numbers = ("step", "tokens", "loss", "mtp_loss", "balance_loss", "grad_norm", "expert_load")
    return [[record[name] for name in numbers] for record in steps(run)]


WRONG = [
    (["modle.hidden_size=3"], ["modle.hidden_size", "model.hidden_size"]),
    (["parallel.pp=3", "model.num_layers=4"], ["parallel.pp", "even"]),
    (["optim.batch_size.start=4"], ["optim.batch_size.start=8"]),
    (["parallel.dp=3"], ["parallel.ep", "does not divide"]),
    (["parallel.ep_across_mirrors=true", "schedule=1f1b"], ["ep_across_mirrors", "schedule=dualpipe"]),
    (["parallel.ep=3", "parallel.dp=3"], ["parallel.ep", "8 routed experts"]),
    (["model.num_expert_groups=5"], ["model.num_expert_groups", "divisor"]),
    (["model.vocab_size=1000"], ["4096", "1000"]),
    (["data.path=void", "data.source=nowhere"], ["nowhere"]),
    (["run_dir=text/0.py/run"], ["run_dir", "text/0.py"]),
    (["resume=must"], ["resume", "no checkpoint"]),
    (
        ["train.total_tokens=soon", "model.mtp_depth=x", "seeed=1", "optim.eps=-1", "parallel.pp=0"],
        ["5 problems", "soon", "model.mtp_depth", "'seed'", "optim.eps", "parallel.pp: must be at least 1"],
    ),
    (["seeed=1", "parallel.pp=0"], ["2 problems", "'seed'", "parallel.pp: must be at least 1"]),
]


@pytest.mark.parametrize(("overrides", "said"), WRONG, ids=[" ".join(case[0]) for case in WRONG])
def test_wrong_input_is_told_before_anything_starts(
    workplace: Path,
    overrides: list[str],
    said: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = {p for p in workplace.rglob("*") if "shards" not in p.parts}
    monkeypatch.chdir(workplace)
    assert run([*SMALL, "name=wrong", *overrides]) == 2
    told = capsys.readouterr().err
    for words in said:
        assert words in told
    assert {p for p in workplace.rglob("*") if "shards" not in p.parts} == before


def test_a_disk_that_fails_at_the_start_has_a_code_of_its_own(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line; starting again may help, as it does not after a mistake."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "shards/train.bin")

    def away(*_: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.chdir(workplace)
    with monkeypatch.context() as patch:
        patch.setattr(train, "prepare", full)
        assert run([*SMALL, "name=wrong", "data.path=others"]) == ExitCode.STORAGE
        assert capsys.readouterr().err.startswith(
            "[Errno 28] No space left on device: 'shards/train.bin'. See"
        )
    with monkeypatch.context() as patch:
        patch.setattr(folder_plan, "checkpoints_of", away)
        assert run([*SMALL, "name=wrong"]) == ExitCode.STORAGE
        assert "checkpoint.path: None cannot be looked at: [Errno 116] Stale" in capsys.readouterr().err
        assert run([*SMALL, "name=wrong", "parallel.pp=3"]) == ExitCode.USER_ERROR  # a mistake beside it


def test_a_run_that_is_complete_says_so_and_another_model_does_not_resume_it(
    workplace: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    assert run([*SMALL, "name=whole", "model.num_heads=2", "precision=bf16"]) == 2
    told = capsys.readouterr().err
    assert "num_heads was 4, is 2" in told
    assert "params was fp32, is bf16" in told
    assert "resume=never" in told

    before = (whole / "metrics.jsonl").read_bytes()
    code, out, err = finish(start(workplace, *SMALL, "name=whole"))
    assert code == 0, err
    assert "this run is complete" in out
    assert "resume=never" in out
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_starting_afresh_moves_the_old_run_aside(workplace: Path) -> None:
    old = workplace / "runs" / "old"
    old.mkdir(parents=True)
    (old / "config.yaml").write_text("name: old\n")
    code, _, err = finish(start(workplace, *SMALL, "name=old", "train.total_tokens=128", "resume=never"))
    assert code == 0, err
    (aside,) = (workplace / "runs").glob("old.*")
    assert (aside / "config.yaml").read_text() == "name: old\n"
    assert len(steps(old)) == 1


def test_a_run_that_is_asked_for_more_says_so(workplace: Path) -> None:
    for tokens, told in (("128", 0), ("256", 1), ("256", 0)):
        code, out, err = finish(start(workplace, *SMALL, "name=longer", f"train.total_tokens={tokens}"))
        assert code == 0, err
        assert out.count("train.total_tokens was 128, is 256: curves that are shares of it") == told


def test_nothing_asked_for_is_nothing_started(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    assert run([]) == ExitCode.USER_ERROR
    said = capsys.readouterr().err
    assert said.startswith("usage: deepseek-train experiment=NAME")
    assert "begin with experiment=tiny" in said
    assert not (workplace / "runs" / "run").exists()


def test_help_tells_experiments_keys_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    said = capsys.readouterr().out
    assert MEANING.keys() == set(ExitCode)
    for code in ExitCode:
        assert f"\n  {code.value}   {MEANING[code]}\n" in said
    for path in (CONFIG_DIR / "experiment").glob("*.yaml"):
        assert re.search(rf"^  {path.stem} +[A-Z]", said, re.MULTILINE), path.stem
    for words in ("resume=auto", "init_from=PLACE", "runs/NAME", "run_dir=FOLDER"):
        assert words in said


def test_damaged_data_is_named(
    workplace: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    shutil.copytree("shards", "damaged")
    shard = next(Path("damaged").glob("train*.bin"))
    shard.write_bytes(shard.read_bytes()[:-2])
    assert run([*SMALL, "name=damage", "data.path=damaged"]) == 2
    assert shard.name in capsys.readouterr().err
    assert not (workplace / "runs" / "damage").exists()
