"""One pipeline stage as a module and as its list of phases.

Legend: B sequences, T positions, D hidden, V vocabulary, R rope pairs.
"""

from collections.abc import Iterator

from torch import Tensor, nn

from deepseek_train.model.block import DenseBlock, MoeBlock
from deepseek_train.model.context import ModelContext
from deepseek_train.model.embed import embed
from deepseek_train.model.head import Head, MtpModule
from deepseek_train.model.rope import rotations
from deepseek_train.model.router import Router
from deepseek_train.phases.phase import Phase, Row, fold
from deepseek_train.phases.values import Hidden, MicroBatch
from deepseek_train.phases.wgrad import Weight
from deepseek_train.schedule.overlap import Role
from deepseek_train.spec.stages import StageSpec


class Stage(nn.Module):
    """Consecutive layers; the first stage also embeds, the last has head and MTP modules.

    The value entering the first stage is a ``MicroBatch``, any other a ``Hidden``; a ``Hidden`` leaves it. Parameter
    names are those of ``spec.weights``. ``embedding`` is given where a rank shares one tensor between two stages.
    """

    def __init__(
        self, context: ModelContext, spec: StageSpec, length: int, embedding: Weight | None = None
    ) -> None:
        super().__init__()
        m = context.model
        self.spec, self.context = spec, context
        self.trunk: Row = ()  # up to the last block
        self.losses: Row = ()  # head and MTP
        turns_TR2 = rotations(m, length, context.device)
        if spec.embeds:
            self.embed = embedding if embedding is not None else context.weight(m.vocab_size, m.hidden_size)
        if spec.first:
            self.trunk += (Phase("embed", Role.ATTEND, self.embedded),)
        self.layers = nn.ModuleDict()
        for index in spec.layers:
            dense = index < m.num_dense_layers
            block = DenseBlock(context, turns_TR2) if dense else MoeBlock(context, index, turns_TR2)
            self.layers[str(index)] = block
            self.trunk += block.phases()
        self.mtp = nn.ModuleDict()
        if spec.last:
            self.head = Head(context, self.embed if m.tie_embeddings else None)
            self.losses += (Phase("head", Role.ATTEND, self.head.loss),)
        for depth in range(spec.mtp_depth):
            module = MtpModule(context, depth, turns_TR2, self.embed, self.head)
            self.mtp[str(depth)] = module
            self.losses += module.phases()
        self.trunk, self.losses = context.recompute.row(self.trunk), context.recompute.row(self.losses)

    @property
    def phases(self) -> Row:
        return self.trunk + self.losses

    def embedded(self, batch: MicroBatch) -> Hidden:
        length = batch.tokens.shape[1] - 1 - self.context.model.mtp_depth
        x_BTD = embed(batch.tokens[:, :length], self.embed, self.context.queue)
        return Hidden(x_BTD, batch if self.spec.last else None)

    def forward(self, value: MicroBatch | Hidden) -> Hidden:
        """All phases in order."""
        return fold(self.phases, value)

    def logits(self, hidden: Hidden) -> Tensor:
        """Next-token logits [B, T, V] of the last stage for the trunk's output."""
        return self.head.logits(self.head.normed(hidden.x_BTD))

    def weights(self) -> dict[str, Weight]:
        """Trained weights by their name in ``spec.weights``."""
        return {_table_name(name): w for name, w in self.named_parameters() if isinstance(w, Weight)}

    def routers(self) -> Iterator[tuple[int, Router]]:
        """(layer index, router) of every MoE layer; MTP modules count on from num_layers."""
        for module in self.modules():
            if isinstance(module, MoeBlock):
                yield module.index, module.router


def _table_name(name: str) -> str:
    """The head's module keeps its two weights together; in the table they stand on their own. A tied head's matrix
    goes by its first name, the embedding's."""
    return {"head.final_norm": "final_norm", "head.weight": "head"}.get(name, name)
