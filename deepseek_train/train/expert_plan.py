"""Which dispatcher a run's experts get, decided on paper."""

from dataclasses import dataclass
from typing import Literal

from deepseek_train.config.parse import Problem
from deepseek_train.config.schema import RunConfig
from deepseek_train.parallel.expert.deep_ep_problems import Load, deep_ep_problems, this_machine
from deepseek_train.spec.layout import ParallelLayout, expert_ranks_per_node


@dataclass(frozen=True)
class ExpertPlan:
    """``ranks_per_node``: of an expert group; None where its ranks do not lie evenly on nodes. ``reason``: in words."""

    dispatcher: Literal["flat", "two_hop", "deep_ep"]
    ranks_per_node: int | None
    reason: str


def plan_experts(config: RunConfig, layout: ParallelLayout) -> ExpertPlan:
    """What ``parallel.dispatcher`` comes to. Check ``expert_problems`` first."""
    asked, per_node = config.parallel.dispatcher, expert_ranks_per_node(layout, config.cluster.gpus_per_node)
    if asked != "auto":
        return ExpertPlan(asked, per_node, "as asked")
    if layout.ep == 1:
        return ExpertPlan("flat", per_node, "every rank holds all experts")
    if per_node is None:
        what = (
            f"{layout.ep} expert-parallel ranks do not lie evenly on nodes of {config.cluster.gpus_per_node}"
        )
        return ExpertPlan("flat", None, what)
    if per_node == layout.ep:
        return ExpertPlan("flat", per_node, "experts of a layer are on one node")
    if per_node == 1:
        return ExpertPlan("flat", per_node, "experts of a layer are on one rank of each node")
    return ExpertPlan(
        "two_hop", per_node, f"experts of a layer are on {layout.ep // per_node} nodes of {per_node}"
    )


def expert_problems(config: RunConfig, layout: ParallelLayout) -> list[Problem]:
    """Why the dispatcher asked for cannot be."""
    asked, gpus = config.parallel.dispatcher, config.cluster.gpus_per_node
    if asked not in ("two_hop", "deep_ep") or layout.sharers % layout.ep:
        return []
    per_node = expert_ranks_per_node(layout, gpus)
    if asked == "deep_ep":
        return _deep_ep_problems(config, layout.ep, per_node)
    if per_node is None:
        what = f"two_hop, but {layout.ep} expert-parallel ranks do not lie evenly on nodes of {gpus}"
        mend = (
            "Make parallel.ep and parallel.dp multiples of cluster.gpus_per_node (which may emulate smaller nodes), or "
            "write parallel.dispatcher=auto, which falls back to flat."
        )
        return [Problem("parallel.dispatcher", what, mend)]
    if per_node in (1, layout.ep):
        where = "one node" if per_node == layout.ep else "nodes of their own"
        what = (
            f"two_hop, but the {layout.ep} expert-parallel ranks of a layer are on {where} (nodes of {gpus})"
        )
        mend = (
            "Write parallel.dispatcher=auto: one hop is all there is. (To emulate nodes: a cluster.gpus_per_node "
            "between 1 and parallel.ep that divides it.)"
        )
        return [Problem("parallel.dispatcher", what, mend)]
    return []


def _deep_ep_problems(config: RunConfig, ep: int, per_node: int | None) -> list[Problem]:
    p = config.precision
    load = Load(ep, per_node, config.model.hidden_size, p.params, (p.dispatch, p.combine))
    mend = "Mend that, or write parallel.dispatcher=auto, which needs torch.distributed alone."
    machine = this_machine(cuda_allowed=config.cluster.device != "cpu")
    return [
        Problem("parallel.dispatcher", f"deep_ep, but {what}", mend)
        for what in deep_ep_problems(load, machine)
    ]


def node_problems(config: RunConfig, world_size: int, here: int) -> list[Problem]:
    """``here``: ranks that were started on this machine. A machine may pass for several nodes, but no node may span
    machines: dispatchers would take the network for NVLink."""
    nodes_of, ep = config.cluster.gpus_per_node, config.parallel.ep
    if ep == 1 or world_size == here or here % nodes_of == 0:
        return []
    what = f"nodes of {nodes_of} ranks, but {here} ranks were started on this machine, of {world_size} in all"
    return [Problem("cluster.gpus_per_node", what, f"Write cluster.gpus_per_node={here}.")]
