"""Nodes with a link for every rank, as DeepSeek's have a network card for every GPU.

Where the ranks of a node share one link, the rows of whoever starts first may leave first, and it then waits for the
others.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.cluster.nodes import FRAME, Cluster, _batch, _run
from benchmarks.overlap.block import Work

_WINDOW = 1000  # frames


@dataclass(frozen=True)
class OwnLinks(Cluster):
    """A ``Cluster`` whose nodes have ``links`` links of ``rate_mbit`` each: eth0, eth1, ... Link p of all nodes is one
    subnet, 10.99.p.0/24."""

    links: int = 1

    def _build(self) -> None:
        super()._build()
        for node in range(self.num_nodes):
            name = self._node(node)
            # One bridge carries all subnets: an interface must answer for its own address only.
            _run("ip", "netns", "exec", name, "tee", "/proc/sys/net/ipv4/conf/all/arp_ignore", given="1")
            for link in range(self.links):
                device, port, address = f"eth{link}", f"p{node}-{link}", f"10.99.{link}.{node + 1}"
                # A window for a whole transfer from the start: acknowledgements stand in a queue behind rows.
                route = f"10.99.{link}.0/24 dev {device} proto kernel scope link src {address}"
                set_route = f"route change {route} rto_min 1s initcwnd {_WINDOW}"
                if link == 0:
                    _batch("ip", name, [set_route])
                    continue
                end, other = ("netns", name, "mtu", str(FRAME)), ("netns", self._switch, "mtu", str(FRAME))
                _run("ip", "link", "add", device, *end, "type", "veth", "peer", "name", port, *other)
                _run("ip", "-n", self._switch, "link", "set", port, "master", "bridge", "up")
                _batch(
                    "ip", name, [f"addr add {address}/24 dev {device}", f"link set {device} up", set_route]
                )
                self._shape(name, device)
                self._shape(self._switch, port)


def on_own_link(rank: int, world: int, work: Work, fn: Callable[[int, int, Work], Any]) -> Any:
    """``fn(rank, world, work)``; all process groups it makes use this rank's link."""
    os.environ["GLOO_SOCKET_IFNAME"] = f"eth{rank % work.ranks_per_node}"
    return fn(rank, world, work)
