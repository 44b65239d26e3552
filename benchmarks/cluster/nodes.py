"""Nodes on one machine: network namespaces on a bridge, each with one shaped full-duplex link.

    node 0: eth0 10.99.0.1 -- tbf -->                      <-- tbf -- 10.99.0.2 eth0 :node 1
                            <-- tbf -- p0 | bridge | p1 -- tbf -->

The bridge has a namespace of its own, so that no interface, address or route of the machine itself changes.
A token bucket (tc-tbf) at both ends of every link holds a node to its rate, out and in. Processes of one node talk
through its loopback, which nothing holds back: fast inside a node, slow between nodes.

What else decides how near a transfer comes to the rate is set in each node, whatever the machine's own settings are:

- frames are jumbo (9000 bytes), so that headers are 1 % of the bytes, whether or not a bucket splits packets;
- congestion control is Reno: queues are deep and nothing is lost, so that it just fills the link. (BBR takes the
  empty link's 0.01 ms for the round trip, and holds itself to a fraction of the rate.)
- windows are large from the start, larger than any transfer, and stay so: acknowledgements stand in the same queues as
  the data of the other direction, and with small windows the directions take turns (few flows take twice their time);
- no tail loss probes, no retransmission within a second: TCP would take every queue for a loss and send up to a
  third of the bytes twice.
"""

import ctypes
import json
import os
import secrets
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

NAMES = Path("/run/netns")  # where iproute2 keeps a file for each namespace
INTERFACE = "eth0"  # of every node
MOST_NODES = 200
FRAME = 9000  # bytes, the MTU
TCP = {
    "tcp_congestion_control": "reno",
    "tcp_early_retrans": "0",
    "tcp_rmem": "4096 33554432 33554432",  # least, first, most; bytes
    "tcp_wmem": "4096 33554432 33554432",
    "tcp_slow_start_after_idle": "0",
}
WINDOWS = "rto_min 1s initcwnd 2000 initrwnd 2000"  # of a route; frames
CLONE_NEWNET = 0x40000000


class ClusterUnavailable(RuntimeError):
    """This machine or user cannot make network namespaces with shaped links; the message says why."""


@dataclass(frozen=True)
class NodeBytes:
    """What has passed a node's link, in bytes, Ethernet headers included."""

    tx: int
    rx: int

    def __sub__(self, before: "NodeBytes") -> "NodeBytes":
        return NodeBytes(self.tx - before.tx, self.rx - before.rx)


