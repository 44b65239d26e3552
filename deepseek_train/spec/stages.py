"""Layers -> pipeline stages: which weights each stage of the model holds."""

from dataclasses import dataclass

from deepseek_train.config.schema import ModelConfig
from deepseek_train.spec import weights as table
from deepseek_train.spec.weights import WeightSpec


@dataclass(frozen=True)
class StageSpec:
    """One pipeline stage: consecutive transformer layers; the first embeds, the last has head and MTP modules."""

    index: int
    layers: tuple[int, ...]
    first: bool
    last: bool
    mtp_depth: int  # MTP modules in this stage

    @property
    def embeds(self) -> bool:
        """Whether the stage holds the embedding: the first, and the last when its MTP modules embed tokens too."""
        return self.first or self.mtp_depth > 0


def split_layers(m: ModelConfig, num_stages: int) -> tuple[StageSpec, ...]:
    """Contiguous, as even as can be; an MTP module counts as one layer of the last stage, longer stages come first.
    Every stage holds at least one layer (num_layers >= num_stages)."""
    last = max(1, (m.num_layers + m.mtp_depth) // num_stages - m.mtp_depth)
    rest, others = m.num_layers - last, num_stages - 1
    sizes = [rest // others + (s < rest % others) for s in range(others)] + [last]
    starts = [sum(sizes[:s]) for s in range(num_stages + 1)]
    return tuple(
        StageSpec(
            index=s,
            layers=tuple(range(starts[s], starts[s + 1])),
            first=s == 0,
            last=s == num_stages - 1,
            mtp_depth=m.mtp_depth if s == num_stages - 1 else 0,
        )
        for s in range(num_stages)
    )


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
