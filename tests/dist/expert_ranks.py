"""Expert groups for tests: all ranks of a run share the experts, on nodes of set size."""

import torch.distributed as dist

from deepseek_train.parallel.expert.group import Among, ExpertGroup, make_expert_group


def expert_group(rank: int, size: int, node_size: int, *, check_splits: bool = False) -> ExpertGroup:
    """With the process groups of every dispatcher (collective)."""
    return make_expert_group(
        tuple(range(size)),
        rank,
        node_size,
        lambda ranks: dist.new_group(list(ranks), use_local_synchronization=True),
        among=tuple(Among),
        check_splits=check_splits,
    )
