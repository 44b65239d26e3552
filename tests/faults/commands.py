"""Runs of the command in a folder of their own, as a user starts them, for tests of what goes wrong."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SMALL = [
    "experiment=tiny",
    "model.hidden_size=32",
    "model.num_layers=2",
    "model.dense_ffn_size=48",
    "model.expert_ffn_size=16",
    "model.kv_lora_rank=16",
    "model.q_lora_rank=16",
    "parallel.ep=1",
    "parallel.dp=1",
    "data.sequence_length=16",
    "data.source=text",
    "data.path=shards",
    "data.validation_percent=20",
    "train.microbatch_size=1",
    "optim.batch_size.start=4",
    "train.total_tokens=576",  # 9 steps
    "train.eval_every=0",
    "train.eval_microbatches=2",
    "train.sample_prompt=''",
    "checkpoint.every=2",
]
FAULTY = ("tests.faults",)


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str
    seconds: float


def write_text(folder: Path) -> None:
    """Something to train on, in ``folder/text``."""
    (folder / "text").mkdir()
    words = "def load(path): return open(path).read()  # a line like any other\n"
    for i in range(40):
        (folder / "text" / f"{i}.py").write_text("".join(f"x{i}_{j} = {i * j}\n" + words for j in range(12)))


def start(
    folder: Path, *arguments: str, module: tuple[str, ...] = FAULTY, **variables: str
) -> "subprocess.Popen[str]":
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-m", *module, *arguments],
        cwd=folder,
        env={**environment, **variables},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def until(found: Callable[[], bool], seconds: float = 150.0) -> None:
    """Waits until something is there."""
    deadline = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)


def run(folder: Path, *arguments: str, module: tuple[str, ...] = FAULTY, **variables: str) -> Done:
    began = time.monotonic()
    process = start(folder, *arguments, module=module, **variables)
    try:
        out, err = process.communicate(timeout=150)
    finally:
        process.kill()
    return Done(process.returncode, out, err, time.monotonic() - began)


def numbers(run_folder: Path) -> list[list[object]]:
    """What a run computed, step by step."""
    names = ("step", "tokens", "loss", "mtp_loss", "balance_loss", "grad_norm", "expert_load")
    records = map(json.loads, (run_folder / "metrics.jsonl").read_text().splitlines())
    return [[record[name] for name in names] for record in records if record["kind"] == "step"]


def tensors(run_folder: Path) -> dict[str, object]:
    """Checksums of the last checkpoint's tensors."""
    checkpoints = run_folder / "checkpoints"
    newest = max(path for path in checkpoints.iterdir() if path.name.startswith("step-"))
    files = json.loads((newest / "manifest.json").read_text())["files"]
    return {name: facts for name, facts in files.items() if name.endswith(".safetensors")}
