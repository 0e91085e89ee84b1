"""A node's metrics: each process of a cluster that has some offers them in a folder, and one answers for all.

Expert router, expert actors (for their hosts) and gateway contend for the node's address; engines only offer theirs,
since their loop has tokens to move. Metrics are never what ends a process: what goes wrong is logged.
"""

import asyncio
import logging
import socket
from collections.abc import Iterator
from pathlib import Path

from prometheus_client import ProcessCollector
from prometheus_client.metrics_core import Metric as Family

from folkmoot.cluster.spec import ClusterSpec
from folkmoot.gateway.metrics_server import OFF, Produce, serving

log = logging.getLogger(__name__)

AGAIN_S = 5.0


async def keep_serving(spec: ClusterSpec, name: str, produce: Produce) -> None:
    """For ever: offer this process's metrics, and answer for the node where nobody else does."""
    while spec.metrics != OFF:
        try:
            Path(spec.run_dir).mkdir(parents=True, exist_ok=True, mode=0o700)
            async with serving(spec.metrics, name, produce, spec.metrics_dir):
                await asyncio.Event().wait()
        except OSError as e:
            log.warning("the metrics of %s are not offered: %s", name, e)
            await asyncio.sleep(AGAIN_S)


def of_process() -> Iterator[Family]:
    """process_* of this process."""
    return iter(ProcessCollector(registry=None).collect())


def hold(address: str) -> socket.socket:
    """A socket that keeps this TCP address for those who will listen there, one after the other: with SO_REUSEADDR they
    may while nobody listens, and the kernel gives the port to nobody else. Port 0 takes a free one. Raises OSError."""
    host, _, port = address.rpartition(":")
    ((family, _, _, _, where), *_) = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    held = socket.socket(family, socket.SOCK_STREAM)
    try:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(where)
    except BaseException:
        held.close()
        raise
    return held


def address_of(held: socket.socket, wanted: str) -> str:
    """HOST:PORT with the port that was taken."""
    return f"{wanted.rpartition(':')[0]}:{held.getsockname()[1]}"
