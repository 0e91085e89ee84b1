"""The cluster as a Ray Serve application, for a Ray that others run: `import_path: folkmoot.cluster.app:build`.

`folkmoot up` starts Ray, a store and a gateway, and watches over them. Where Ray is somebody else's (KubeRay's, say),
and store and gateways run beside it, what is left is this: one small deployment that starts the expert router and the
engines, and counts as healthy once the first request can be served. It owns nothing: router, expert actors and engines
outlive it, and when it is started again it finds them.
"""

import logging
import os
import secrets
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import click
import ray
from pydantic import TypeAdapter
from ray import serve
from ray.serve.schema import ApplicationStatus

from folkmoot.cluster import environment, ray_runtime
from folkmoot.cluster.cli_common import ExpertDtype, Span
from folkmoot.cluster.cli_up import up
from folkmoot.cluster.expert_precision import decided
from folkmoot.cluster.launch import short_temp, waiting_for
from folkmoot.cluster.node_agent import WARM_TIMEOUT_S
from folkmoot.cluster.spec import ROUTER, ClusterSpec
from folkmoot.cluster.up_options import StartError, UpOptions, check_experts, make_spec, resolve_model
from folkmoot.experts import warm
from folkmoot.experts.warm import WarmParent
from folkmoot.gateway.metrics_server import OFF
from folkmoot.gateway.settings import GatewaySettings

log = logging.getLogger(__name__)

POLL_S = 0.5
STATUS_TIMEOUT_S = 20.0
NOT_HERE = frozenset({"address", "state_dir", *GatewaySettings.model_fields}) - {"redis", "metrics"}
"""Options of `folkmoot up` that have no meaning in an application; gateways have their own."""
OF_ONE_RUN = frozenset({"run_dir", "log_dir", "started_s", "secret", "environment", "expert_choice", "column_bytes"})
"""Fields of a spec that each cluster has for itself, or that follow from others when it is begun."""


@dataclass(frozen=True)
class AppOptions(UpOptions):
    """Arguments of the application: options of `folkmoot up`, and which nodes the parts run on."""

    address: str | None = "auto"
    redis: str | None = field(default=None, repr=False)
    """URL of the request store; None: the environment variable FOLKMOOT_REDIS, which keeps a password out of here"""
    metrics: str = "127.0.0.1:9464"
    """where each node answers Prometheus, the same on all of them; "off": nowhere"""
    router_resources: dict[str, float] = field(default_factory=dict)
    """custom Ray resources that the expert router asks of its node"""
    host_resources: dict[str, float] = field(default_factory=dict)
    """... each expert host"""
    engine_resources: dict[str, float] = field(default_factory=dict)
    """... each engine"""


def argument_names() -> frozenset[str]:
    """What an application may be given."""
    return frozenset(f.name for f in fields(AppOptions)) - NOT_HERE


def parse(arguments: dict[str, Any]) -> AppOptions:
    """The options that these arguments mean. Raises ValueError that names each field that is unknown or wrong."""
    if unknown := sorted(set(arguments) - argument_names()):
        raise ValueError(f"unknown arguments: {', '.join(unknown)}; known ones: {', '.join(sorted(argument_names()))}")
    options: AppOptions = TypeAdapter(AppOptions).validate_python(arguments)
    for option in up.params:
        has_limits = isinstance(option.type, click.Choice | click.IntRange | click.FloatRange | Span | ExpertDtype)
        if has_limits and option.name in arguments:
            most = arguments.get(f"most_{option.name}")
            try:
                option.type(arguments[option.name] if most is None else f"{arguments[option.name]}..{most}", option)
            except click.BadParameter as e:
                raise ValueError(f"{option.name}: {e.message}") from e
    if options.host_groups and (options.hosts is not None or options.experts_per_host is not None):
        raise ValueError("host_groups excludes hosts and experts_per_host")
    if options.hosts is not None and options.experts_per_host is not None:
        raise ValueError("hosts and experts_per_host exclude each other")
    host, _, port = options.metrics.rpartition(":")
    if options.metrics != OFF and not (host and port.isdecimal() and 0 < int(port) < 1 << 16):
        raise ValueError(f"metrics: must be HOST:PORT with a port that is known, or off, is {options.metrics!r}")
    return options


def build(arguments: dict[str, Any]) -> serve.Application:
    """The application. Raises ValueError for arguments that are not sound."""
    options = parse(arguments)
    actor = {"num_cpus": 0, "resources": options.router_resources}
    return Cluster.options(ray_actor_options=actor).bind(arguments)  # type: ignore[attr-defined]


