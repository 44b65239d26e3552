"""A small model on any grid of ranks, and the same model in one process, plainly folded: what the grids are held to.

Legend: B sequences, T positions, D hidden, M MTP modules.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from deepseek_kernels.choice import ON_CPU
from deepseek_train.config.schema import Forgettable, Fp8Config, ModelConfig, ScheduleConfig
from deepseek_train.fp8.room import Fp8
from deepseek_train.model.context import ModelContext
from deepseek_train.model.init import init_stage
from deepseek_train.model.stage import Stage
from deepseek_train.optim.groups import WeightGroup
from deepseek_train.parallel.expert.dispatcher import Dispatcher, flat, two_hop
from deepseek_train.parallel.mesh import ParallelMesh, ReplicaGroup, make_mesh
from deepseek_train.phases.parcel import arrived
from deepseek_train.phases.phase import fold
from deepseek_train.phases.recompute import Recomputation
from deepseek_train.phases.tape import Tape
from deepseek_train.phases.values import Hidden, MicroBatch
from deepseek_train.phases.wgrad import Weight, WeightGradQueue, allocate_main_grads, run_works
from deepseek_train.pipeline.executor import Executor, PreparedSchedule
from deepseek_train.pipeline.values import Boundary, LossScales
from deepseek_train.schedule.action import Placement, Schedule
from deepseek_train.schedule.auto import search
from deepseek_train.schedule.catalog import make_schedule
from deepseek_train.schedule.simulate import Durations
from deepseek_train.spec.layout import ParallelLayout
from deepseek_train.spec.stages import StageSpec, split_layers, stage_times, stage_weights
from deepseek_train.spec.weights import WeightSpec, all_weights
from deepseek_train.train.schedule_plan import placement_for

BATCH, LENGTH = 2, 8  # B, T
MODEL = ModelConfig(
    name="grid",
    vocab_size=64,
    hidden_size=32,
    num_layers=5,
    num_dense_layers=1,
    num_heads=2,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    q_lora_rank=16,
    kv_lora_rank=8,
    dense_ffn_size=48,
    num_routed_experts=8,
    num_shared_experts=1,
    expert_ffn_size=16,
    experts_per_token=4,
    num_expert_groups=4,
    expert_groups_per_token=2,
    routed_scale=2.5,
    mtp_depth=1,
    init_std=0.1,
)


@dataclass(frozen=True)
class Case:
    """A model on a grid of ranks. ``microbatches`` of each data-parallel rank."""

    schedule: str
    pp: int
    dp: int = 1
    ep: int = 1
    layers: int = 5
    mtp: int = 1
    microbatches: int = 8
    dense: int = 1  # leading layers without experts
    placed: str | None = None  # layers of each stage; None: stages of even cost
    tied: bool = False
    recompute: tuple[Forgettable, ...] = ()
    node: int | None = None  # ranks of a node; experts then take two hops
    base: ModelConfig = MODEL  # everything about the model that the fields above do not say
    mirrored: bool = False  # expert groups lie on mirrored pipeline ranks
    fp8: Fp8Config | None = None

    def __str__(self) -> str:
        names = f"{self.schedule}-pp{self.pp}dp{self.dp}ep{self.ep}{'mirrored' if self.mirrored else ''}"
        placed = f"({self.placed})" if self.placed else ""
        kinds = "".join(f"-{kind}" for kind in self.recompute) + ("-tied" if self.tied else "")
        kinds += f"-nodes of {self.node}" if self.node else ""
        kinds += f"-{self.base.name}" if self.base != MODEL else ""
        kinds += "-fp8" if self.fp8 else ""
        return (
            f"{names}-layers{self.layers}{placed}dense{self.dense}mtp{self.mtp}-m{self.microbatches}{kinds}"
        )

    @property
    def layout(self) -> ParallelLayout:
        return ParallelLayout(self.pp, self.dp, self.ep, self.mirrored)

    @property
    def model(self) -> ModelConfig:
        return replace(
            self.base,
            num_layers=self.layers,
            mtp_depth=self.mtp,
            num_dense_layers=self.dense,
            tie_embeddings=self.tied,
        )

    def fp8_with(self, queue: WeightGradQueue, recompute: Recomputation) -> Fp8 | None:
        return Fp8.of(self.fp8, ON_CPU, queue, recompute) if self.fp8 else None

    @property
    def specs(self) -> tuple[StageSpec, ...]:
        return split_layers(self.model, self.placement.num_stages, LENGTH, self.placed)

    @property
    def placement(self) -> Placement:
        return placement_for(ScheduleConfig(self.schedule), self.pp, self.microbatches)

    @property
    def steps(self) -> Schedule:
        """The schedule; of ``auto`` a short search for the times of this case's stages."""
        if self.schedule != "auto":
            return make_schedule(self.schedule, self.pp, self.microbatches)
        times = stage_times(self.model, self.specs, LENGTH)
        return search(self.placement, Durations(*times, overlapped=2.5), max_moves=200)

    @property
    def scales(self) -> LossScales:
        """Every loss counts, the balance loss far more than in training."""
        total = self.microbatches * self.dp
        return LossScales(1.0 / total, 0.3 / total, 0.1 / total)


