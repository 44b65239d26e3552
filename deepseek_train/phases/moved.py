"""A route under autograd: there in the forward pass, back in the backward pass, waited for both times."""

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from deepseek_train.phases.parcel import Route, Stay, Tensors


class _Moved(Function):
    @staticmethod
    def forward(ctx: Any, route: Route, *tensors: Tensor) -> Tensors:
        ctx.route = route
        arrived = route.start(tuple(t.detach() for t in tensors)).wait()
        still = [a for a, t in zip(arrived, tensors, strict=True) if not t.requires_grad]
        ctx.mark_non_differentiable(*still)
        return arrived

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        sent = tuple(g for g, n in zip(gradients, needed, strict=True) if n)
        back = iter(ctx.route.back().start(sent).wait())
        return (None, *(next(back) if n else None for n in needed))


def moved(route: Route, tensors: Tensors) -> Tensors:
    """What arrives of ``tensors`` by ``route`` (collective, and so is the backward pass)."""
    if isinstance(route, Stay):
        return tensors
    arrived: Tensors = _Moved.apply(route, *tensors)
    return arrived
