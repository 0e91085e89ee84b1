"""`folkmoot up`: start everything in an order that overlaps what takes long, watch over it, and take it all down.

warm parent (imports vLLM, the longest part)  ─────────────────────────┐
request store, gateway                        ──┐                      │
Ray ──> expert router ──> expert actors       ──┼── wait for the warm ─┴─> expert hosts ──┐
     └> Serve ──> engine replicas             ──┘   parent, then fork   ─> engines      ──┴─> ready
"""

import asyncio
import contextlib
import math
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from folkmoot.cluster import interrupts, metrics_node, processes, ray_runtime, warm_files
from folkmoot.cluster.expert_precision import MeasureError, decided
from folkmoot.cluster.spec import ClusterSpec, namespace_of
from folkmoot.cluster.state_file import ClusterState, StateFolder
from folkmoot.cluster.up_options import (
    StartError,
    UpOptions,
    check_experts,
    check_guarded,
    make_spec,
    openmp_of,
    resolve_model,
)
from folkmoot.cluster.wish import first_wish
from folkmoot.experts import expert_dtype
from folkmoot.experts.warm import WarmParent
from folkmoot.gateway.embedded import EmbeddedStore
from folkmoot.gateway.metrics_server import OFF, PATH
from folkmoot.gateway.queue import RequestQueue
from folkmoot.gateway.store import Store

if TYPE_CHECKING:
    import socket
    import subprocess

POLL_S = 0.1
TEND_EVERY_S = 1.0
MOST_STORE_PAUSE_S = 16.0
GATEWAY_SHUTDOWN_S = 3.0
LEFTOVER_GRACE_S = 3.0
IMPORTING = "importing vLLM, once for all processes"
Report = Callable[[str], None]


