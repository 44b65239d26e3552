"""What a command imports before it starts ranks, and what ranks import: seconds, at every start."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "deepspeed")
COMPILERS = ("torch._dynamo", "torch._inductor", "torch._inductor.compile_fx")


def imported(code: str, names: tuple[str, ...]) -> list[str]:
    """Those of ``names`` that a fresh process has imported after ``code``."""
    asked = f"{code}; import sys; print(*[name for name in {names} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", asked], capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()[-1].split()


@pytest.mark.parametrize("command", ["train", "data", "schedule", "placement"])
def test_commands_are_light(command: str) -> None:
    assert imported(f"import deepseek_train.cli.{command}", HEAVY) == []


@pytest.mark.parametrize(
    "wrong", ["modle.hidden_size=3", "parallel.pp=3", "parallel.dispatcher=two_hop", "kernels.moe=x"]
)
def test_mistakes_are_told_without_torch(wrong: str) -> None:
    run = f"from deepseek_train.cli.train import run; assert run(['experiment=tiny', {wrong!r}]) == 2"
    assert imported(run, HEAVY) == []


def test_ranks_import_no_compiler() -> None:
    """Neither DeepSpeed's optimizer nor ours: torch.compile is there when it is asked for."""
    made = (
        "import torch, deepseek_train.cli.train_rank; from deepseek_train.optim.adamw import AdamW; "
        "optimizer = AdamW([{'params': [torch.ones(1)]}], betas=(0.9, 0.9), eps=1e-8); optimizer.step()"
    )
    optimizer = "deepspeed.runtime.bf16_optimizer"
    assert imported(made, (*COMPILERS, optimizer)) == [optimizer]
