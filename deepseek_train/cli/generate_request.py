"""What ``deepseek-generate`` can be asked, and what can be wrong with it: all of it at once, each with its mend."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from upath import UPath

from deepseek_train.checkpoint.weight_source import WeightSource
from deepseek_train.cli.generate_source import Model, open_model
from deepseek_train.cli.key_value import UsageError, like, parse_key_values
from deepseek_train.data.tokenizer import TextTokenizer
from deepseek_train.generate.sampling import Sampling
from deepseek_train.train.device import visible_gpus

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_LARGEST_SEED = 2**63


@dataclass(frozen=True)
class GenerateRequest:
    """Keys of ``deepseek-generate``."""

    source: str = like("runs/tiny")
    prompt: str = like('"import numpy"')
    tokens: int = 64
    temperature: float = 0.6
    top_p: float = 0.95
    seed: int = 0
    ema: bool = False
    bos: bool = False
    tokenizer: str | None = None
    context: int | None = None
    device: str = "auto"
    dtype: str = "auto"


@dataclass(frozen=True)
class Task:
    """A model, what it reads, and how it goes on, all fitting one another."""

    name: str
    weights: WeightSource
    tokenizer: TextTokenizer
    prompt_ids: tuple[int, ...]
    tokens: int
    sampling: Sampling
    seed: int
    device: torch.device
    dtype: torch.dtype

    @property
    def length(self) -> int:
        """Positions of prompt and answer."""
        return len(self.prompt_ids) + self.tokens


def understand(words: Sequence[str]) -> Task:
    """Opens what the words name. Raises UsageError with every mistake, those that only the files show included."""
    understood: list[Task] = []
    parse_key_values(GenerateRequest, words, lambda request: _understand(request, understood))
    return understood[0]


def _understand(request: GenerateRequest, understood: list[Task]) -> list[str]:
    """What is wrong; the task is appended to ``understood`` if nothing is."""
    problems = _problems(request)
    try:
        model = open_model(UPath(request.source), ema=request.ema, tokenizer=request.tokenizer)
    except UsageError as error:
        return [*error.problems, *problems]
    prompt = sys.stdin.read() if request.prompt == "-" else request.prompt
    begin = [model.tokenizer.special.bos] if request.bos else []
    prompt_ids = (*begin, *model.tokenizer.encode(prompt))
    problems += _length_problems(request, model, len(prompt_ids))
    if not problems:
        gpu = request.device == "cuda" or (request.device == "auto" and visible_gpus() > 0)
        dtype = ("bf16" if gpu else "fp32") if request.dtype == "auto" else request.dtype
        task = Task(
            name=model.name,
            weights=model.weights,
            tokenizer=model.tokenizer,
            prompt_ids=prompt_ids,
            tokens=request.tokens,
            sampling=Sampling(request.temperature, request.top_p),
            seed=request.seed,
            device=torch.device("cuda" if gpu else "cpu"),
            dtype=_DTYPES[dtype],
        )
        understood.append(task)
    return problems


def _problems(request: GenerateRequest) -> list[str]:
    """What the request itself shows."""
    problems = Sampling(request.temperature, request.top_p).problems()
    if request.tokens < 1:
        problems.append(f"tokens={request.tokens}: write 1 or more")
    if not 0 <= request.seed < _LARGEST_SEED:
        problems.append(f"seed={request.seed}: write a number from 0 to {_LARGEST_SEED - 1}")
    if request.context is not None and request.context < 2:
        problems.append(
            f"context={request.context}: write 2 or more, or null for what the model was trained with"
        )
    if request.device not in ("auto", "cpu", "cuda"):
        problems.append(f"device={request.device}: write one of auto cpu cuda")
    elif request.device == "cuda" and not visible_gpus():
        problems.append("device=cuda, but no GPU is to be seen here: write device=cpu or auto")
    if request.dtype not in ("auto", *_DTYPES):
        problems.append(f"dtype={request.dtype}: write one of auto {' '.join(_DTYPES)}")
    return problems


def _length_problems(request: GenerateRequest, model: Model, prompt: int) -> list[str]:
    """Whether prompt and answer fit the context."""
    if prompt == 0:
        return ['the prompt is empty: write prompt="some text", or bos=true to begin with nothing']
    context = model.context if request.context is None else request.context
    if prompt + max(request.tokens, 1) <= context:
        return []
    needed = f"a prompt of {prompt} tokens and {request.tokens} more are {prompt + request.tokens}"
    limit = f"{model.name} was trained with {context}" if request.context is None else f"context={context}"
    shorter = f"tokens={context - prompt}" if prompt < context else "a shorter prompt"
    return [f"{needed}, but {limit}: write {shorter}, or a larger context=.. and see what comes of it"]