class Supervisor:
    """One cluster from `start` to `stop`. `report` is told in a few words what is being waited for."""

    def __init__(self, options: UpOptions, report: Report) -> None:
        self.options = options
        self.folder = StateFolder(options.name, options.state_dir)
        self.spec: ClusterSpec | None = None
        self._report = report
        self._began = time.monotonic()
        self._timings_s: dict[str, float] = {}
        self._run_dir: Path | None = None
        self._warm: subprocess.Popen[bytes] | None = None
        self._store: EmbeddedStore | None = None
        self._store_at_s, self._store_pause_s = 0.0, TEND_EVERY_S
        self._gateway: subprocess.Popen[bytes] | None = None
        self._gateway_address: str | None = None
        self._metrics: socket.socket | None = None
        self._router: Any = None
        self._deployment: ray_runtime.Deployment | None = None
        self._state = ClusterState(options.name, "starting", os.getpid())
        self._acquired = False

    def start(self) -> ClusterState:
        """Bring the cluster up; returns when the first request can be served. Raises StartError, AlreadyRunning."""
        with interrupts.deferred():
            return self._start()

    def _start(self) -> ClusterState:
        check_guarded(self.options)
        self.folder.acquire()
        self._acquired = True
        processes.adopt_orphans()
        self._run_dir = Path(tempfile.mkdtemp(prefix="folkmoot-", dir=short_temp()))
        self._start_warm_parent()  # what takes longest comes first
        self._tell("reading the model")
        model_path, shape = resolve_model(self.options.model, self._tell)
        check_experts(self.options, model_path, shape)  # what cannot be is said before the rest is started
        files = {"run_dir": str(self._run_dir), "log_dir": str(self.folder.logs)}
        metrics = self._hold_metrics_port()
        self.spec = make_spec(self.options, model_path, shape, redis=self._start_store(), metrics=metrics, **files)
        self._start_gateway(self.spec)
        self._tell("starting Ray")
        ray_address = self._start_ray(self.spec)
        self._mark("ray")
        interrupts.check()
        self.spec = self._with_dtypes(self.spec)
        self._router = ray_runtime.start_router(self.spec)
        self._deployment = deployment = ray_runtime.Deployment(self.spec)
        self._wait_until_ready(self.spec, deployment)
        self._mark("ready")
        self._update(
            phase="ready",
            message="",
            gateway=self._gateway_address,
            tls=self.options.tls_cert is not None,
            metrics=None if metrics == OFF else f"http://{metrics}{PATH}",
            model=self.spec.model,
            ray_address=ray_address,
            run_dir=str(self._run_dir),
            experts=None if self.spec.expert_choice is None else str(self.spec.expert_choice),
            timings_s=self._timings_s,
        )
        self.folder.write_scrapes()
        return self._state

    def watch(self) -> None:
        """Tend to the parts that Ray does not watch, for ever."""
        while True:
            time.sleep(TEND_EVERY_S)
            self.tend()

    def tend(self) -> None:
        """Bring back what has died of the parts that Ray does not watch."""
        if self._warm is not None and self._warm.poll() is not None and self._start_warm_parent():
            self._report("the warm parent died; starting another one")
        if self._gateway is not None and self._gateway.poll() is not None:
            assert self.spec is not None
            self._report("the gateway died; starting another one")
            self._start_gateway(self.spec, self._gateway_address)
        if self._store is not None and self._store.pid is None and time.monotonic() >= self._store_at_s:
            self._start_store_again(self._store)
        processes.reap_orphans()  # what a dead warm parent had forked is ours now

    def _start_store_again(self, store: EmbeddedStore) -> None:
        """Also where that fails nothing else ends: engines keep what they owe until it is back."""
        self._report("the request store died; starting it again")
        try:
            store.start()
            self._store_pause_s = TEND_EVERY_S
        except (RuntimeError, OSError) as e:
            self._store_at_s = time.monotonic() + self._store_pause_s
            self._report(f"next attempt in {self._store_pause_s:.0f} s: {e}")
            self._store_pause_s = min(2 * self._store_pause_s, MOST_STORE_PAUSE_S)

    def stop(self, failure: str | None = None) -> None:
        """End everything that was started, in any state of the start, and leave no process behind."""
        if not self._acquired:
            return
        with contextlib.suppress(OSError):
            self._update(phase="failed" if failure else "stopping", message=failure or "stopping")
        if self._gateway is not None:
            processes.stop(self._gateway)
        joined = self.options.address is not None
        # Ray aborts a process that shuts it down while a thread of it calls Serve: then its processes are just killed.
        is_busy = self._deployment is not None and not self._deployment.is_done and not joined
        if not is_busy:
            with contextlib.suppress(Exception):
                ray_runtime.tear_down(self.spec, joined=joined)
        if self._warm is not None:
            processes.stop(self._warm)
        if self._store is not None:
            self._store.stop()
        # Expert hosts and engines end with their owners; Ray's agents linger.
        processes.end_descendants(0.0 if is_busy else LEFTOVER_GRACE_S)
        if self._metrics is not None:
            self._metrics.close()
        if self._run_dir is not None:
            shutil.rmtree(self._run_dir, ignore_errors=True)
        self.folder.release()
        if is_busy:
            _leave(failure)

    def _start_warm_parent(self) -> bool:
        """Whether there was none: after a death an expert actor that cannot wait may have had the node's agent start
        the next one."""
        assert self._run_dir is not None
        openmp = openmp_of(self.options)
        started = warm_files.start_missing(self._run_dir / "warm.sock", self.folder.logs / "warm.log", openmp)
        self._warm = started or self._warm
        return started is not None

    def _start_store(self) -> str:
        """The request store's URL."""
        if self.options.redis is not None:
            return self.options.redis
        alone = self.options.address is None  # then a unix socket is enough
        self._store = EmbeddedStore(
            self.folder.store, port=0 if alone else None, password=None if alone else secrets.token_hex(32)
        )
        self._store.start()
        asyncio.run(_forget_models(self._store.url, namespace_of(self.options.name)))
        self._update(store=self._store.url)
        return self._store.url if alone else self._store.tcp_url

    def _hold_metrics_port(self) -> str:
        """The address with a port that is kept for this cluster, whichever of its processes has it just now."""
        wanted = self.options.metrics
        if wanted == OFF:
            return OFF
        try:
            self._metrics = metrics_node.hold(wanted)
        except (OSError, OverflowError) as e:  # the latter for a port beyond the last one
            raise StartError(f"--metrics {wanted}: {getattr(e, 'strerror', None) or e}") from e
        return metrics_node.address_of(self._metrics, wanted)

    def _start_gateway(self, spec: ClusterSpec, listen: str | None = None) -> None:
        command = [sys.executable, "-m", "folkmoot.gateway", "--listen", listen or self.options.listen]
        command += ["--namespace", spec.store_namespace, "--shutdown-s", str(GATEWAY_SHUTDOWN_S)]
        if self.options.tenant_weights:
            command += ["--tenant-weights", self.options.tenant_weights]
        command += _guards(self.options)
        command += ["--metrics", spec.metrics, "--metrics-dir", str(spec.metrics_dir)]
        spec.log("gateway").unlink(missing_ok=True)
        self._gateway = processes.start(command, spec.log("gateway"), {"FOLKMOOT_REDIS": spec.redis})

    def _start_ray(self, spec: ClusterSpec) -> str:
        engines = first_wish(spec).engine_limits.most
        hosts_wanted = [g.hosts * (spec.host_cpus if g.cpus is None else g.cpus) for g in spec.host_groups]
        wanted = (sum(hosts_wanted) or spec.hosts * spec.host_cpus) + engines * spec.engine_cpus
        num_cpus = max(os.cpu_count() or 1, math.ceil(wanted))
        assert self._run_dir is not None
        num_gpus = math.ceil(spec.hosts * spec.host_gpus + engines * spec.engine_gpus) or None
        try:
            return ray_runtime.connect(self.options.address, spec.namespace, self._run_dir / "ray", num_cpus, num_gpus)
        except Exception as e:
            raise StartError(f"Ray did not start: {e}") from e

    def _with_dtypes(self, spec: ClusterSpec) -> ClusterSpec:
        """The spec with the dtype of each expert, where that is left to a budget."""
        try:
            return decided(spec, self.options.expert_loads, lambda: self._warm_parent(spec), self._tell)
        except (ValueError, MeasureError) as e:
            raise StartError(str(e)) from e

    def _warm_parent(self, spec: ClusterSpec) -> WarmParent:
        while not spec.warm_socket.exists():
            self._check_processes(spec)
            self._tell(IMPORTING)
            time.sleep(POLL_S)
        self._mark("warm")
        return WarmParent(spec.warm_socket)

    def _wait_until_ready(self, spec: ClusterSpec, deployment: ray_runtime.Deployment) -> None:
        import ray

        while True:
            self._check_processes(spec)
            status = ray.get(self._router.status.remote())
            _raise_failures(spec, status, deployment)
            engines = sum(e["phase"] == "ready" for e in status["engines"])
            hosts = sum(h["alive"] for h in status["hosts"])
            if Path(spec.warm_socket).exists():
                self._mark("warm")
            if hosts == spec.hosts:
                self._mark("hosts")
            if engines >= spec.first_engines:
                self._mark("engines")
                if self._gateway_address is not None and hosts == spec.hosts:
                    return
            self._tell(waiting_for(spec, status, warm="warm" in self._timings_s, quantised=self._quantised(spec)))
            interrupts.check()
            time.sleep(POLL_S)

    def _quantised(self, spec: ClusterSpec) -> float | None:
        """About the share of the experts that lie quantised beside the checkpoint; None where none have to."""
        num = len(spec.moe_layers) * spec.num_experts
        kinds = {spec.expert_dtype: num} if spec.expert_choice is None else spec.expert_choice.counts
        is_made = spec.expert_dtype in expert_dtype.ON_CPU or spec.expert_choice is not None
        if not is_made or spec.device != "cpu" or "hosts" in self._timings_s:
            return None
        from folkmoot.experts.quantise_cache import ExpertCache
        from folkmoot.experts.vllm_api import checkpoint

        path = Path(spec.model_path)
        cache = ExpertCache(path, checkpoint.identity(path), spec.dtype)
        return sum(min(cache.count(kind), wanted) for kind, wanted in kinds.items()) / max(1, num)

    def _check_processes(self, spec: ClusterSpec) -> None:
        """Raises StartError with the end of the log of what died."""
        assert self._warm is not None and self._gateway is not None
        if self._warm.poll() is not None:
            raise StartError(f"importing vLLM failed:\n{processes.tail(spec.warm_log)}\n(log: {spec.warm_log})")
        if self._gateway.poll() is not None:
            log = spec.log("gateway")
            raise StartError(f"the gateway did not start:\n{processes.tail(log, 5)}\n(log: {log})")
        if self._gateway_address is None:
            for line in spec.log("gateway").read_text(errors="replace").splitlines():
                if line.startswith("listening on "):
                    self._gateway_address = line.removeprefix("listening on ").strip()
                    self._mark("gateway")

    def _tell(self, message: str, fraction: float | None = None) -> None:
        interrupts.check()
        text = message if fraction is None else f"{message} ({fraction:.0%})"
        if text != self._state.message:
            self._update(message=text)
            self._report(text)

    def _mark(self, what: str) -> None:
        self._timings_s.setdefault(what, round(time.monotonic() - self._began, 2))

    def _update(self, **changes: Any) -> None:
        self._state = self._state.with_(**changes)
        self.folder.write(self._state)


