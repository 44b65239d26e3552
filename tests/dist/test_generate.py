"""What a pipeline of four ranks says at the end of training, without a cache, one process says again from the run's
checkpoint, with one."""

import re
from pathlib import Path

import pytest

from deepseek_train.cli.generate import main
from tests.dist.test_command import SMALL, finish, start

PROMPT, TOKENS = "def load(path):\n", 24


def test_the_last_sample_of_a_run_can_be_had_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both draw from the same shares with the same generator. Of shares that differ by rounding, in the seventh digit,
    a draw falls between with a chance of one in a hundred thousand."""
    (tmp_path / "text").mkdir()
    for i in range(40):
        lines = (f"x{i}_{j} = {i * j}\n{PROMPT}    return open(path).read()\n" for j in range(12))
        (tmp_path / "text" / f"{i}.py").write_text("".join(lines))
    more = ["data.sequence_length=64", "train.total_tokens=4096", f"train.sample_tokens={TOKENS}", "seed=5"]
    asked = [*SMALL, *more, f'train.sample_prompt="{PROMPT}"', "name=whole"]
    code, out, err = finish(start(tmp_path, *asked))
    assert code == 0, err
    said = re.search(r"^sample: (.*?)^report: ", out, re.DOTALL | re.MULTILINE)
    assert said is not None, out
    run = tmp_path / "runs" / "whole"
    how = ["temperature=0.6", "top_p=1", "seed=5", f"tokens={TOKENS}", "device=cpu"]
    assert main([f"source={run}", f"prompt={PROMPT}", *how]) == 0
    assert said[1] == f"{PROMPT}⟶{capsys.readouterr().out}"
    assert len(said[1]) > len(PROMPT) + TOKENS / 2
