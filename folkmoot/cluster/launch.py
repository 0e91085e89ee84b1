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
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from folkmoot.cluster import interrupts, processes, ray_runtime, warm_files
from folkmoot.cluster.placement import num_hosts_for
from folkmoot.cluster.spec import ClusterSpec, namespace_of
from folkmoot.cluster.state_file import ClusterState, StateFolder
from folkmoot.cluster.wish import first_wish
from folkmoot.gateway.embedded import EmbeddedStore
from folkmoot.gateway.queue import RequestQueue
from folkmoot.gateway.settings import OPEN_WITHOUT_KEYS, is_local
from folkmoot.gateway.store import Store

if TYPE_CHECKING:
    import subprocess

    from folkmoot.experts.vllm_api import ModelShape

POLL_S = 0.1
TEND_EVERY_S = 1.0
GATEWAY_SHUTDOWN_S = 3.0
LEFTOVER_GRACE_S = 3.0
SHARED_WITH_SPEC = (
    *("name", "engines", "most_engines", "most_hosts", "idle_s", "placement", "dtype", "device", "max_model_len"),
    *("max_num_seqs", "max_batch_seqs", "batch_rows", "batch_prompt_tokens"),
    *("kv_cache_gib", "seed", "transport", "combine", "max_experts_per_host", "stall_s", "no_replica_timeout_s"),
    *("load_half_life_s", "rebalance", "spare_experts"),
)

Report = Callable[[str], None]


class StartError(RuntimeError):
    """The cluster did not come up. The message says why, and names the log to read."""


