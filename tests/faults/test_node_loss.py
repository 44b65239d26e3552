"""A machine is lost and comes back: two nodes of a rank each, as network namespaces, started as a user starts them. The
survivor goes on alone in the layout planned for that, and both go on together once the other is back; nobody does a
thing by hand. Minutes: torchrun waits half of one for machines that may still come.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.cluster import Cluster, available
from benchmarks.cluster.nodes import INTERFACE
from tests.faults.commands import SMALL, numbers, write_text

pytestmark = pytest.mark.slow_faults
SCRIPT = Path(__file__).parents[2] / "launch" / "multi_node_torchrun.sh"
RUN = [
    *SMALL,
    "name=nodes",
    "train.total_tokens=3200000",  # more than there is time for: it is told to stop
    "checkpoint.every=5",
    "parallel.fallbacks=[{pp: 1, dp: 1, ep: 1, schedule: 1f1b}]",
]
RESUMED = re.compile(r"resumed from \S+ after step (\d+),")
TOGETHER, ALONE = "on 2 ranks: PP 2 (dualpipe)", "on 1 ranks: PP 1 (1f1b)"
PATIENCE = 150.0  # seconds, on a busy machine


class Nodes:
    """The agents of two nodes, whose words go to files."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self._cluster, self._folder = cluster, folder
        self.agents: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, node: int) -> None:
        with (self._folder / f"node-{node}").open("ab") as words:
            self.agents[node] = subprocess.Popen(
                ["bash", str(SCRIPT), *RUN],
                cwd=self._folder,
                env={
                    **os.environ,
                    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                    "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
                    "OMP_NUM_THREADS": "1",
                    "GLOO_SOCKET_IFNAME": INTERFACE,
                    "NNODES": "1:2",
                    "NODE_RANK": str(node),
                    "RANKS": "1",
                    "MASTER_ADDR": self._cluster.address(0),
                    "LOCAL_ADDR": self._cluster.address(node),
                },
                stdout=words,
                stderr=words,
                preexec_fn=lambda: self._cluster.enter(node),
            )

    def lose(self, node: int) -> None:
        """All processes of the node at once, and its agent with them."""
        for pid in self._cluster.processes(node):
            os.kill(pid, signal.SIGKILL)
        self.agents[node].wait()

    def said(self) -> str:
        return "".join(path.read_text() for path in sorted(self._folder.glob("node-*")))

    def wait(self, what: str, until: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not until():
            assert time.monotonic() < deadline, f"{what}: not within {PATIENCE:.0f} s\n{self.said()}"
            time.sleep(0.2)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    if (reason := available()) is not None:
        pytest.skip(reason)
    write_text(tmp_path)
    prepare = [sys.executable, "-m", "deepseek_train.cli.data", "prepare"]
    data = ["data.source=text", "data.path=shards", "data.sequence_length=16", "data.validation_percent=20"]
    subprocess.run([*prepare, *data], cwd=tmp_path, check=True, capture_output=True)
    with Cluster(2) as cluster:
        both = Nodes(cluster, tmp_path)
        try:
            yield both
        finally:
            for node in both.agents:
                both.lose(node)


def test_the_survivor_goes_on_alone_and_the_world_grows_again(nodes: Nodes, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "nodes"

    def step() -> int:
        path = run / "metrics.jsonl"
        lines = (
            path.read_text().splitlines()[:-1] if path.exists() else []
        )  # the last one may be half written
        return json.loads(lines[-1])["step"] if lines else 0

    nodes.start(0)
    nodes.start(1)
    nodes.wait("both nodes train", lambda: step() >= 12)
    assert TOGETHER in nodes.said()

    nodes.lose(1)
    nodes.wait(
        "the survivor trains alone", lambda: ALONE in nodes.said() and bool(RESUMED.search(nodes.said()))
    )
    resumed = int(RESUMED.findall(nodes.said())[-1])
    assert resumed >= 10
    nodes.wait("the survivor gets on", lambda: step() > resumed + 10)

    nodes.start(1)
    nodes.wait("both are together again", lambda: nodes.said().count(TOGETHER) == 2)
    alone = step()
    nodes.wait("both get on", lambda: step() > alone + 10)

    for agent in nodes.agents.values():  # of one that is told alone the other torchrun waits for five minutes
        agent.send_signal(signal.SIGTERM)
    nodes.wait("both nodes end", lambda: all(agent.poll() is not None for agent in nodes.agents.values()))
    assert "stopped after step" in nodes.said()
    steps = [record[0] for record in numbers(run)]
    assert steps == list(range(1, len(steps) + 1))
    assert (run / "outcome").read_text() == f"stopped after step {len(steps)}\n"
