"""``deepseek-train [key=value ...]``: pretrain.

Under torchrun it joins the ranks that torchrun started; otherwise it starts its own on this machine (pp x dp, from the
configuration). Exit code 2: the configuration, the data or the launch is wrong, nothing was started.

This half of the command is light: torch and DeepSpeed are imported only where ranks run, so mistakes are told at once.
"""

import os
import sys
from pathlib import Path

from deepseek_train.cli.compose import compose_config
from deepseek_train.cli.launch_local import launch
from deepseek_train.cli.local_rank import call
from deepseek_train.config.parse import ConfigError, Problem
from deepseek_train.config.schema import RunConfig
from deepseek_train.data.errors import DataError
from deepseek_train.data.manifest import MANIFEST_FILE
from deepseek_train.data.prepare import prepare
from deepseek_train.train.folder import config_yaml
from deepseek_train.train.preflight import preflight, resolve_layout

RANK = "deepseek_train.cli.train_rank"

USAGE = """usage: deepseek-train [experiment=tiny] [key=value ...] [--cfg]

  deepseek-train experiment=tiny parallel.pp=2 parallel.ep=2      start local ranks and train
  torchrun --nproc-per-node 8 -m deepseek_train.cli.train ...     join torchrun's ranks
  deepseek-train experiment=tiny --cfg                            print the whole resolved configuration
"""


def main() -> None:
    """Console entry point."""
    sys.exit(run(sys.argv[1:]))


def run(argv: list[str]) -> int:
    """The command; returns its exit code."""
    if {"-h", "--help"} & set(argv):
        print(USAGE)
        return 0
    under_torchrun = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    world_size = int(os.environ["WORLD_SIZE"]) if under_torchrun else None
    try:
        config = compose_config([a for a in argv if a != "--cfg"])
        if "--cfg" in argv:
            print(config_yaml(config), end="")
            return 0
        problems = preflight(config, world_size)
        if problems:
            raise ConfigError(problems)
        prepare_data(config, under_torchrun=under_torchrun)
    except (ConfigError, DataError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(error, file=sys.stderr)
        return 2
    layout = resolve_layout(config, world_size)
    if under_torchrun or layout.world == 1:
        return call(f"{RANK}:rank_main", argv)
    threads = config.cluster.threads_per_rank
    return launch(f"{RANK}:rank_main", argv, layout.world, preload=[RANK], threads_per_rank=threads)


def prepare_data(config: RunConfig, *, under_torchrun: bool) -> None:
    """Makes missing shards from ``data.source``; ranks that torchrun started on many machines do not race for it."""
    if (Path(config.data.path) / MANIFEST_FILE).exists():
        return
    if under_torchrun:
        command = f"deepseek-data prepare data.path={config.data.path} data.source={config.data.source}"
        what = f"{config.data.path} holds no prepared data"
        raise ConfigError([Problem("data.path", what, f"Once, on one machine: {command}")])
    print(f"preparing {config.data.source} data in {config.data.path}", flush=True)
    prepare(config.data, config.model.vocab_size, progress=True)


if __name__ == "__main__":
    main()
