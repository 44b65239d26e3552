"""``deepseek-train [key=value ...]``: pretrain.

Under torchrun it joins the ranks that torchrun started; otherwise it starts its own on this machine (pp x dp, from the
configuration). Exit codes: ``config.exit_codes``; 2: the configuration, the data or the launch is wrong, nothing was
started.

This half of the command is light: torch and DeepSpeed are imported only where ranks run, so mistakes are told at once.
"""

import os
import sys
from dataclasses import asdict
from pathlib import Path

from deepseek_train.cli.compose import compose_config
from deepseek_train.cli.launch_local import launch
from deepseek_train.cli.local_rank import call
from deepseek_train.cli.orphan import leave_after, torchrun_vanishes
from deepseek_train.cli.tell import tell
from deepseek_train.cli.train_help import SHORT, full_help
from deepseek_train.config.exit_codes import ExitCode
from deepseek_train.config.parse import ConfigError, Problem
from deepseek_train.config.schema import DataConfig, RunConfig
from deepseek_train.config.storage import storage_failed
from deepseek_train.data.errors import DataError
from deepseek_train.data.manifest import MANIFEST_FILE
from deepseek_train.data.prepare import prepare
from deepseek_train.monitor.streams import safe_streams
from deepseek_train.spec.layout import ParallelLayout
from deepseek_train.train.data_plan import data_problems
from deepseek_train.train.device import local_ranks, memory_problems, planned_device, visible_gpus
from deepseek_train.train.expert_plan import node_problems
from deepseek_train.train.fallbacks import fitting, resolve_layout
from deepseek_train.train.folder import config_yaml
from deepseek_train.train.preflight import preflight

RANK = "deepseek_train.cli.train_rank"


def main() -> None:
    """Console entry point."""
    sys.exit(run(sys.argv[1:]))


def run(argv: list[str]) -> int:
    """The command; returns its exit code."""
    with safe_streams():
        return _run(argv)


def _run(argv: list[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print(full_help())
        return 0
    if not argv:
        tell(
            f"{SHORT}\nNothing is asked for: begin with experiment=tiny. deepseek-train --help tells all there is."
        )
        return ExitCode.USER_ERROR
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking for GPUs must not start CUDA
    under_torchrun = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    world_size = int(os.environ["WORLD_SIZE"]) if under_torchrun else None
    try:
        config = compose_config([a for a in argv if a != "--cfg"])
        if "--cfg" in argv:
            print(config_yaml(config), end="")
            return 0
        problems = preflight(config, world_size)
        if under_torchrun:
            here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
            problems += node_problems(config, int(os.environ["WORLD_SIZE"]), here)
        if problems:
            raise ConfigError(problems)
        asked, config = config, fitting(config, world_size)
        if config is not asked and os.environ.get("RANK") == "0":
            print(f"{world_size} ranks were started: a layout of parallel.fallbacks is taken", flush=True)
        layout = resolve_layout(config, world_size)
        choose_device(config, layout)
        prepare_data(config, layout, under_torchrun=under_torchrun)
    except (ConfigError, DataError, OSError) as error:
        see_to = ". See to that place, or name another." if isinstance(error, OSError) else ""
        tell(f"{error}{see_to}")
        storage = error.storage if isinstance(error, ConfigError) else storage_failed(error)
        return ExitCode.STORAGE if storage else ExitCode.USER_ERROR
    if "TORCHELASTIC_RUN_ID" in os.environ:
        leave_after(torchrun_vanishes)
    if under_torchrun or layout.world == 1:
        return call(f"{RANK}:rank_main", argv)
    return launch(
        f"{RANK}:rank_main",
        argv,
        layout.world,
        preload=[RANK],
        threads_per_rank=config.cluster.threads_per_rank,
        max_restarts=config.cluster.max_restarts,
        again=[*argv, "resume=auto"],  # resume=never has been done
    )


def choose_device(config: RunConfig, layout: ParallelLayout) -> None:
    """Hides the GPUs of this machine from everything below where the run is to use CPUs: because it says so, or, with
    device=auto, because there are fewer GPUs than ranks. Raises ConfigError where neither can hold it."""
    ranks, gpus, device = local_ranks(layout), visible_gpus(), config.cluster.device
    if device == "cuda" and gpus < ranks:
        what = f"cuda is asked for, but there are {gpus} GPUs for {ranks} ranks on this machine"
        raise ConfigError([Problem("cluster.device", what, "Write auto or cpu, or start fewer ranks.")])
    if device == "auto" and 0 < gpus < ranks:
        print(f"{gpus} GPUs for {ranks} ranks: running on CPUs", flush=True)
    if planned_device(device, layout) == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        if too_much := memory_problems(config, layout):
            raise ConfigError(too_much)


def prepare_data(config: RunConfig, layout: ParallelLayout, *, under_torchrun: bool) -> None:
    """Makes missing shards from ``data.source``; ranks that torchrun started on many machines do not race for it."""
    if (Path(config.data.path) / MANIFEST_FILE).exists():
        return
    if under_torchrun:
        default = DataConfig(path="")
        settings = {
            name: value for name, value in asdict(config.data).items() if value != getattr(default, name)
        }
        command = " ".join(
            ["deepseek-data prepare", *(f"data.{name}={value}" for name, value in settings.items())]
        )
        what = f"{config.data.path} holds no prepared data"
        raise ConfigError([Problem("data.path", what, f"Once, on one machine: {command}")])
    if config.data.source is None:
        what = f"{config.data.path} holds no prepared data, and data.source names no text to prepare"
        raise ConfigError(
            [Problem("data.path", what, "Name another folder, or the text: data.source=FOLDER")]
        )
    print(f"preparing {config.data.source} data in {config.data.path}", flush=True)
    prepare(config.data, config.model.vocab_size, progress=True)
    if problems := data_problems(config, layout):
        raise ConfigError(problems)


if __name__ == "__main__":
    main()
