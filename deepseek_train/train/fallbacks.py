"""Which of the planned layouts this start has: the first one for as many ranks as there are."""

from deepseek_train.config.fallbacks import variants
from deepseek_train.config.schema import RunConfig
from deepseek_train.spec.layout import ParallelLayout


def resolve_layout(config: RunConfig, world_size: int | None) -> ParallelLayout:
    """The grid of ranks; ``world_size`` is what torchrun started, None when we start our own ranks."""
    p = config.parallel
    fewest = p.ep // 2 if p.ep_across_mirrors else p.ep
    dp = p.dp or (max(1, world_size // p.pp) if world_size else fewest)
    return ParallelLayout(pp=p.pp, dp=dp, ep=p.ep, mirrored=p.ep_across_mirrors)


def fitting(config: RunConfig, world_size: int | None) -> RunConfig:
    """``config`` in the first of its layouts that ``world_size`` ranks make up; as it is where none is, or where
    torchrun has started nobody. Its rules hold (``config.check``)."""
    return next((one for one in variants(config) if world_size and fits(one, world_size)), config)


def fits(config: RunConfig, world_size: int) -> bool:
    """Whether ``world_size`` ranks are what the layout asks for."""
    layout = resolve_layout(config, world_size)
    return layout.world == world_size and layout.sharers % layout.ep == 0
