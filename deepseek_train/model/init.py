"""Initial weights as a pure function of (seed, name of the weight, expert): the same for every layout of ranks."""

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from deepseek_train.config.schema import ModelConfig
from deepseek_train.model.stage import Stage
from deepseek_train.spec.stages import stage_weights
from deepseek_train.spec.weights import Init


@torch.no_grad()
def init_stage(stage: Stage, m: ModelConfig, seed: int) -> None:
    """Fills every weight of ``stage`` as the table says. Normal weights are drawn in FP32, one generator a matrix
    (one an expert), then cast."""
    weights = stage.weights()
    drawn: list[Future[None]] = []
    # A generator is one thread's work: a GPU's share of weights would take it half a minute.
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        for spec in stage_weights(m, stage.spec):
            if not spec.trained:
                continue
            weight = weights[spec.name]
            if spec.init is Init.ONES:
                weight.fill_(1.0)
                continue
            std = m.init_std
            if spec.name == "embed" and m.embed_init_std is not None:
                std = m.embed_init_std
            first = stage.context.dispatcher.group.rank * weight.shape[0] if spec.expert else 0
            pieces = list(weight) if spec.expert else [weight]
            for offset, piece in enumerate(pieces):
                drawn.append(threads.submit(_draw, piece, std, _seed(seed, spec.name, first + offset)))
    for one in drawn:
        one.result()


@torch.no_grad()
def _draw(piece: Tensor, std: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    piece.copy_(torch.empty(piece.shape).normal_(0.0, std, generator=generator))


def _seed(seed: int, name: str, expert: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{name}/{expert}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1
