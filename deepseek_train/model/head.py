"""The ends of the model: embedding phase, output head with its loss, multi-token prediction.

Legend: B sequences, T positions, N = B T, D hidden, V vocabulary.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from deepseek_kernels.loss import cross_entropy_
from deepseek_train.model.block import MoeBlock
from deepseek_train.model.context import ModelContext
from deepseek_train.model.embed import embed
from deepseek_train.model.linear import linear
from deepseek_train.model.norm import forgettable_norm, rms_norm
from deepseek_train.model.project import project
from deepseek_train.phases.phase import Phase, Row, under
from deepseek_train.phases.values import Hidden
from deepseek_train.phases.wgrad import Weight
from deepseek_train.schedule.overlap import Role


class _CrossEntropy(Function):
    """Saves the gradient alone, in the memory of the logits: they are the largest tensor there is in a training
    step."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, labels_N: Tensor, backend: str) -> Tensor:
        loss_N = cross_entropy_(logits_NV, labels_N, 1.0 / len(labels_N), backend=backend)
        ctx.save_for_backward(logits_NV.detach())
        return loss_N.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (d_logits_NV,) = ctx.saved_tensors
        # Of one dimension more than none ``dy`` keeps its precision: BF16 gradients are rounded after the product.
        return d_logits_NV.mul_(dy.unsqueeze(0)), None, None


def cross_entropy(logits_BTV: Tensor, labels_BT: Tensor, backend: str) -> Tensor:
    """Mean over all positions, in FP32 (FP64 for FP64 logits). Overwrites the logits; its backward runs once."""
    return _CrossEntropy.apply(logits_BTV.flatten(0, 1), labels_BT.flatten(), backend)


class Head(nn.Module):
    """Final norm, output projection and next-token loss. Passes the *normalised* hidden state on: MTP starts there.
    ``tied`` is the embedding, where that is the output projection too."""

    def __init__(self, context: ModelContext, tied: Weight | None = None) -> None:
        super().__init__()
        self.context, self.queue = context, context.queue
        self.final_norm = context.weight(context.model.hidden_size)
        shape = context.model.vocab_size, context.model.hidden_size
        self.weight = context.weight(*shape) if tied is None else tied

    def normed(self, x_BTD: Tensor) -> Tensor:
        return forgettable_norm(x_BTD, self.final_norm, self.context)

    def logits(self, normed_BTD: Tensor) -> Tensor:
        return linear(normed_BTD, self.weight, self.queue, self.context.kernels.wgrad)

    def loss(self, hidden: Hidden) -> Hidden:
        assert hidden.batch is not None
        normed_BTD = self.normed(hidden.x_BTD)
        labels_BT = hidden.batch.tokens[:, 1 : 1 + normed_BTD.shape[1]]
        loss = cross_entropy(self.logits(normed_BTD), labels_BT, self.context.kernels.loss)
        return replace(hidden, x_BTD=normed_BTD, ledger=replace(hidden.ledger, main=loss))


class MtpModule(nn.Module):
    """Multi-token prediction module ``depth`` (V3 report section 2.2): from the hidden state at i and the embedding of
    token i + depth + 1, one MoE block predicts token i + depth + 2. Embedding and head are the main model's own
    tensors. The embedding comes first in the concatenation, as in the published weights (V3_SPEC A.7)."""

    def __init__(
        self, context: ModelContext, depth: int, turns_TR2: Tensor, embedding: Weight, head: Head
    ) -> None:
        super().__init__()
        m = context.model
        self.m, self.depth, self.context = m, depth, context
        self.embed_norm = context.weight(m.hidden_size)
        self.hidden_norm = context.weight(m.hidden_size)
        self.join = context.weight(m.hidden_size, 2 * m.hidden_size)
        self.block = MoeBlock(context, m.num_layers + depth, turns_TR2)
        self.final_norm = context.weight(m.hidden_size)
        self.shared = (embedding, head)  # a tuple: not registered as this module's own weights

    def phases(self) -> Row:
        name = f"mtp{self.depth}"
        ends = Phase("join", Role.ATTEND, self.joined), Phase("loss", Role.ATTEND, self.loss)
        return under(name, (ends[0], *self.block.phases(), ends[1]))

    def joined(self, hidden: Hidden) -> Hidden:
        assert hidden.batch is not None
        length, start, queue = hidden.x_BTD.shape[1], self.depth + 1, self.context.queue
        embedded_BTD = embed(hidden.batch.tokens[:, start : start + length], self.shared[0], queue)
        both = self.context.recompute.region("norm", self._normed, embedded_BTD, hidden.x_BTD)
        return hidden.moved_to(project(both, self.join, self.context))

    def _normed(self, embedded_BTD: Tensor, x_BTD: Tensor) -> Tensor:
        how = self.m.norm_eps, self.context.queue, self.context.kernels.norm
        normed = rms_norm(embedded_BTD, self.embed_norm, *how), rms_norm(x_BTD, self.hidden_norm, *how)
        return torch.cat(normed, -1)

    def logits(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised hidden state and logits."""
        normed_BTD = forgettable_norm(x_BTD, self.final_norm, self.context)
        return normed_BTD, self.shared[1].logits(normed_BTD)

    def loss(self, hidden: Hidden) -> Hidden:
        assert hidden.batch is not None
        normed_BTD, logits_BTV = self.logits(hidden.x_BTD)
        start, length = self.depth + 2, normed_BTD.shape[1]
        labels_BT = hidden.batch.tokens[:, start : start + length]
        loss = cross_entropy(logits_BTV, labels_BT, self.context.kernels.loss) / self.m.mtp_depth
        total = loss if hidden.ledger.mtp is None else hidden.ledger.mtp + loss
        return replace(hidden, x_BTD=normed_BTD, ledger=replace(hidden.ledger, mtp=total))