def _leave(failure: str | None) -> NoReturn:
    """End this process without Ray's exit handlers, which would talk to a Ray that is gone."""
    if failure:
        print(f"Error: {failure}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if failure else 0)


def _guards(options: UpOptions) -> list[str]:
    """The gateway's options that say whom it lets in."""
    switches = [f"--{name.replace('_', '-')}" for name in ("require_keys", "insecure") if getattr(options, name)]
    files = {"--tls-cert": options.tls_cert, "--tls-key": options.tls_key, "--tls-client-ca": options.tls_client_ca}
    return switches + [word for name, path in files.items() if path is not None for word in (name, str(path))]


async def _forget_models(url: str, namespace: str) -> None:
    """What an embedded store knows of a former cluster: it may have served another model, and is not there any more."""
    store = Store(url, namespace)
    queue = RequestQueue(store)
    for name in await queue.models():
        await queue.forget_model(name)
    await store.command("DEL", store.keys.charge)
    await store.close()


def short_temp() -> str:
    """Unix socket paths may have 107 bytes, and Ray's own are long."""
    return "/tmp" if len(tempfile.gettempdir()) > 20 and os.path.isdir("/tmp") else tempfile.gettempdir()


def _raise_failures(spec: ClusterSpec, status: dict[str, Any], deployment: ray_runtime.Deployment) -> None:
    if status["error"]:
        raise StartError(f"{status['error']} (log: Ray's, of the actor ExpertRouter)")
    for host in status["hosts"]:
        if host["reason"]:
            raise StartError(f"{host['host']} did not start: {host['reason']} (log: {spec.log(host['host'])})")
    for engine in status["engines"]:
        if engine["phase"] == "dead":
            log = Path(engine["log"])
            raise StartError(f"an engine did not start: {engine.get('error')}\n{processes.tail(log)}\n(log: {log})")
    if deployment.is_done and deployment.error is not None:
        raise StartError(f"Ray Serve did not start the engines: {deployment.error}")


def waiting_for(spec: ClusterSpec, status: dict[str, Any], *, warm: bool, quantised: float | None = None) -> str:
    """What a cluster that comes up still lacks, in words. `quantised`: the share of the experts that are; None: all."""
    if not warm:
        return IMPORTING
    hosts = sum(h["alive"] for h in status["hosts"])
    engines = sum(e["phase"] == "ready" for e in status["engines"])
    parts = []
    if hosts < spec.hosts:
        made = "" if quantised is None or quantised >= 1 else f", {spec.expert_dtype} experts {quantised:.0%} made"
        parts.append(f"expert hosts ({hosts} of {spec.hosts} ready{made})")
    if engines < spec.first_engines:
        parts.append(f"engines ({engines} of {spec.first_engines} ready)")
    return "loading " + " and ".join(parts) if parts else "waiting for the gateway"
