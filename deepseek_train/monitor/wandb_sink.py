"""Weights & Biases, optional and never in the way: whatever it throws, training goes on."""

import importlib
import netrc
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse
from urllib.request import getproxies

from deepseek_train.monitor.metrics import EvalMetrics, StepMetrics
from deepseek_train.spec.links import ExpertTraffic

REACH_SECONDS = 3.0  # for a first answer; wandb itself would try for 25


class WandbSink:
    """Sends each step to an opened wandb run; the first exception is printed and turns the sink off."""

    def __init__(self, run: Any) -> None:
        self._run = run
        self._broken = False
        self.run_id: str = run.id  # to be kept in checkpoints, and given to ``open_wandb`` on resume

    def step(self, metrics: StepMetrics) -> None:
        record = {
            "step": metrics.step,
            "tokens": metrics.tokens,
            "train/loss": metrics.loss,
            "train/mtp_loss": metrics.mtp_loss,
            "train/balance_loss": metrics.balance_loss,
            "train/grad_norm": metrics.grad_norm,
            "train/lr": metrics.lr,
            "train/batch_size": metrics.batch_size,
            "train/skipped": int(metrics.skipped),
            "train/skipped_steps": metrics.skipped_steps,
            "train/load_max_over_mean": metrics.load_max_over_mean(),
            "max_violation/worst": metrics.worst_max_violation(),
            "max_violation/mean": metrics.mean_max_violation(),
            "speed/step_seconds": metrics.step_seconds,
            "speed/tokens_per_second": metrics.tokens_per_second,
            "speed/tflops": metrics.tflops,
            "speed/mfu": metrics.mfu,
            "speed/memory_bytes": metrics.memory_bytes,
            "speed/replica_check_seconds": metrics.replica_check_seconds,
            **_traffic(metrics.expert_traffic),
            **{f"max_violation/layer_{layer:02}": v for layer, v in metrics.max_violations().items()},
        }
        self._log({name: value for name, value in record.items() if value is not None})

    def evaluation(self, metrics: EvalMetrics) -> None:
        record = {
            "step": metrics.step,
            "tokens": metrics.tokens,
            "validation/loss": metrics.loss,
            "validation/mtp_loss": metrics.mtp_loss,
            "validation/ema_loss": metrics.ema_loss,
        }
        self._log({name: value for name, value in record.items() if value is not None})

    def rewind(self, step: int) -> None:
        """wandb keeps what it was sent: curves over "step" go back and are drawn once more."""

    def close(self) -> None:
        if self._broken:
            return
        try:
            self._run.finish()
        except Exception as error:
            self._give_up(error)

    def _log(self, record: dict[str, Any]) -> None:
        if self._broken:
            return
        try:
            self._run.log(record)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._broken = True
        _warn(f"turned off for the rest of this run: {type(error).__name__}: {error}")


def _traffic(sent: ExpertTraffic | None) -> dict[str, float]:
    if sent is None:
        return {}
    kinds = {"dispatch": sent.dispatch, "combine": sent.combine, "plan": sent.plan}
    found = {f"expert_bytes/{name}_{link}": n for name, of in kinds.items() for link, n in asdict(of).items()}
    over_least = sent.over_least()
    return found if over_least is None else {**found, "expert_bytes/cross_over_least": over_least}


def open_wandb(
    mode: Literal["auto", "offline", "online", "off"],
    project: str,
    name: str,
    run_dir: Path,
    config: Mapping[str, Any],
    run_id: str | None = None,
) -> WandbSink | None:
    """Starts or, given the ``run_id`` of a checkpoint, continues a run; its files go to ``run_dir/wandb``.

    "auto" is online with an API key, offline without. Online that fails (up to 25 s; where nothing answers, 3 s) falls
    back to offline with one warning. None for "off", and, with a warning, when wandb is missing or will not
    even start offline.
    """
    if mode == "off":
        return None
    try:
        # not at the top of the file: the import takes a second, on every rank, and most runs do without
        wandb = importlib.import_module("wandb")
    except ImportError:
        _warn(
            "not installed, nothing is sent (pip install 'deepseek-train[wandb]', or set monitor.wandb=off)"
        )
        return None

    run_dir.mkdir(parents=True, exist_ok=True)  # else wandb picks a temporary folder

    def start(how: str) -> WandbSink:
        run = wandb.init(
            project=project,
            name=name,
            id=run_id,
            resume="allow" if run_id and how == "online" else None,
            dir=str(run_dir),
            config=dict(config),
            mode=how,
            settings=wandb.Settings(silent=True, console="off", init_timeout=15),
        )
        # an axis of our own: wandb's counter refuses the steps that a resumed run repeats
        run.define_metric("*", step_metric="step")
        return WandbSink(run)

    attempts = ["offline"]
    if mode != "offline" and _has_api_key():
        if silent := _unreachable():
            _warn(f"could not start online: {silent}; writing offline, send it later with `wandb sync`")
        else:
            attempts.insert(0, "online")
    elif mode == "online":
        _warn("no API key (WANDB_API_KEY or `wandb login`); writing offline, send it later with `wandb sync`")
    for how in attempts:
        try:
            return start(how)
        except Exception as error:
            _warn(f"could not start {how}: {type(error).__name__}: {error}")
    return None


def _server() -> tuple[str, int]:
    """Host and port."""
    url = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    return url.hostname or "", url.port or (80 if url.scheme == "http" else 443)


def _unreachable() -> str | None:
    """Why nobody answers at the server's; None where somebody does, or a proxy is to be asked."""
    if getproxies():
        return None
    host, port = _server()
    try:
        socket.create_connection((host, port), REACH_SECONDS).close()
    except OSError as error:
        return f"{host} port {port} does not answer ({error})"
    return None


def _has_api_key() -> bool:
    """Where `wandb login` keeps it; asking wandb itself may stop at a prompt."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host, _ = _server()
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _warn(message: str) -> None:
    print(f"wandb: {message}", file=sys.stderr)