@dataclass(frozen=True)
class UpOptions:
    """What `folkmoot up` was asked for; the command line takes its defaults from here."""

    model: str
    """checkpoint folder, or "demo" for the built-in model"""
    name: str = "default"
    engines: int = 1
    most_engines: int | None = None
    """None: exactly `engines`; else from so many to this, as work asks for"""
    idle_s: float = ClusterSpec.idle_s
    hosts: int | None = None
    """expert hosts; None: from experts_per_host, else as few as the replicas allow, at least two"""
    most_hosts: int | None = None
    """None: their number stays; else the autoscaler may start so many"""
    experts_per_host: int | None = None
    replicas: int | None = None
    """None: as many as hosts where weights are shared by hosts on one node, so that they cost no memory; else 1"""
    share_weights: bool | None = None
    """None: on a CPU"""
    templates: bool | None = None
    """None: where weights are shared"""
    placement: str = "spread"
    listen: str = "127.0.0.1:50051"
    require_keys: bool = False
    """ask for an API key with every call"""
    insecure: bool = False
    """listen on an open address without keys all the same"""
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    redis: str | None = field(default=None, repr=False)
    """URL of a request store; None: an embedded one"""
    address: str | None = None
    """address of a running Ray cluster; None: a local one"""
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_batch_seqs: int | None = None
    """of them batch requests; None: three quarters"""
    batch_rows: int = ClusterSpec.batch_rows
    batch_prompt_tokens: int = ClusterSpec.batch_prompt_tokens
    dtype: str = "auto"
    device: str = "cpu"
    tenant_weights: str = ""
    """NAME=WEIGHT,...: shares of each lane; 1 for who is not named"""
    kv_cache_gib: float = 1.0
    seed: int = 0
    transport: str = "auto"
    combine: str = "rows"
    stall_s: float = ClusterSpec.stall_s
    no_replica_timeout_s: float = ClusterSpec.no_replica_timeout_s
    load_half_life_s: float = ClusterSpec.load_half_life_s
    rebalance: bool = ClusterSpec.rebalance
    spare_experts: int = ClusterSpec.spare_experts
    background_workers: bool | None = None
    """None: where it helps, with one engine on a CPU"""
    cpus_per_host: float = 0.1
    gpus_per_host: float = 0.0
    cpus_per_engine: float = ClusterSpec.engine_cpus
    gpus_per_engine: float = ClusterSpec.engine_gpus
    max_experts_per_host: int | None = None
    state_dir: Path | None = None


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
        self._gateway: subprocess.Popen[bytes] | None = None
        self._gateway_address: str | None = None
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
        self._tell("reading the model")
        model_path, shape = resolve_model(self.options.model, self._tell)
        self._run_dir = Path(tempfile.mkdtemp(prefix="folkmoot-", dir=short_temp()))
        num_hosts_and_replicas(self.options, shape.num_experts)  # what cannot be is said before anything is started
        self._start_warm_parent()
        files = {"run_dir": str(self._run_dir), "log_dir": str(self.folder.logs)}
        self.spec = make_spec(self.options, model_path, shape, redis=self._start_store(), **files)
        self._start_gateway(self.spec)
        self._tell("starting Ray")
        ray_address = self._start_ray(self.spec)
        self._mark("ray")
        interrupts.check()
        self._router = ray_runtime.start_router(self.spec)
        self._deployment = deployment = ray_runtime.Deployment(self.spec)
        self._wait_until_ready(self.spec, deployment)
        self._mark("ready")
        self._update(
            phase="ready",
            message="",
            gateway=self._gateway_address,
            tls=self.options.tls_cert is not None,
            model=self.spec.model,
            ray_address=ray_address,
            run_dir=str(self._run_dir),
            timings_s=self._timings_s,
        )
        return self._state

    def watch(self) -> None:
        """Tend to the parts that Ray does not watch, for ever. Raises StartError if one cannot be brought back."""
        while True:
            time.sleep(TEND_EVERY_S)
            assert self.spec is not None
            if self._warm is not None and self._warm.poll() is not None:
                self._report("the warm parent died; starting another one")
                self._start_warm_parent()
            if self._gateway is not None and self._gateway.poll() is not None:
                self._report("the gateway died; starting another one")
                self._start_gateway(self.spec, self._gateway_address)
            if self._store is not None and self._store.pid is None:
                self._report("the request store died; starting it again")
                self._store.start()
            processes.reap_orphans()  # what a dead warm parent had forked is ours now

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
        if self._run_dir is not None:
            shutil.rmtree(self._run_dir, ignore_errors=True)
        self.folder.release()
        if is_busy:
            _leave(failure)

    def _start_warm_parent(self) -> None:
        assert self._run_dir is not None
        self._warm = warm_files.start(self._run_dir / "warm.sock", self.folder.logs / "warm.log")

    def _start_store(self) -> str:
        """The request store's URL."""
        if self.options.redis is not None:
            return self.options.redis
        alone = self.options.address is None  # then a unix socket is enough
        self._store = EmbeddedStore(self.folder.store, port=0 if alone else None)
        self._store.start()
        asyncio.run(_forget_models(self._store.url, namespace_of(self.options.name)))
        self._update(store=self._store.url)
        return self._store.url if alone else self._store.tcp_url

    def _start_gateway(self, spec: ClusterSpec, listen: str | None = None) -> None:
        command = [sys.executable, "-m", "folkmoot.gateway", "--listen", listen or self.options.listen]
        command += ["--namespace", spec.store_namespace, "--shutdown-s", str(GATEWAY_SHUTDOWN_S)]
        if self.options.tenant_weights:
            command += ["--tenant-weights", self.options.tenant_weights]
        command += _guards(self.options)
        spec.log("gateway").unlink(missing_ok=True)
        self._gateway = processes.start(command, spec.log("gateway"), {"FOLKMOOT_REDIS": spec.redis})

    def _start_ray(self, spec: ClusterSpec) -> str:
        engines = first_wish(spec).engine_limits.most
        wanted = spec.hosts * spec.host_cpus + engines * spec.engine_cpus
        num_cpus = max(os.cpu_count() or 1, math.ceil(wanted))
        assert self._run_dir is not None
        num_gpus = math.ceil(spec.hosts * spec.host_gpus + engines * spec.engine_gpus) or None
        try:
            return ray_runtime.connect(self.options.address, spec.namespace, self._run_dir / "ray", num_cpus, num_gpus)
        except Exception as e:
            raise StartError(f"Ray did not start: {e}") from e

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
            self._tell(waiting_for(spec, status, warm="warm" in self._timings_s))
            interrupts.check()
            time.sleep(POLL_S)

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


