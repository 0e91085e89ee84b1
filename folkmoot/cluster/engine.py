"""The engine as a Ray Serve deployment: a light replica that owns one engine process. No token passes through it.

It forks the process from the node's warm parent, relays expert maps from the router to it, and its events back. When
the replica dies, the process sees end-of-file and exits; when the process dies, the replica exits at its next health
check and Serve replaces it.
"""

import asyncio
import json
import logging
import os
import signal
import threading
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError

from folkmoot.cluster import environment
from folkmoot.cluster.engine_process import give_back
from folkmoot.cluster.node_agent import warm_parent
from folkmoot.cluster.router_events import EngineReported, HostDied
from folkmoot.cluster.spec import ROUTER, ClusterSpec
from folkmoot.experts.warm import Child
from folkmoot.gateway.metrics_server import OFF

log = logging.getLogger(__name__)

RETRY_S = 0.5
SHARED_WITH_PROCESS = (
    *("model_path", "model", "architecture", "redis", "store_namespace", "dtype", "device", "max_model_len"),
    *("max_num_seqs", "seed", "kv_cache_gib", "transport", "combine", "grace_s", "hedge_s", "stall_s"),
    *("no_replica_timeout_s", "background_workers", "max_batch_seqs", "batch_rows", "batch_prompt_tokens"),
    *("batch_invariant", "prefix_caching", "compiled", "speculative_tokens", "prefill_chunk", "micro_batch_from"),
)


class EngineError(RuntimeError):
    """The engine process did not come up, or is gone. The message says why and names its log."""


@serve.deployment(
    name="Engine",
    health_check_period_s=2.0,
    health_check_timeout_s=30.0,
    graceful_shutdown_wait_loop_s=0.1,
    graceful_shutdown_timeout_s=15.0,
    max_constructor_retry_count=2,
    logging_config={"enable_access_log": False},
)
class Engine:
    """Owns one engine process."""

    async def __init__(self, spec: ClusterSpec, version: int) -> None:  # type: ignore[misc]  # Serve awaits it
        self._spec = spec
        self._engine = f"engine-{serve.get_replica_context().replica_id.unique_id}"
        environment.enter(spec.environment, "replica", engine=self._engine)
        self._log = spec.log(self._engine)
        self._router = ray.get_actor(ROUTER, spec.namespace)
        self._version = -1
        self._phase = "loading"
        self._info: dict[str, Any] = {"log": str(self._log), "version": version, "actor_pid": os.getpid()}
        self._info["node"] = ray.get_runtime_context().get_node_id()
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        parent = await warm_parent(spec)
        self._child = await asyncio.to_thread(
            parent.spawn, "folkmoot.cluster.engine_process:main", self._process_spec(), self._log
        )
        self._tell_router()
        watched = (self._child, asyncio.get_running_loop())
        self._watcher = threading.Thread(target=self._watch, args=watched, name="engine-watch", daemon=True)
        self._watcher.start()
        self._relay = asyncio.create_task(self._relay_maps()) if spec.moe_layers else None
        await self._ready

    async def check_health(self) -> None:
        """Ends this replica once the process is gone, so that Serve replaces it at once: of one that only says that it
        is unwell, Serve wants to hear that three times, a period apart."""
        if not self._child.is_alive():
            await asyncio.to_thread(self._watcher.join)  # what the process held is given back first
            log.warning("%s is gone, and its replica goes too (log: %s)", self._engine, self._log)
            os._exit(1)

    def info(self) -> dict[str, Any]:
        """Name, phase and pid."""
        return {"engine": self._engine, "phase": self._phase, "pid": self._child.pid, **self._info}

    async def __del__(self) -> None:
        """Serve stops this replica: let the process finish what it can, then make sure that it is gone."""
        if (child := getattr(self, "_child", None)) is None:
            return
        self._phase = "stopping"
        self._tell_router()
        child.kill(signal.SIGTERM)
        if not await asyncio.to_thread(child.wait, self._spec.grace_s + 2.0):
            child.kill()

    def _process_spec(self) -> dict[str, Any]:
        """The fields of `engine_model.EngineSpec`."""
        spec = self._spec
        feed = str(Path(spec.run_dir) / f"{self._engine}.feed") if spec.moe_layers else None
        metrics_dir = None if spec.metrics == OFF else str(spec.metrics_dir)
        told = {"engine": self._engine, "feed": feed, "secret_file": str(spec.secret_file), "metrics_dir": metrics_dir}
        return {**told, **{name: getattr(spec, name) for name in SHARED_WITH_PROCESS}}

    def _watch(self, child: Child, loop: asyncio.AbstractEventLoop) -> None:
        """In a thread: hand the process's messages to the event loop until it dies."""
        try:
            while True:
                message = child.receive()
                if message is not None:
                    loop.call_soon_threadsafe(self._on_message, message)
        except (EOFError, OSError):
            child.kill()  # it has closed its end, so it is dead or as good as dead
            log.warning("the engine process %d is gone; what it held is given back", child.pid)
            loop.call_soon_threadsafe(self._on_message, {"event": "error", "message": "its process is gone"})
            spec = self._spec
            give_back(spec.redis, spec.store_namespace, self._engine, "the engine died")

    def _on_message(self, message: dict[str, Any]) -> None:
        match message:
            case {"event": "ready", **facts}:
                self._phase, self._info = "ready", {**self._info, **facts}
                self._settle(None)
            case {"event": "error", "message": reason}:
                self._phase, self._info = "dead", {"error": reason, **self._info}
                self._settle(EngineError(f"{self._engine}: {reason} (log: {self._log})"))
            case {"event": "load", **counters}:
                self._info = {**self._info, **counters}
            case {"event": "host_dead", "host": host, "incarnation": incarnation, "reason": reason}:
                died = HostDied(host, incarnation, f"{self._engine}: {reason}")
                self._router.report.remote(died)
                return
            case {"event": "rows", **rows}:
                self._router.report_rows.remote(self._engine, rows)
                return
            case _:
                return
        self._tell_router()

    def _settle(self, error: Exception | None) -> None:
        if self._ready.done():
            return
        if error is None:
            self._ready.set_result(None)
        else:
            self._ready.set_exception(error)

    def _tell_router(self) -> None:
        self._router.report.remote(EngineReported(self._engine, self._phase, self._child.pid, self._info))

    async def _relay_maps(self) -> None:
        """Long-poll the router. While it is away, the engine goes on with the map it has."""
        while True:
            try:
                text = await self._router.wait_for_map.remote(self._engine, self._version)
                if text is not None:
                    expert_map = json.loads(text)
                    await asyncio.to_thread(self._child.send, {"map": expert_map})
                    self._version = expert_map["version"]
            except RayError as e:
                log.warning("the expert router is away: %s", type(e).__name__)
                await asyncio.sleep(RETRY_S)
                self._tell_router()  # one that was restarted knows no engine
            except OSError:
                return  # the process is gone; the health check says so