@dataclass(frozen=True)
class Cluster:
    """``num_nodes`` nodes while the ``with`` block lasts; picklable, so that ranks can ``enter`` a node.

    ``rate_mbit``: of each link and direction, in Mbit/s. ``burst_ms``: what a link that has been idle may send at
    once, as time at that rate; also how late the kernel may come back to a queue before rate is lost.
    ``limit_mib``: the queue before each bucket; what does not fit is lost and waits for TCP to send it again.
    ``prefix`` starts the names of the namespaces and has to be no one else's.

    The namespaces go when the block ends, also by an error or Ctrl-C. A process that is killed leaves them:
    ``ip netns list`` shows them with its number, ``ip netns delete`` removes them.

    Raises ``ClusterUnavailable`` on entry; ValueError for numbers that make no cluster.
    """

    num_nodes: int
    rate_mbit: float = 200
    burst_ms: float = 20
    limit_mib: int = 64
    prefix: str = field(default_factory=lambda: f"cluster{os.getpid()}-{secrets.token_hex(3)}")

    def __post_init__(self) -> None:
        if not 1 <= self.num_nodes <= MOST_NODES:
            raise ValueError(f"Cluster(num_nodes={self.num_nodes}): must be 1 to {MOST_NODES}")
        for name in ("rate_mbit", "burst_ms", "limit_mib"):
            if getattr(self, name) <= 0:
                raise ValueError(f"Cluster({name}={getattr(self, name)}): must be above 0")
        if self.burst_bytes < 2 * FRAME:
            raise ValueError(
                f"Cluster(rate_mbit={self.rate_mbit}, burst_ms={self.burst_ms}): a burst of {self.burst_bytes} bytes; "
                f"must be {2 * FRAME} or more, two frames: raise either"
            )

    @property
    def burst_bytes(self) -> int:
        return int(self.rate_mbit * 1e6 / 8 * self.burst_ms / 1e3)

    def __enter__(self) -> Self:
        for tool in ("ip", "tc"):
            if shutil.which(tool) is None:
                raise ClusterUnavailable(f"there is no `{tool}` on the PATH: install iproute2")
        try:
            self._build()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def counters(self) -> list[NodeBytes]:
        """Of each node's link, since it was made."""
        found = []
        for node in range(self.num_nodes):
            shown = _run("ip", "-n", self._node(node), "-s", "-j", "link", "show", INTERFACE)
            stats = json.loads(shown)[0]["stats64"]
            found.append(NodeBytes(stats["tx"]["bytes"], stats["rx"]["bytes"]))
        return found

    def dropped(self) -> int:
        """Packets that found a queue full, on all links, since they were made. Best 0: see ``limit_mib``."""
        queues = [
            queue
            for name in self._names()
            for queue in json.loads(_run("tc", "-n", name, "-s", "-j", "qdisc", "show"))
        ]
        return sum(queue["drops"] for queue in queues if queue["kind"] == "tbf")

    def address(self, node: int) -> str:
        """Where the other nodes reach this one."""
        return f"10.99.0.{node + 1}"

    def processes(self, node: int) -> list[int]:
        """Of all that run on the node."""
        return [int(pid) for pid in _run("ip", "netns", "pids", self._node(node)).split()]

    def enter(self, node: int) -> None:
        """Move this process, which must have no second thread yet, into ``node`` for good, and gloo with it."""
        libc = ctypes.CDLL(None, use_errno=True)
        with (NAMES / self._node(node)).open("rb") as namespace:
            if libc.setns(namespace.fileno(), CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), f"setns into node {node} of {self.prefix}")
        os.environ["GLOO_SOCKET_IFNAME"] = INTERFACE

    def _node(self, node: int) -> str:
        return f"{self.prefix}-n{node}"

    @property
    def _switch(self) -> str:
        return f"{self.prefix}-switch"

    def _names(self) -> list[str]:
        return [self._switch, *(self._node(node) for node in range(self.num_nodes))]

    def _build(self) -> None:
        for name in self._names():
            _run("ip", "netns", "add", name)
        _batch("ip", self._switch, [f"link add bridge mtu {FRAME} type bridge", "link set bridge up"])
        for node in range(self.num_nodes):
            name, port = self._node(node), f"p{node}"
            end, other = ("netns", name, "mtu", str(FRAME)), ("netns", self._switch, "mtu", str(FRAME))
            _run("ip", "link", "add", INTERFACE, *end, "type", "veth", "peer", "name", port, *other)
            _run("ip", "-n", self._switch, "link", "set", port, "master", "bridge", "up")
            address = self.address(node)
            _batch(
                "ip",
                name,
                [
                    f"addr add {address}/24 dev {INTERFACE}",
                    f"link set {INTERFACE} up",
                    "link set lo up",
                    f"route change 10.99.0.0/24 dev {INTERFACE} proto kernel scope link src {address} {WINDOWS}",
                ],
            )
            for setting, value in TCP.items():
                _run("ip", "netns", "exec", name, "tee", f"/proc/sys/net/ipv4/{setting}", given=value)
            self._shape(name, INTERFACE)
            self._shape(self._switch, port)

    def _shape(self, name: str, device: str) -> None:
        bucket = ("rate", f"{self.rate_mbit}mbit", "burst", f"{self.burst_bytes}")
        limit = ("limit", f"{self.limit_mib}mb")
        _run("tc", "-n", name, "qdisc", "add", "dev", device, "root", "tbf", *bucket, *limit)

    def _remove(self) -> None:
        with ExitStack() as stack:  # which goes through all of them, also where one fails or is interrupted
            for name in self._names():
                stack.callback(_delete, name)


def available() -> str | None:
    """Why there can be no ``Cluster`` here, in one sentence; None if there can. Found by making one."""
    try:
        with Cluster(1):
            return None
    except ClusterUnavailable as reason:
        return str(reason)


def _delete(name: str) -> None:
    if (NAMES / name).exists():
        _run("ip", "netns", "delete", name)


def _batch(tool: str, name: str, lines: Sequence[str]) -> None:
    _run(tool, "-n", name, "-batch", "-", given="\n".join(lines))


def _run(*command: str, given: str = "") -> str:
    ended = subprocess.run(
        command,
        input=given,
        capture_output=True,
        text=True,
        check=False,
        start_new_session=True,  # Ctrl-C is for us, not for the command that cleans up
    )
    if ended.returncode != 0:
        words = " ".join(ended.stderr.split()) or f"exit code {ended.returncode}"
        who = "" if os.geteuid() == 0 else " (this user is not root)"
        raise ClusterUnavailable(f"`{' '.join(command)}` failed{who}: {words}")
    return ended.stdout