def make_spec(
    options: UpOptions, model_path: Path, shape: "ModelShape", *, redis: str, run_dir: str, log_dir: str
) -> ClusterSpec:
    """What was asked for, with everything decided that was left open. Raises StartError, PlacementError."""
    hosts, replicas = num_hosts_and_replicas(options, shape.num_experts)
    return ClusterSpec(
        model_path=str(model_path),
        model="demo" if options.model == "demo" else model_path.name,
        architecture=shape.architecture,
        moe_layers=shape.moe_layers,
        num_experts=shape.num_experts,
        redis=redis,
        store_namespace=namespace_of(options.name),
        run_dir=run_dir,
        log_dir=log_dir,
        hosts=hosts,
        replicas=replicas,
        share_weights=shares_weights(options),
        templates=shares_weights(options) if options.templates is None else options.templates,
        several_nodes=options.address is not None,
        background_workers=_background_workers(options, shape),
        host_cpus=options.cpus_per_host,
        host_gpus=options.gpus_per_host,
        engine_cpus=options.cpus_per_engine,
        engine_gpus=options.gpus_per_engine,
        **{name: getattr(options, name) for name in SHARED_WITH_SPEC},
    )


def _background_workers(options: UpOptions, shape: "ModelShape") -> bool:
    """By default where one engine shares its cores with hosts and nobody else: two would starve each other."""
    if options.background_workers is not None:
        return options.background_workers
    most = options.engines if options.most_engines is None else options.most_engines
    return options.device == "cpu" and most == 1 and bool(shape.moe_layers)


def shares_weights(options: UpOptions) -> bool:
    """Whether the expert hosts of a node keep weights in memory that they share: by default on a CPU. StartError."""
    if options.share_weights and options.device != "cpu":
        raise StartError(f"--share-weights shares main memory, so it needs --device cpu, not {options.device}")
    return options.device == "cpu" if options.share_weights is None else options.share_weights


def num_hosts_and_replicas(options: UpOptions, num_experts: int) -> tuple[int, int]:
    """Expert hosts and replicas of each expert, where options leave them open. Raises PlacementError."""
    hosts, replicas = options.hosts, options.replicas
    per_host, capacity = options.experts_per_host, options.max_experts_per_host
    if hosts is None and per_host is None and num_experts:
        hosts = max(replicas or 1, min(2, num_experts))
    if replicas is None:
        is_free = shares_weights(options) and options.address is None and per_host is None and capacity is None
        replicas = hosts if is_free and num_experts and hosts is not None else 1
    num_hosts = num_hosts_for(num_experts, replicas, num_hosts=hosts, experts_per_host=per_host, capacity=capacity)
    return num_hosts, replicas


def resolve_model(model: str, progress: Callable[[str, float], None]) -> "tuple[Path, ModelShape]":
    """The checkpoint folder and its shape; "demo" is made where it is not cached. Raises StartError."""
    if model == "demo":
        from folkmoot.cluster import demo_model

        path = demo_model.ensure(progress=progress)
    else:
        path = Path(model).expanduser().resolve()
        if not (path / "config.json").is_file():
            raise StartError(f"{path} is not a checkpoint folder: it has no config.json")
    from folkmoot.experts.vllm_api import describe

    try:
        return path, describe(path)
    except (OSError, ValueError, KeyError) as e:
        raise StartError(f"{path} cannot be read as a checkpoint: {e}") from e


def _leave(failure: str | None) -> NoReturn:
    """End this process without Ray's exit handlers, which would talk to a Ray that is gone."""
    if failure:
        print(f"Error: {failure}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if failure else 0)


def check_guarded(options: UpOptions) -> None:
    """Raises StartError where strangers could call: the gateway would not start either, but later."""
    is_guarded = options.require_keys or options.tls_client_ca is not None
    if not (is_local(options.listen) or is_guarded or options.insecure):
        raise StartError(f"--listen {options.listen}: {OPEN_WITHOUT_KEYS}")


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


def waiting_for(spec: ClusterSpec, status: dict[str, Any], *, warm: bool) -> str:
    """What a cluster that comes up still lacks, in words."""
    if not warm:
        return "importing vLLM, once for all processes"
    hosts = sum(h["alive"] for h in status["hosts"])
    engines = sum(e["phase"] == "ready" for e in status["engines"])
    parts = []
    if hosts < spec.hosts:
        parts.append(f"expert hosts ({hosts} of {spec.hosts} ready)")
    if engines < spec.first_engines:
        parts.append(f"engines ({engines} of {spec.first_engines} ready)")
    return "loading " + " and ".join(parts) if parts else "waiting for the gateway"
