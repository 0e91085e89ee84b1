"""The expert actor: a light Ray actor that owns the processes of one expert host, so that Ray's scheduling places it.

No row passes through it. It forks a process from the node's warm parent for each life of the host, and holds its
control channel: when the actor dies, the process sees end-of-file and exits; when the process dies, `closed` answers,
and the expert router has the next life started here: one in reserve, or a fork of a template that has loaded already.
"""

import asyncio
import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import ray

from folkmoot import logs
from folkmoot.cluster import environment, metrics_hosts, metrics_node
from folkmoot.cluster.host_speeds import RowsPerS
from folkmoot.cluster.host_template import Holding, Template
from folkmoot.cluster.metrics_hosts import HostFigures, Usage
from folkmoot.cluster.node_agent import warm_parent
from folkmoot.cluster.placement import Extra, as_placement
from folkmoot.cluster.router_events import HostForked, HostLoad, HostReady
from folkmoot.cluster.spec import ROUTER, ClusterSpec
from folkmoot.experts.expert_map import HostAddress
from folkmoot.experts.warm import Child, WarmParent, WarmParentError
from folkmoot.gateway.metrics import exposition

log = logging.getLogger(__name__)

HOST, RESERVE = "folkmoot.experts.host:main", "folkmoot.experts.host:reserve"
TEMPLATE = 0
"""In place of an incarnation: a template's files are named so."""
TEMPLATE_TIMEOUT_S = 1.0
"""How long a template may take to fork before the warm parent is asked instead."""
LOAD_TIMEOUT_S = 600.0
"""How long a host may take to load its experts from disk."""


class ExpertHostError(RuntimeError):
    """The expert host did not come up. The message says why and names its log."""


@dataclass
class _Process:
    """One life: its process, and what is to be heard of it."""

    forked: HostForked
    child: Child
    holding: Holding
    ready: "asyncio.Future[HostReady]"
    closed: "asyncio.Future[str]"
    load: dict[str, Any] = field(default_factory=dict)
    """its last report"""


@dataclass(frozen=True)
class Description:
    """What an expert actor says of itself: its host (None: a spare), its node, and the lives that run, oldest first."""

    host: str | None
    node: str
    lives: tuple[HostForked | HostReady, ...]


