"""``compose_config`` for tests, also where the project is not installed and its YAML files are no package."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

if importlib.util.find_spec("deepseek_train_configs") is None:
    configs = ModuleType("deepseek_train_configs")
    configs.__path__ = [str(Path(__file__).parents[2] / "configs")]
    sys.modules[configs.__name__] = configs

from deepseek_train.cli.compose import compose_config

__all__ = ["compose_config"]
