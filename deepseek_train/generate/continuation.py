"""A continuation of a prompt, token by token, with the latents of what has been read kept."""

from collections.abc import Iterator, Sequence

import torch

from deepseek_train.generate.sampling import Sampling, choose
from deepseek_train.model.decode import LatentCache, decode
from deepseek_train.model.stage import Stage


class NotFinite(ValueError):
    """The model says NaN or infinity."""


def continuation(
    stage: Stage,
    prompt_ids: Sequence[int],
    num_tokens: int,
    sampling: Sampling,
    *,
    seed: int,
    stop: int,
    vocab_size: int,
) -> Iterator[int]:
    """At most ``num_tokens`` new token ids below ``vocab_size`` (the tokenizer's: models may have more, which mean
    nothing); ends early before token ``stop``. ``stage`` is the whole model, made for as many positions as there are
    tokens in all. The same seed gives the same tokens.

    Raises RoutingFault or NotFinite where the model has overflowed.
    """
    context = stage.context
    capacity = len(prompt_ids) + num_tokens - 1  # nobody asks what follows the last
    cache = LatentCache(context.model, 1, capacity, context.dtype, context.device)
    generator = torch.Generator().manual_seed(seed)
    unread = list(prompt_ids)
    for number in range(1, num_tokens + 1):
        hidden = decode(stage, torch.tensor([unread], device=context.device), cache)
        logits_V = stage.logits(hidden.moved_to(hidden.x_BTD[:, -1:]))[0, 0, :vocab_size]
        if not logits_V.isfinite().all():
            raise NotFinite(
                f"logits of token {number} are not finite (NaN or Inf): take an earlier checkpoint"
            )
        token = choose(logits_V, sampling, generator)
        if token == stop:
            return
        yield token
        unread = [token]