@ray.remote(num_cpus=0.1, max_restarts=0)
class ExpertActor:
    """Owns the lives of one expert host: one, or two while a successor takes over. A spare until its first start."""

    async def __init__(self, spec: ClusterSpec) -> None:  # type: ignore[misc]  # Ray awaits it
        environment.enter(spec.environment, "expert-actor")
        self._spec = spec
        self._host: str | None = None
        self._log = spec.log("host")
        self._processes: dict[int, _Process] = {}
        self._template = Template(self._fork_template, self._fork_reserve)
        self._rows_s: RowsPerS = ()
        self._metrics = asyncio.create_task(metrics_node.keep_serving(spec, f"actor-{os.getpid()}", self._text))

    async def start(
        self,
        host: str,
        incarnation: int,
        columns: Sequence[int],
        extras: Sequence[Extra],
        threads: int,
        rows_s: RowsPerS = (),
    ) -> HostForked:
        """Fork a life of this host, which loads its experts unless a template has. `rows_s`: how quick the host is, so
        far as that is known. Raises WarmParentError."""
        self._host, self._log = host, self._spec.log(host)
        self._rows_s = self._rows_s or rows_s
        logs.set_up("expert-actor", host=host)
        holding = Holding(tuple(columns), tuple(extras), threads)
        child = await self._fork_life(self._host_spec(host, incarnation, holding), holding)
        loop = asyncio.get_running_loop()
        log.info("process %d is incarnation %d", child.pid, incarnation)
        forked = HostForked(host, incarnation, holding.columns, child.pid, os.getpid(), holding.extras)
        process = _Process(forked, child, holding, loop.create_future(), loop.create_future())
        self._processes[incarnation] = process
        threading.Thread(target=self._watch, args=(process, loop), name="host-watch", daemon=True).start()
        return forked

    async def ready(self, incarnation: int) -> HostReady:
        """Answers when a life serves: where. Raises ExpertHostError if it does not come up."""
        return await asyncio.shield(self._process(incarnation).ready)

    async def closed(self, incarnation: int) -> str:
        """Answers only when a life has died: the reason. Raises ExpertHostError if it had died before."""
        return await asyncio.shield(self._process(incarnation).closed)

    async def stop(self, incarnation: int) -> None:
        """End a life, if it still runs."""
        if (process := self._processes.get(incarnation)) is not None:
            process.child.kill()

    async def describe(self) -> Description:
        """What a restarted expert router asks."""
        living = [p for _, p in sorted(self._processes.items()) if p.child.is_alive()]
        lives = tuple(p.ready.result() if _has_result(p.ready) else p.forked for p in living)
        return Description(self._host, ray.get_runtime_context().get_node_id(), lives)

    async def _fork_life(self, host_spec: dict[str, Any], holding: Holding) -> Child:
        if (reserve := self._template.take_reserve(holding)) is not None:
            try:
                reserve.send({"spec": host_spec})
                return reserve
            except OSError as e:
                log.warning("the life in reserve is of no use: %s", e)
                reserve.close()
        template = self._template.parent(holding)
        if template is not None:
            try:
                return await asyncio.to_thread(template.spawn, HOST, host_spec, self._log, TEMPLATE_TIMEOUT_S)
            except WarmParentError as e:
                log.warning("%s", e)
        return await self._fork(HOST, host_spec)

    async def _fork(self, entry: str, host_spec: dict[str, Any]) -> Child:
        parent = await warm_parent(self._spec)
        return await asyncio.to_thread(parent.spawn, entry, host_spec, self._log, memory=self._memory())

    async def _fork_template(self, holding: Holding) -> tuple[Child, WarmParent]:
        assert self._host is not None
        host_spec = self._host_spec(self._host, TEMPLATE, holding)
        child = await self._fork("folkmoot.experts.host:template", host_spec)
        return child, WarmParent(Path(host_spec["unix_path"]))

    async def _fork_reserve(self, holding: Holding, template: WarmParent) -> Child:
        assert self._host is not None
        host_spec = self._host_spec(self._host, TEMPLATE, holding)
        return await asyncio.to_thread(template.spawn, RESERVE, host_spec, self._log, TEMPLATE_TIMEOUT_S)

    def _process(self, incarnation: int) -> _Process:
        if incarnation not in self._processes:
            raise ExpertHostError(f"its process is gone (log: {self._log})")
        return self._processes[incarnation]

    def _host_spec(self, host: str, incarnation: int, holding: Holding) -> dict[str, Any]:
        """The fields of `folkmoot.experts.host.HostSpec`, which is not imported here since it brings torch."""
        spec = self._spec
        return {
            "host": host,
            "incarnation": incarnation,
            "checkpoint": spec.model_path,
            "experts": as_placement(holding.columns, spec.moe_layers, holding.extras),
            "unix_path": str(self._socket(host, incarnation)),
            "secret_file": str(spec.secret_file),
            "tcp": self._tcp(),
            "dtype": spec.dtype,
            "expert_dtype": spec.expert_dtype,
            "expert_letters": None if spec.expert_choice is None else spec.expert_choice.letters,
            "device": spec.device,
            "threads": holding.threads,
            "measures": spec.measures_speed and not self._rows_s,
        }

    def _memory(self) -> str | None:
        """The memory file in which this node's hosts share their weights."""
        spec = self._spec
        return f"{spec.model_path} {spec.dtype} {spec.expert_dtype}" if spec.share_weights else None

    def _socket(self, host: str, incarnation: int) -> Path:
        return Path(self._spec.run_dir) / f"{host}.{incarnation}.sock"

    def _tcp(self) -> str | None:
        """Where to listen for engines on other nodes; nowhere if there can be none."""
        if self._spec.several_nodes and self._spec.transport != "shm":
            return f"{ray.util.get_node_ip_address()}:0"
        return "127.0.0.1:0" if self._spec.transport == "tcp" else None

    def _watch(self, process: _Process, loop: asyncio.AbstractEventLoop) -> None:
        """In a thread: see a life come up, pass its loads on, and see it die."""
        child = process.child
        try:
            ready = self._first_message(process)
            loop.call_soon_threadsafe(self._serves, process, ready)
            self._pass_loads_on(process, ready)
        except ExpertHostError as e:
            reason = str(e)
        except EOFError:
            reason = f"process {child.pid} is gone"
        except Exception as e:  # a host that talks nonsense is of no use either
            reason = f"its control channel failed: {e!r}"
        child.kill()
        loop.call_soon_threadsafe(self._ended, process, reason)

    def _first_message(self, process: _Process) -> HostReady:
        """Wait for a life to be ready. Its log says more than the error."""
        forked = process.forked
        try:
            message = process.child.receive(LOAD_TIMEOUT_S)
        except EOFError:
            message = {"message": "it died while loading"}
        if message is None:
            message = {"message": f"it was not ready after {LOAD_TIMEOUT_S:.0f} s"}
        if message.get("event") != "ready":
            raise ExpertHostError(f"expert host {forked.host}: {message.get('message')} (log: {self._log})")
        self._rows_s = self._rows_s or tuple((int(n), float(s)) for n, s in message["rows_s"].items())
        return HostReady(
            forked.host,
            forked.incarnation,
            HostAddress(**message["address"]),
            forked.columns,
            forked.pid,
            forked.actor_pid,
            int(message["bytes"]),
            float(message["load_s"]),
            int(message["shared_bytes"]),
            forked.extras,
            int(message["threads"]),
            self._rows_s,
        )

    async def _text(self) -> bytes:
        """This host's metrics: of the life that serves; where another one is to take over, memory and time of both."""
        living = [p for _, p in sorted(self._processes.items()) if _has_result(p.ready)]
        if not living:
            return b""
        usage = sum((metrics_hosts.usage_of(process.child.pid) for process in living), Usage())
        return exposition(metrics_hosts.families([_figures(living[0], usage)]))

    def _pass_loads_on(self, process: _Process, ready: HostReady) -> NoReturn:
        router = ray.get_actor(ROUTER, self._spec.namespace)
        while True:
            message = process.child.receive()
            if message is not None and message.get("event") == "load":
                process.load = message
                counts = int(message["requests"]), int(message["rows"]), float(message["busy_s"])
                router.report.remote(HostLoad(ready.host, ready.incarnation, *counts))

    def _serves(self, process: _Process, ready: HostReady) -> None:
        """On the event loop: a life is up."""
        process.ready.set_result(ready)
        if self._spec.templates:
            self._template.want(process.holding)

    def _ended(self, process: _Process, reason: str) -> None:
        """On the event loop: whoever waits hears of it."""
        log.warning("incarnation %d has ended: %s", process.forked.incarnation, reason)
        self._processes.pop(process.forked.incarnation)
        process.child.close()
        self._socket(process.forked.host, process.forked.incarnation).unlink(missing_ok=True)
        if not process.ready.done():
            process.ready.set_exception(ExpertHostError(reason))
            process.ready.exception()  # heard by `ready`, or by nobody
        process.closed.set_result(reason)


def _figures(process: _Process, usage: Usage) -> HostFigures:
    """Of a life that is ready."""
    ready = process.ready.result()
    num_experts = len(ready.columns)
    return HostFigures(ready.host, num_experts, ready.bytes, ready.shared_bytes, ready.load_s, usage, process.load)


def _has_result(future: "asyncio.Future[HostReady]") -> bool:
    return future.done() and future.exception() is None
