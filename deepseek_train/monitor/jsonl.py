"""``metrics.jsonl``: the whole history of a run as text, one JSON object a line: a step or a validation.

A number that is not finite is written as ``null`` (JSON has no NaN) and read back as NaN (an MTP loss as
None). Timelines are left out. Expert loads are the bulk of a line (58 layers of 256 experts: 80 kB), so long
runs keep fewer of them, see ``keeps_load``; what they come to, ``max_violation`` of each layer and
``load_max_over_mean`` of the worst, is on every line.
"""

import json
import math
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from deepseek_train.monitor.metrics import EvalMetrics, StepMetrics
from deepseek_train.spec.links import ExpertTraffic, LinkBytes


@dataclass(frozen=True)
class History:
    """What ``metrics.jsonl`` holds. ``expert_load`` is empty on steps whose load was not kept."""

    steps: tuple[StepMetrics, ...]
    evaluations: tuple[EvalMetrics, ...]


class JsonlSink:
    """Appends to ``path``, each line at once: a killed run loses at most the line being written. A
    full disk keeps lines waiting, never the run.

    ``start_step`` is the last step that the run already holds (0: a new run). Lines of later steps, left by a
    run that went on after the checkpoint now resumed from, are dropped, so the file tells one history.
    """

    def __init__(self, path: Path, start_step: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _keep_until(path, start_step)
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._pending: list[
            tuple[int, bytes]
        ] = []  # lines, with their steps, that a full disk has not taken yet

    def step(self, metrics: StepMetrics) -> None:
        facts = asdict(replace(metrics, timeline=None))
        del facts["timeline"]
        facts["load_max_over_mean"] = metrics.load_max_over_mean()
        facts["max_violation"] = {layer: round(v, 5) for layer, v in metrics.max_violations().items()}
        if not keeps_load(metrics.step):
            facts["expert_load"] = {}
        self._write({"kind": "step", **facts})

    def evaluation(self, metrics: EvalMetrics) -> None:
        self._write({"kind": "validation", **asdict(metrics)})

    def rewind(self, step: int) -> None:
        self._file.close()
        _keep_until(self._path, step)
        self._pending = [line for line in self._pending if line[0] <= step]
        self._file = self._path.open("ab", buffering=0)

    def close(self) -> None:
        self._file.close()

    def _write(self, record: dict[str, Any]) -> None:
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        line = json.dumps(finite, allow_nan=False, separators=(",", ":")).encode() + b"\n"
        self._pending.append((record["step"], line))
        try:
            while self._pending:
                self._append(self._pending[0][1])
                del self._pending[0]
        except OSError as error:
            if len(self._pending) == 1:
                print(f"WARNING: {self._path} cannot be written, lines wait in memory: {error}", flush=True)

    def _append(self, line: bytes) -> None:
        """All of it, or nothing."""
        end, written = self._file.seek(0, os.SEEK_END), 0
        try:
            while written < len(line):
                written += self._file.write(line[written:]) or 0
        except OSError:
            self._file.truncate(end)
            raise


def keeps_load(step: int) -> bool:
    """Every step up to 999, every 10th up to 9999, every 100th up to 99999, ...: 900 per power of ten."""
    return bool(step % 10 ** max(0, len(str(step)) - 3) == 0)


def read_history(path: Path) -> History:
    """Reads ``metrics.jsonl`` back; a torn last line (the run was killed while writing) is left out.

    Raises FileNotFoundError without the file, ValueError with the line number when another line is not JSON.
    """
    steps: list[StepMetrics] = []
    evaluations: list[EvalMetrics] = []
    for record in _read(path):
        kind = record.pop("kind")
        for name in ("loss", "balance_loss", "grad_norm"):
            if name in record and record[name] is None:
                record[name] = math.nan
        if kind == "validation":
            evaluations.append(EvalMetrics(**record))
        else:
            for derived in ("load_max_over_mean", "max_violation"):  # the latter is not in older files
                record.pop(derived, None)
            if record.get("expert_traffic"):
                record["expert_traffic"] = _traffic(record["expert_traffic"])
            record["expert_load"] = {int(layer): tuple(load) for layer, load in record["expert_load"].items()}
            steps.append(StepMetrics(**record))
    return History(tuple(steps), tuple(evaluations))


def _traffic(record: dict[str, Any]) -> ExpertTraffic:
    kinds = {name: LinkBytes(**record[name]) for name in ("plan", "dispatch", "combine")}
    return ExpertTraffic(**kinds, least_cross=record["least_cross"])


def _read(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(
                    f"{path}, line {number} is not JSON ({error}), but every line is one object written by "
                    "JsonlSink. Delete the line, or move the file away to start a new history"
                ) from error
    return records


def _keep_until(path: Path, last_step: int) -> None:
    kept = [record for record in _read(path) if record["step"] <= last_step]
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, separators=(",", ":")) + "\n" for record in kept)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