def batch(m: ModelConfig, dp_rank: int, microbatch: int, step: int = 0) -> MicroBatch:
    """Micro-batch ``microbatch`` of ``dp_rank``: the same wherever it is asked for."""
    generator = torch.Generator().manual_seed((step * 100 + dp_rank) * 1000 + microbatch)
    return MicroBatch(torch.randint(0, m.vocab_size, (BATCH, LENGTH + 1 + m.mtp_depth), generator=generator))


@dataclass(frozen=True)
class OnGrid:
    """One rank's part of a case."""

    case: Case
    mesh: ParallelMesh
    stages: dict[int, Stage]
    queue: WeightGradQueue
    boundary: Boundary
    executor: Executor

    def weights(self) -> dict[str, tuple[WeightSpec, Weight, ReplicaGroup]]:
        """Each trained weight of this rank once, with the ranks that hold the same copy."""
        found = {}
        for index, stage in self.stages.items():
            tensors = stage.weights()
            for spec in stage_weights(self.case.model, stage.spec):
                if spec.trained:
                    replicas = (self.mesh.experts if spec.expert else self.mesh.dense)[index]
                    if spec.name == "embed":
                        assert self.mesh.embedding is not None
                        replicas = self.mesh.embedding
                    found[spec.name] = (spec, tensors[spec.name], replicas)
        return found

    def groups(self, weight_decay: float) -> list[WeightGroup]:
        """The optimizer's groups, as in ``train.build``: the same order on all ranks that share replicas."""
        found: dict[tuple[object, ...], list[tuple[WeightSpec, Weight, ReplicaGroup]]] = {}
        for spec, weight, replicas in self.weights().values():
            found.setdefault((replicas.ranks, spec.expert, spec.decayed), []).append((spec, weight, replicas))
        return [
            WeightGroup(
                {spec.name: weight for spec, weight, _ in members},
                members[0][2].group,
                weight_decay if members[0][0].decayed else 0.0,
            )
            for members in found.values()
        ]

    def with_new_executor(self) -> "OnGrid":
        """For stages whose phases have changed."""
        return replace(self, executor=Executor(self.stages, self.mesh.links, self.queue, self.boundary))

    def prepared(self) -> PreparedSchedule:
        return PreparedSchedule(self.case.steps, self.mesh.pp_rank)

    def batch_of(self, step: int = 0) -> Callable[[int], MicroBatch]:
        return lambda microbatch: batch(self.case.model, self.mesh.dp_rank, microbatch, step)

    def own_rows(self, whole: Tensor, spec: WeightSpec) -> Tensor:
        """This rank's part of a whole weight: all of it, or its experts."""
        return whole.chunk(self.case.ep)[self.mesh.expert_group.rank] if spec.expert else whole


def mesh_of(
    case: Case, rank: int, timeout_seconds: float = 600, *, check_splits: bool = True
) -> ParallelMesh:
    """``rank``'s groups (collective); cases of one layout can use them one after the other."""
    return make_mesh(
        case.layout,
        case.placement,
        rank,
        embeds=tuple(spec.index for spec in case.specs if spec.embeds),
        ranks_per_node=case.node,
        two_hop=case.node is not None,
        check_splits=check_splits,
        timeout_seconds=timeout_seconds,
    )


