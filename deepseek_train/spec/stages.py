"""Layers -> pipeline stages: which weights each stage of the model holds, and how much work it is."""

from collections.abc import Sequence
from dataclasses import dataclass

from deepseek_train.config.schema import ModelConfig
from deepseek_train.spec import weights as table
from deepseek_train.spec import work
from deepseek_train.spec.layers import layers_text, parse_layers
from deepseek_train.spec.partition import even_parts
from deepseek_train.spec.weights import WeightSpec
from deepseek_train.spec.work import Work


@dataclass(frozen=True)
class StageSpec:
    """One pipeline stage: consecutive transformer layers; the first embeds, the last has head and MTP modules. These
    two may have no layers."""

    index: int
    layers: tuple[int, ...]
    first: bool
    last: bool
    mtp_depth: int  # MTP modules in this stage
    embeds: bool  # holds the embedding: the first, and the last where MTP modules or a tied head use it too


def most_stages(m: ModelConfig) -> int:
    """Stages that the layers can be spread over: all but the first and the last need one."""
    return m.num_layers + 2


def split_layers(
    m: ModelConfig, num_stages: int, sequence_length: int = 4096, layers: str | None = None
) -> tuple[StageSpec, ...]:
    """Contiguous stages, as ``layers`` says ("3|4*14|2", see ``spec.layers``), else of even cost: the dearest stage as
    cheap as can be, embedding, head and MTP modules weighed with the layers by ``spec.work``.

    Raises ConfigError where ``layers`` does not fit, ValueError where there are more than ``most_stages``.
    """
    if num_stages > most_stages(m):
        raise ValueError(f"{m.num_layers} layers fill at most {most_stages(m)} stages, not {num_stages}")
    sizes = _even_sizes(m, num_stages, sequence_length)
    if layers is not None:
        sizes = parse_layers(layers, m.num_layers, num_stages, example=layers_text(sizes))
    starts = [sum(sizes[:s]) for s in range(num_stages + 1)]
    last = num_stages - 1
    return tuple(
        StageSpec(
            index=s,
            layers=tuple(range(starts[s], starts[s + 1])),
            first=s == 0,
            last=s == last,
            mtp_depth=m.mtp_depth if s == last else 0,
            embeds=s == 0 or (s == last and (m.mtp_depth > 0 or m.tie_embeddings)),
        )
        for s in range(num_stages)
    )


def _even_sizes(m: ModelConfig, num_stages: int, sequence_length: int) -> tuple[int, ...]:
    costs = [work.layer(m, index, sequence_length).total for index in range(m.num_layers)]
    after = work.head(m).total + m.mtp_depth * work.mtp(m, sequence_length).total
    return even_parts(costs, num_stages, before=work.embedding(m).total, after=after)


def stage_weights(m: ModelConfig, stage: StageSpec) -> tuple[WeightSpec, ...]:
    """The weights ``stage`` uses, in order; the embedding may belong to two stages."""
    found = table.embedding(m) if stage.embeds else ()
    for index in stage.layers:
        found += table.layer(m, index)
    if stage.last:
        found += table.head(m)
    for depth in range(stage.mtp_depth):
        found += table.mtp(m, depth)
    return found


def stage_work(m: ModelConfig, stage: StageSpec, sequence_length: int) -> Work:
    """Operations of one token in ``stage``."""
    total = work.embedding(m) if stage.first else Work()
    for index in stage.layers:
        total += work.layer(m, index, sequence_length)
    if stage.last:
        total += work.head(m)
    for _ in range(stage.mtp_depth):
        total += work.mtp(m, sequence_length)
    return total


def stage_times(
    m: ModelConfig, stages: Sequence[StageSpec], sequence_length: int
) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]:
    """What forward, input gradients and weight gradients of a micro-batch take in each stage by their operations alone,
    in units of the mean forward: what ``simulate.Durations`` takes."""
    works = [stage_work(m, stage, sequence_length) for stage in stages]
    unit = sum(w.forward for w in works) / len(works)
    return (
        tuple(w.forward / unit for w in works),
        tuple(w.backward_input / unit for w in works),
        tuple(w.backward_weight / unit for w in works),
    )
