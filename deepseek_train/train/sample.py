"""A continuation of a prompt by the model as it stands, through the pipeline it trains in.

Every token runs the whole prefix once (no cache): enough to look at a model while it trains.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from deepseek_train.phases.phase import fold
from deepseek_train.phases.values import Hidden, MicroBatch
from deepseek_train.schedule.dataflow import MessageKind
from deepseek_train.train.build import Job


@torch.no_grad()
def continuation(
    job: Job, prompt_ids: list[int], num_tokens: int, *, temperature: float, stop: int
) -> list[int]:
    """New token ids after ``prompt_ids`` (collective, the same on every rank); ends early at token ``stop``."""
    length = job.config.data.sequence_length
    generator = torch.Generator().manual_seed(job.config.seed)
    ids = list(prompt_ids)
    for _ in range(num_tokens):
        logits_V = _next_logits(job, ids[-length:])
        chosen = torch.zeros(1, dtype=torch.int64)
        if logits_V is not None:
            shares_V = torch.softmax(logits_V.float().cpu() / temperature, -1)
            chosen = torch.multinomial(shares_V, 1, generator=generator)
        last_rank = job.layout.rank_at(job.placement.rank_of(job.placement.num_stages - 1, 0), 0)
        chosen = chosen.to(job.place.device)
        dist.broadcast(chosen, last_rank)
        token = int(chosen)
        if token == stop:
            break
        ids.append(token)
    return ids[len(prompt_ids) :]


def _next_logits(job: Job, ids: list[int]) -> Tensor | None:
    """Logits of the token after ``ids``, on the ranks of the last stage. All data-parallel ranks run the same, and so
    do both directions of the pipeline: mirrored ranks, which may share experts, run the same stage at the same time."""
    m, links, me = job.config.model, job.mesh.links, job.mesh.pp_rank
    length = max(
        len(ids), 2
    )  # cuDNN's attention knows no single position; what comes later changes nothing before
    missing = length + 1 + m.mtp_depth - len(ids)
    padded = torch.tensor([[*ids, *[0] * missing]], device=job.place.device)
    x_BTD: Tensor | None = None
    logits_V: Tensor | None = None
    for index, ranks_X in enumerate(job.placement.ranks_SX):
        if me not in ranks_X:
            continue
        stage, direction = job.stages[index], ranks_X.index(me)
        if index == 0:
            hidden: Hidden = fold(stage.trunk, MicroBatch(padded))
        else:
            source = job.placement.ranks_SX[index - 1][direction]
            if source != me:
                shape = (1, length, m.hidden_size)
                x_BTD = links.receive(
                    shape, stage.context.dtype, job.place.device, source, MessageKind.ACTIVATION
                ).wait()
            assert x_BTD is not None
            hidden = fold(stage.trunk, Hidden(x_BTD))
        if index == job.placement.num_stages - 1:
            logits_V = stage.logits(hidden)[0, len(ids) - 1]
            continue
        x_BTD = hidden.x_BTD
        target = job.placement.ranks_SX[index + 1][direction]
        if target != me:
            links.send(x_BTD, target, MessageKind.ACTIVATION, window=1)
    links.drain()  # not before: both directions of two neighbours may be sending to each other
    return logits_V