def on_mesh(case: Case, mesh: ParallelMesh, dtype: torch.dtype, dispatcher: Dispatcher) -> OnGrid:
    """One rank's part. The caller gives weights their ``main_grad``."""
    m, queue = case.model, WeightGradQueue()
    recompute = Recomputation(frozenset(case.recompute))
    fp8 = case.fp8_with(queue, recompute)
    context = ModelContext(m, queue, dispatcher, dtype=dtype, recompute=recompute, fp8=fp8)
    stages: dict[int, Stage] = {}
    embedding: Weight | None = None
    for index in case.placement.stages_of(mesh.pp_rank):
        spec = case.specs[index]
        stage = Stage(context, spec, LENGTH, embedding)
        embedding = stage.embed if spec.embeds else embedding
        init_stage(stage, m, seed=0)
        stages[index] = stage
    boundary = Boundary((BATCH, LENGTH, m.hidden_size), dtype, torch.device("cpu"))
    return OnGrid(case, mesh, stages, queue, boundary, Executor(stages, mesh.links, queue, boundary))


def on_grid(case: Case, rank: int, dtype: torch.dtype, timeout_seconds: float = 600) -> OnGrid:
    """Builds ``rank``'s part (collective). The caller gives weights their ``main_grad``."""
    mesh = mesh_of(case, rank, timeout_seconds)
    return on_mesh(case, mesh, dtype, (flat if case.node is None else two_hop)(mesh.expert_group))


def sum_gradients(grid: OnGrid) -> dict[str, Tensor]:
    """``main_grad`` summed over replicas (collective), all that have the same replicas at once."""
    shared: dict[tuple[int, ...], list[tuple[Weight, ReplicaGroup]]] = {}
    for _, weight, replicas in grid.weights().values():
        shared.setdefault(replicas.ranks, []).append((weight, replicas))
    for members in shared.values():
        total = torch.cat([weight.main_grad.flatten() for weight, _ in members])
        dist.all_reduce(total, group=members[0][1].group)
        for (weight, _), summed in zip(
            members, torch.split(total, [w.numel() for w, _ in members]), strict=True
        ):
            weight.main_grad.copy_(summed.view_as(weight))
    return {name: weight.main_grad for name, (_, weight, _) in grid.weights().items()}


class Plain:
    """The whole model in one process; micro-batches one after another, no schedule, no links, no executor."""

    def __init__(self, case: Case, dtype: torch.dtype, grads: torch.dtype) -> None:
        self.case, self.queue = case, WeightGradQueue()
        (spec,) = split_layers(case.model, 1)
        fp8 = case.fp8_with(self.queue, Recomputation())
        self.stage = Stage(ModelContext(case.model, self.queue, dtype=dtype, fp8=fp8), spec, LENGTH)
        init_stage(self.stage, case.model, seed=0)
        self.weights = self.stage.weights()
        self.specs = {spec.name: spec for spec in all_weights(case.model)}
        allocate_main_grads(list(self.weights.values()), grads)

    def microbatches(self) -> Iterator[tuple[int, int]]:
        """(data-parallel rank, micro-batch) of the whole global batch."""
        return ((d, m) for d in range(self.case.dp) for m in range(self.case.microbatches))

    def train(self, step: int = 0) -> dict[tuple[int, int], Hidden]:
        """Forward and backward of a global batch; gradients are added to ``main_grad``."""
        return {(d, m): self._one(batch(self.case.model, d, m, step)) for d, m in self.microbatches()}

    def _one(self, batch: MicroBatch) -> Hidden:
        tape, scales = Tape(), self.case.scales
        value: MicroBatch | Hidden = batch
        for phase in self.stage.phases:
            value = tape.run(phase, value)
        value = arrived(value)
        assert isinstance(value, Hidden)
        ledger = value.ledger
        tape.seed([None, *scales.gradients(ledger)])
        while len(tape):
            tape.backward()
        run_works(self.queue.take_open())
        return value

    @torch.no_grad()
    def evaluate(self, step: int = 0) -> dict[tuple[int, int], Hidden]:
        return {
            (d, m): fold(self.stage.phases, batch(self.case.model, d, m, step))
            for d, m in self.microbatches()
        }
