"""A continuation of a prompt, token by token, with the latents of what has been read kept."""

from collections.abc import Iterator, Sequence

import torch

from deepseek_train.generate.sampling import Sampling, choose
from deepseek_train.model.decode import LatentCache, decode
from deepseek_train.model.stage import Stage


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

    Raises RoutingFault where a router's result is not finite.
    """
    context = stage.context
    capacity = len(prompt_ids) + num_tokens - 1  # nobody asks what follows the last
    cache = LatentCache(context.model, 1, capacity, context.dtype, context.device)
    generator = torch.Generator().manual_seed(seed)
    unread = list(prompt_ids)
    for _ in range(num_tokens):
        hidden = decode(stage, torch.tensor([unread], device=context.device), cache)
        logits_V = stage.logits(hidden.moved_to(hidden.x_BTD[:, -1:]))[0, 0, :vocab_size]
        token = choose(logits_V, sampling, generator)
        if token == stop:
            return
        yield token
        unread = [token]
