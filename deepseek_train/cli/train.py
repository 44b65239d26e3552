"""``deepseek-train [key=value ...]``: pretrain.

Under torchrun it joins the ranks that torchrun started; otherwise it starts its own on this machine (pp x dp, from the
configuration). Exit code 2: the configuration, the data or the launch is wrong, nothing was started.
"""

import os
import sys
import warnings
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from deepseek_train.cli.compose import compose_config
from deepseek_train.cli.launch_local import launch
from deepseek_train.config.parse import ConfigError, Problem
from deepseek_train.config.schema import RunConfig
from deepseek_train.data.errors import DataError
from deepseek_train.data.manifest import MANIFEST_FILE
from deepseek_train.data.prepare import prepare
from deepseek_train.parallel.rendezvous import RendezvousError, join
from deepseek_train.train.build import build
from deepseek_train.train.folder import config_yaml, open_folder
from deepseek_train.train.loop import train
from deepseek_train.train.preflight import preflight, resolve_layout

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
    speaks = os.environ.get("RANK", "0") == "0"
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
        if speaks:
            print(error, file=sys.stderr)
        return 2
    layout = resolve_layout(config, world_size)
    if under_torchrun or layout.world == 1:
        return rank_main(argv)
    return launch(
        "deepseek_train.cli.train:rank_main",
        argv,
        layout.world,
        preload=["deepseek_train.cli.train"],
        threads_per_rank=config.cluster.threads_per_rank,
    )


def rank_main(argv: list[str]) -> int:
    """One rank, once the configuration is known to be sound."""
    # torch 2.13 renames collectives that DeepSpeed calls by their old names.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|deepspeed)\..*")
    config = compose_config(argv)
    device = choose_device(config)
    if device == "cpu":
        torch.set_num_threads(config.cluster.threads_per_rank)
    cluster = config.cluster
    layout = resolve_layout(config, int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ else None)
    try:
        place = join(device, layout.world, cluster.rendezvous_seconds, cluster.timeout_seconds)
    except RendezvousError as error:
        print(error, file=sys.stderr)
        return 2
    try:
        if place.rank == 0:
            open_folder(config)
        dist.barrier()
        train(build(config, layout, place), Path(config.run_dir))
    finally:
        dist.destroy_process_group()
    return 0


def choose_device(config: RunConfig) -> Literal["cpu", "cuda"]:
    """GPUs where there are any, unless the configuration says otherwise."""
    if config.cluster.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return config.cluster.device


def prepare_data(config: RunConfig, *, under_torchrun: bool) -> None:
    """Makes missing shards from ``data.source``; ranks that torchrun started on many machines do not race for it."""
    if (Path(config.data.path) / MANIFEST_FILE).exists():
        return
    if under_torchrun:
        raise ConfigError(
            [
                Problem(
                    "data.path",
                    f"{config.data.path} holds no prepared data",
                    f"Once, on one machine: deepseek-data prepare data.path={config.data.path} "
                    f"data.source={config.data.source}",
                )
            ]
        )
    print(f"preparing {config.data.source} data in {config.data.path}", flush=True)
    prepare(config.data, config.model.vocab_size, progress=True)


if __name__ == "__main__":
    main()
