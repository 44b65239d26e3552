"""The one place where all rooms meet: a configuration and a place among the ranks become a job that can train."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from deepseek_kernels.choice import Kernels
from deepseek_train.config.schema import ModelConfig, RunConfig
from deepseek_train.data.loader import TokenSource
from deepseek_train.fp8.room import Fp8
from deepseek_train.model.context import ModelContext
from deepseek_train.model.init import init_stage
from deepseek_train.model.stage import Stage
from deepseek_train.optim.ema import Ema
from deepseek_train.optim.groups import DistributedOptimizer, WeightGroup
from deepseek_train.optim.quiet_deepspeed import adopt_process_group
from deepseek_train.optim.zero1 import Zero1
from deepseek_train.parallel.expert.deep_ep import DeepEp
from deepseek_train.parallel.expert.deep_ep_buffers import make_buffers
from deepseek_train.parallel.expert.dispatcher import Dispatcher, flat, two_hop
from deepseek_train.parallel.expert.group import Among, ExpertGroup
from deepseek_train.parallel.expert.journey import WireFormats
from deepseek_train.parallel.expert.wire import WireFormat
from deepseek_train.parallel.mesh import ParallelMesh, ReplicaGroup, make_mesh
from deepseek_train.parallel.rendezvous import Place
from deepseek_train.phases.recompute import Recomputation
from deepseek_train.phases.wgrad import Weight, WeightGradQueue
from deepseek_train.pipeline.executor import Executor, PreparedSchedule
from deepseek_train.pipeline.values import Boundary
from deepseek_train.schedule.action import Placement
from deepseek_train.schedule.forward_only import forward_only
from deepseek_train.spec import work
from deepseek_train.spec.layout import ParallelLayout
from deepseek_train.spec.stages import StageSpec, stage_weights
from deepseek_train.spec.throughput import Throughput, known_peak
from deepseek_train.spec.weights import WeightSpec
from deepseek_train.train.batching import eval_microbatches
from deepseek_train.train.data_plan import open_source
from deepseek_train.train.expert_plan import ExpertPlan, plan_experts
from deepseek_train.train.kernel_plan import plan_kernels
from deepseek_train.train.kernels_alike import everywhere_alike
from deepseek_train.train.schedule_plan import durations_for, placement_for
from deepseek_train.train.schedule_store import ScheduleStore, told_by_rank_0
from deepseek_train.train.stage_plan import plan_stages
from deepseek_train.watch.whereabouts import Whereabouts

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class OwnedWeight:
    """A trained weight on this rank (of experts: this rank's share) and the ranks that hold the same copy."""

    spec: WeightSpec
    weight: Weight
    replicas: ReplicaGroup


@dataclass(frozen=True)
class Job:
    """Everything one rank trains with."""

    config: RunConfig
    place: Place
    mesh: ParallelMesh
    stages: dict[int, Stage]
    weights: tuple[OwnedWeight, ...]
    executor: Executor
    optimizer: DistributedOptimizer
    ema: Ema | None
    train_source: TokenSource
    validation_source: TokenSource
    placement: Placement  # where stages are; also of evaluations
    schedules: ScheduleStore  # of training steps
    evaluation: PreparedSchedule
    counts_traffic: bool  # whether what is sent to experts is known by class of link
    kernels: Kernels
    fp8: Fp8 | None
    throughput: Throughput
    where: Whereabouts  # is told what this rank is at

    @property
    def layout(self) -> ParallelLayout:
        return self.mesh.layout

    @property
    def replicas(self) -> str:
        """The groups of ranks this rank reduces gradients with, for reports."""
        groups = sorted({one.replicas.ranks for one in self.weights if len(one.replicas.ranks) > 1})
        return ", ".join(str(list(ranks)) for ranks in groups) or "(none)"

    def weights_changed(self) -> None:
        """To be told after every optimizer step and when a checkpoint has been read: copies are made anew."""
        if self.fp8 is not None:
            self.fp8.copies.forget()

    def training_schedule(self, num_microbatches: int) -> PreparedSchedule:
        """Of a step; collective, where it is new (``ScheduleStore.of``)."""
        return self.schedules.of(num_microbatches)

    def router_biases(self) -> Iterator[tuple[int, Tensor]]:
        """(layer, balance bias) of every MoE layer on this rank."""
        for stage in self.stages.values():
            for layer, router in stage.routers():
                yield layer, router.bias


def build(config: RunConfig, layout: ParallelLayout, place: Place, where: Whereabouts | None = None) -> Job:
    """Builds a rank's job (collective: creates process groups and the optimizer's shards). ``where``: is told what the
    job is at."""
    where = where or Whereabouts.unseen()
    adopt_process_group()
    model, dtype = config.model, DTYPES[config.precision.params]
    # Evaluation's placement: stages are where training has them, whatever the number of micro-batches.
    placement = placement_for(config.schedule, layout.pp, eval_microbatches(config))
    specs = plan_stages(config, layout.pp)
    durations = told_by_rank_0(lambda: durations_for(config, specs))  # a file that may differ between nodes
    experts, kernels = plan_experts(config, layout), plan_kernels(config, place.device.type)
    everywhere_alike(kernels)
    mesh = make_mesh(
        layout,
        placement,
        place.rank,
        embeds=tuple(spec.index for spec in specs if spec.embeds),
        ranks_per_node=experts.ranks_per_node,
        two_hop=experts.dispatcher == "two_hop",
        check_splits=config.parallel.check_splits,
        timeout_seconds=config.cluster.timeout_seconds,
        device=place.device,
        where=where,
    )
    dispatcher = _dispatcher(config, experts, mesh.expert_group, place.device, kernels)
    queue = WeightGradQueue()
    recompute = Recomputation(frozenset(config.train.recompute))
    asked = config.precision.fp8
    fp8 = Fp8.of(asked, kernels, queue, recompute) if asked is not None else None
    context = ModelContext(
        model, queue, dispatcher, place.device, dtype, recompute, kernels, fp8, config.train.compile
    )
    stages = _build_stages(config, context, [specs[s] for s in placement.stages_of(mesh.pp_rank)])
    boundary = Boundary(
        (config.train.microbatch_size, config.data.sequence_length, model.hidden_size), dtype, place.device
    )
    weights = tuple(_owned(config.model, stages, mesh))
    world = dist.distributed_c10d._get_default_group()
    moments = DTYPES[config.precision.moments]
    optimizer = Zero1(_groups(config, weights), world, config.optim, moments, kernels.optim)
    return Job(
        config=config,
        place=place,
        mesh=mesh,
        stages=stages,
        weights=weights,
        executor=Executor(stages, mesh.links, queue, boundary, where=where),
        optimizer=optimizer,
        ema=None if config.optim.ema_decay is None else Ema(optimizer.fragments(), config.optim.ema_decay),
        train_source=open_source(config, "train"),
        validation_source=open_source(config, "validation"),
        placement=placement,
        schedules=ScheduleStore(config.schedule, layout.pp, mesh.pp_rank, durations),
        evaluation=PreparedSchedule(forward_only(placement), mesh.pp_rank),
        counts_traffic=experts.dispatcher != "deep_ep" and experts.ranks_per_node is not None,
        kernels=kernels,
        fp8=fp8,
        throughput=_throughput(config, place.device),
        where=where,
    )


def _throughput(config: RunConfig, device: torch.device) -> Throughput:
    peak = config.cluster.peak_tflops
    if peak is None and device.type == "cuda":
        peak = known_peak(torch.cuda.get_device_name(device))
    flops = work.training(config.model, config.data.sequence_length).total
    return Throughput(flops, peak if device.type == "cuda" else None)


def _dispatcher(
    config: RunConfig, experts: ExpertPlan, group: ExpertGroup, device: torch.device, kernels: Kernels
) -> Dispatcher:
    dispatch, combine = WireFormat(config.precision.dispatch), WireFormat(config.precision.combine)
    formats = WireFormats(dispatch, combine, kernels.quant)
    match experts.dispatcher:
        case "flat":
            return flat(group, formats)
        case "two_hop":
            return two_hop(group, formats)
        case "deep_ep":
            buffers = make_buffers(
                group.backward[Among.ALL].group,  # announcements are in the other one
                hidden_size=config.model.hidden_size,
                tokens=config.train.microbatch_size * config.data.sequence_length,
                experts_per_token=config.model.experts_per_token,
                fp8=formats.dispatch is WireFormat.FP8,
                device=device,
            )
            return DeepEp(buffers, group, formats)


def _build_stages(config: RunConfig, context: ModelContext, specs: list[StageSpec]) -> dict[int, Stage]:
    """This rank's stages; where both embed tokens, they share one embedding tensor."""
    stages: dict[int, Stage] = {}
    embedding: Weight | None = None
    for spec in specs:
        stage = Stage(context, spec, config.data.sequence_length, embedding)
        init_stage(stage, config.model, config.seed)
        embedding = stage.embed if spec.embeds else embedding
        stages[spec.index] = stage
    return stages


def _owned(m: ModelConfig, stages: dict[int, Stage], mesh: ParallelMesh) -> Iterator[OwnedWeight]:
    """Every trained weight of the rank once, though two stages may share the embedding."""
    seen = set()
    for index, stage in stages.items():
        weights = stage.weights()
        for spec in stage_weights(m, stage.spec):
            if spec.trained and spec.name not in seen:
                seen.add(spec.name)
                yield OwnedWeight(spec, weights[spec.name], _replicas(mesh, index, spec))


def _replicas(mesh: ParallelMesh, stage: int, spec: WeightSpec) -> ReplicaGroup:
    if spec.name == "embed":
        assert mesh.embedding is not None
        return mesh.embedding
    return (mesh.experts if spec.expert else mesh.dense)[stage]


def _groups(config: RunConfig, weights: tuple[OwnedWeight, ...]) -> list[WeightGroup]:
    """One group for each set of replicas and each of decayed and not: the same groups, in the same order, on all ranks
    that share replicas, because all of them list the same stages."""
    found: dict[tuple[tuple[int, ...], bool, bool], list[OwnedWeight]] = {}
    for owned in weights:
        key = (owned.replicas.ranks, owned.spec.expert, owned.spec.decayed)
        found.setdefault(key, []).append(owned)
    return [
        WeightGroup(
            weights={owned.spec.name: owned.weight for owned in members},
            replicas=members[0].replicas.group,
            weight_decay=config.optim.weight_decay if decayed else 0.0,
        )
        for (_, _, decayed), members in found.items()
    ]
