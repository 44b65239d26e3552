"""What a launch of the tiny experiment is told."""

from deepseek_train.cli.compose import compose_config
from deepseek_train.config.schema import RunConfig
from deepseek_train.train.preflight import preflight


def tiny(*overrides: str) -> RunConfig:
    """Three layers, EP2."""
    return compose_config(["experiment=tiny", *overrides])


def told(*overrides: str) -> list[tuple[str, str]]:
    return [(p.where, f"{p.what} -> {p.mend}") for p in preflight(tiny(*overrides), None)]
