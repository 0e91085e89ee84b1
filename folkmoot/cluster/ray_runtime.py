"""Ray and Serve as this project uses them: a small local cluster of one's own, or a running one that is joined."""

import contextlib
import io
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from folkmoot.cluster import ray_head
from folkmoot.cluster.autoscale import Limits
from folkmoot.cluster.spec import ROUTER, ClusterSpec
from folkmoot.cluster.wish import first_wish

OBJECT_STORE_BYTES = 80 << 20
"""Nothing but control messages goes through Ray, and this is about the least that it takes."""

TOKEN_FILE = Path.home() / ".ray" / "auth_token"
"""Where Ray keeps the token of clusters started on this machine."""

SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_task_events_report_interval_ms": "0",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",  # the controller wakes up less often; engines change rarely
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # nothing of Ray's on our terminal: the router knows why a host or an actor died
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def connect(address: str | None, namespace: str, temp_dir: Path, num_cpus: int, num_gpus: int | None = None) -> str:
    """Start a local Ray whose processes end with this one, or join the cluster at `address`. Returns its address."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    arguments: dict[str, Any] = {"namespace": namespace, "log_to_driver": False, "logging_level": logging.ERROR}
    if address is not None:
        arguments["address"] = address
        if "RAY_AUTH_TOKEN" in os.environ or TOKEN_FILE.exists():
            os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray's default for a cluster, but not for who joins one
    else:
        arguments |= {
            "address": "local",
            "include_dashboard": False,
            "num_cpus": num_cpus,
            "num_gpus": num_gpus,
            "object_store_memory": OBJECT_STORE_BYTES,
            "_temp_dir": str(temp_dir),
        }
    import ray  # reads its settings now

    on_terminate = signal.getsignal(signal.SIGTERM)
    with contextlib.redirect_stderr(io.StringIO()), ray_head.bare() if address is None else contextlib.nullcontext():
        context = ray.init(**arguments)
    signal.signal(signal.SIGTERM, on_terminate)  # ray.init sets its own
    return str(context.address_info["address"])


def start_router(spec: ClusterSpec, *, get_if_exists: bool = False) -> Any:
    """The expert router's actor: detached, so that it outlives the command that started it. ValueError where it exists,
    unless that one will do."""
    from folkmoot.cluster.router import ExpertRouter

    actor = ExpertRouter.options(  # type: ignore[attr-defined]
        name=ROUTER,
        namespace=spec.namespace,
        lifetime="detached",
        get_if_exists=get_if_exists,
        resources={**_beside_store(spec), **spec.router_resources},
    )
    return actor.remote(spec)


class Deployment:
    """The engines' deployment, brought up in a thread because Serve's own calls block."""

    def __init__(self, spec: ClusterSpec) -> None:
        self.error: Exception | None = None
        self._spec = spec
        self._thread = threading.Thread(target=self._run, name="serve", daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Whether Serve says that all replicas run, or has given up (`error`)."""
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            from ray import serve

            logging.getLogger("ray.serve").setLevel(logging.ERROR)
            serve.start(proxy_location="Disabled", logging_config={"enable_access_log": False})
            start_engines(self._spec, wait=True)
        except Exception as e:
            self.error = e


def start_engines(spec: ClusterSpec, *, wait: bool) -> None:
    """The engines' deployment as the spec has it."""
    deploy_engines(spec, first_wish(spec).engine_limits, 0, wait=wait, first=spec.first_engines)


def deploy_engines(spec: ClusterSpec, limits: Limits, version: int, *, wait: bool, first: int | None = None) -> None:
    """Tell Serve how many engines there should be, of which version: another number starts or drains some, another
    version replaces all, one by one, a new one first. Within limits that differ it asks our policy from then on, and
    begins with `first`, or with as many as there are."""
    from ray import serve

    from folkmoot.cluster.engine import Engine

    resources = {**_beside_store(spec), **spec.engine_resources}
    options = {"num_cpus": spec.engine_cpus, "num_gpus": spec.engine_gpus, "resources": resources}
    engines = Engine.options(  # type: ignore[attr-defined]
        **_number(spec, limits, first),
        ray_actor_options=options,
        max_surge_percent=1,  # rounded up: one
        version=str(version),  # Serve would make up one, and so replace all engines at every change of their number
        _internal=True,
    )
    target = serve.RunTarget(target=engines.bind(spec, version), name=spec.app, route_prefix=None)
    serve.run_many([target], wait_for_applications_running=wait)


def _number(spec: ClusterSpec, limits: Limits, first: int | None) -> dict[str, Any]:
    """Serve's options for a fixed number of replicas, or for one that our policy decides. All waiting is done there."""
    if limits.least == limits.most:
        return {"num_replicas": limits.least, "autoscaling_config": None}
    from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

    from folkmoot.cluster.autoscale_serve import EnginePolicy

    policy = AutoscalingPolicy(
        policy_function=EnginePolicy, policy_kwargs={"router": ROUTER, "namespace": spec.namespace}
    )
    config = AutoscalingConfig(
        min_replicas=limits.least,
        max_replicas=limits.most,
        initial_replicas=first,
        upscale_delay_s=0.0,
        downscale_delay_s=0.0,
        policy=policy,
    )
    return {"num_replicas": None, "autoscaling_config": config}


def _beside_store(spec: ClusterSpec) -> dict[str, float]:
    """What router and engines ask of their node: to be this one, where the request store listens on loopback."""
    import ray

    if not spec.several_nodes or urlsplit(spec.redis).hostname != "127.0.0.1":
        return {}
    return {f"node:{ray.util.get_node_ip_address()}": 0.001}


def tear_down(spec: ClusterSpec | None, *, joined: bool) -> None:
    """End this cluster's part of Ray. A local Ray ends as a whole; in a joined one only what is ours."""
    if "ray" not in sys.modules:
        return
    import ray

    if joined and spec is not None and ray.is_initialized():
        _remove_ours(spec)
    ray.shutdown()  # also where ray.init was interrupted half-way


def _remove_ours(spec: ClusterSpec) -> None:
    import ray
    from ray import serve
    from ray.util.placement_group import remove_placement_group

    from folkmoot.cluster.ray_slots import groups_of

    with contextlib.suppress(Exception):
        serve.delete(spec.app)
    names = [a["name"] for a in ray.util.list_named_actors(all_namespaces=True) if a["namespace"] == spec.namespace]
    for name in sorted(names, key=lambda name: name != ROUTER):  # the router first, or it starts others again
        with contextlib.suppress(ValueError):
            ray.kill(ray.get_actor(name, spec.namespace))
    for name in list(groups_of(spec)):
        with contextlib.suppress(ValueError):
            remove_placement_group(ray.util.get_placement_group(name))