@serve.deployment(
    name="Cluster",
    health_check_period_s=5.0,
    health_check_timeout_s=30.0,
    max_constructor_retry_count=3,
    logging_config={"enable_access_log": False},
)
class Cluster:
    """Starts a Folkmoot cluster in this Ray, or finds the one that runs; healthy while its expert router answers."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        options = parse(arguments)
        self._spec = _with_dtypes(adopted(wanted_spec(options)), options)
        environment.enter(self._spec.environment, "cluster")
        self._router = ray_runtime.start_router(self._spec, get_if_exists=True)
        if _engines(self._spec) in (None, ApplicationStatus.DEPLOY_FAILED):
            ray_runtime.start_engines(self._spec, wait=False)
        said = ""
        while lacking := self._lacking():
            if lacking != said:
                log.info("%s", lacking)
            said = lacking
            time.sleep(POLL_S)

    def status(self) -> dict[str, Any]:
        """The status document."""
        document: dict[str, Any] = ray.get(self._router.status.remote(), timeout=STATUS_TIMEOUT_S)
        return document

    def _lacking(self) -> str:
        """What keeps the cluster from serving, in words; empty: nothing. Raises StartError where Serve has given up."""
        status = self.status()
        engines = serve.status().applications[self._spec.app]
        if engines.status is ApplicationStatus.DEPLOY_FAILED:
            raise StartError(f"Ray Serve did not start the engines: {engines.message}")
        if status["map"]["published"] and engines.status is ApplicationStatus.RUNNING:
            return ""
        troubles = [f"{trouble['host']}: {trouble['detail']}" for trouble in status["healing"]]
        return "; ".join([waiting_for(self._spec, status, warm=True), *troubles])

    def check_health(self) -> None:
        """Raises where the expert router is gone for good; then this is started again, and starts another one."""
        ray.get(self._router.pid.remote(), timeout=STATUS_TIMEOUT_S)


def wanted_spec(options: AppOptions) -> ClusterSpec:
    """The cluster that is asked for, with a folder of its own on each node. Raises StartError, PlacementError."""
    redis = options.redis or os.environ.get("FOLKMOOT_REDIS")
    if not redis:
        raise StartError("no request store: give the argument redis, or set the environment variable FOLKMOOT_REDIS")
    path, shape = resolve_model(
        options.model, lambda message, fraction: log.info("%s (%.0f%%)", message, 100 * fraction)
    )
    check_experts(options, path, shape)
    run_dir = f"{short_temp()}/folkmoot-{secrets.token_hex(4)}"
    files = {"run_dir": run_dir, "log_dir": f"{run_dir}/logs"}
    spec = make_spec(options, path, shape, redis=redis, metrics=options.metrics, **files)
    return replace(
        spec,
        engine_gpus=options.gpus_per_engine,
        router_resources=options.router_resources,
        host_resources=options.host_resources,
        engine_resources=options.engine_resources,
    )


def adopted(wanted: ClusterSpec) -> ClusterSpec:
    """The spec of the cluster that runs in this Ray under the same name, or `wanted` where none does.

    Raises StartError where it was started with other arguments: engines and expert hosts that run would not be as is
    asked for now, so that takes another Ray cluster, which serves before this one ends.
    """
    try:
        router = ray.get_actor(ROUTER, wanted.namespace)
    except ValueError:
        return wanted
    running: ClusterSpec = ray.get(router.spec.remote(), timeout=STATUS_TIMEOUT_S)
    if changed := differences(running, wanted):
        raise StartError(
            f"{', '.join(changed)} cannot change in a running Ray cluster: start another one (docs/kubernetes.md, "
            "Upgrading); hosts, replicas and engines also change with `folkmoot scale`"
        )
    return running


def _with_dtypes(spec: ClusterSpec, options: AppOptions) -> ClusterSpec:
    """The spec with the dtype of each expert, where a budget decides it and it has not been decided yet. What is
    measured for that is measured with a warm parent of its own: this node may have no use for one later."""
    if spec.expert_choice is not None:
        return spec
    with ExitStack() as stack:

        def warm_parent() -> WarmParent:
            Path(spec.log_dir).mkdir(parents=True, exist_ok=True)
            socket = Path(spec.run_dir) / "measure.sock"
            process = warm.start(socket, spec.log("measure"))
            stack.callback(process.wait)
            stack.callback(process.terminate)
            return warm.connect(socket, WARM_TIMEOUT_S)

        return decided(spec, options.expert_loads, warm_parent, lambda message, _: log.info("%s", message))


def differences(running: ClusterSpec, wanted: ClusterSpec) -> list[str]:
    """Names of the fields in which two specs differ, but for what each cluster has for itself."""
    names = [f.name for f in fields(ClusterSpec) if f.name not in OF_ONE_RUN]
    return [name for name in names if getattr(running, name) != getattr(wanted, name)]


def _engines(spec: ClusterSpec) -> ApplicationStatus | None:
    """What Serve says of the engines; None: it has never heard of them."""
    application = serve.status().applications.get(spec.app)
    return None if application is None else application.status
