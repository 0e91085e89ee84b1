"""The expert actor: a light Ray actor that owns one expert host process, so that Ray's scheduling places it.

No row passes through it. It forks the host from the node's warm parent and holds its control channel: when the actor
dies, the host sees end-of-file and exits; when the host dies, `closed` answers, and the expert router learns of it.
"""

import asyncio
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from folkmoot.cluster.node_agent import warm_parent
from folkmoot.cluster.placement import as_placement
from folkmoot.cluster.router_state import HostLoad, HostReady
from folkmoot.cluster.spec import ROUTER, ClusterSpec
from folkmoot.experts.expert_map import HostAddress
from folkmoot.experts.warm import Child

LOAD_TIMEOUT_S = 600.0
"""How long a host may take to load its experts from disk."""


class ExpertHostError(RuntimeError):
    """The expert host did not come up. The message says why and names its log."""


@ray.remote(num_cpus=0.1, max_restarts=0)
class ExpertActor:
    """Owns one expert host. `threads` is the host's share of this node's cores."""

    def __init__(self, spec: ClusterSpec, host: str, threads: int) -> None:
        self._spec, self._host, self._threads = spec, host, threads
        self._child: Child | None = None
        self._ready: HostReady | None = None
        self._closed: asyncio.Future[str] | None = None
        self._log = spec.log(host)

    async def start(self, incarnation: int, columns: Sequence[int]) -> HostReady:
        """Fork the host, wait until it serves, and say where. Raises ExpertHostError, WarmParentError."""
        self._closed = asyncio.get_running_loop().create_future()
        parent = await warm_parent(self._spec)
        host_spec = self._host_spec(incarnation, columns)
        self._child = await asyncio.to_thread(
            parent.spawn, "folkmoot.experts.host:main", host_spec, self._log, memory=self._memory()
        )
        message = await asyncio.to_thread(self._first_message, self._child)
        address = HostAddress(**message["address"])
        self._ready = HostReady(
            self._host,
            incarnation,
            address,
            tuple(columns),
            self._child.pid,
            os.getpid(),
            int(message["bytes"]),
            float(message["load_s"]),
            int(message["shared_bytes"]),
        )
        watched = (self._child, asyncio.get_running_loop())
        threading.Thread(target=self._watch, args=watched, name="host-watch", daemon=True).start()
        return self._ready

    async def closed(self) -> str:
        """Answers only when the host has died: the reason."""
        if self._closed is None:
            return "was never started"
        return await asyncio.shield(self._closed)

    async def describe(self) -> HostReady | None:
        """What a restarted expert router asks: the host as it was when it became ready, None if it is not."""
        return self._ready if self._child is not None and self._child.is_alive() else None

    def _host_spec(self, incarnation: int, columns: Sequence[int]) -> dict[str, Any]:
        """The fields of `folkmoot.experts.host.HostSpec`, which is not imported here since it brings torch."""
        spec = self._spec
        return {
            "host": self._host,
            "incarnation": incarnation,
            "checkpoint": spec.model_path,
            "experts": as_placement(columns, spec.moe_layers),
            "unix_path": str(Path(spec.run_dir) / f"{self._host}.sock"),
            "tcp": self._tcp(),
            "dtype": spec.dtype,
            "device": spec.device,
            "threads": self._threads,
        }

    def _memory(self) -> str | None:
        """The memory file in which this node's hosts share their weights."""
        return f"{self._spec.model_path} {self._spec.dtype}" if self._spec.share_weights else None

    def _tcp(self) -> str | None:
        """Where to listen for engines on other nodes; nowhere if there can be none."""
        if self._spec.several_nodes and self._spec.transport != "shm":
            return f"{ray.util.get_node_ip_address()}:0"
        return "127.0.0.1:0" if self._spec.transport == "tcp" else None

    def _first_message(self, child: Child) -> dict[str, Any]:
        """Wait for the host to be ready. Its log says more than the error."""
        try:
            message = child.receive(LOAD_TIMEOUT_S)
        except EOFError:
            message = {"message": "it died while loading"}
        if message is None:
            message = {"message": f"it was not ready after {LOAD_TIMEOUT_S:.0f} s"}
        if message.get("event") != "ready":
            child.kill()
            raise ExpertHostError(f"expert host {self._host}: {message.get('message')} (log: {self._log})")
        return message

    def _watch(self, child: Child, loop: asyncio.AbstractEventLoop) -> None:
        """In a thread: pass the host's loads on until it dies."""
        router = ray.get_actor(ROUTER, self._spec.namespace)
        assert self._ready is not None
        try:
            while True:
                message = child.receive()
                if message is not None and message.get("event") == "load":
                    counts = int(message["requests"]), int(message["rows"]), float(message["busy_s"])
                    router.report.remote(HostLoad(self._host, self._ready.incarnation, *counts))
        except EOFError:
            reason = f"process {child.pid} is gone"
        except Exception as e:  # a host that talks nonsense is of no use either
            child.kill()
            reason = f"its control channel failed: {e!r}"
        loop.call_soon_threadsafe(self._set_closed, reason)

    def _set_closed(self, reason: str) -> None:
        if self._closed is not None and not self._closed.done():
            self._closed.set_result(reason)
