"""The cluster's status document: what the router knows, as JSON data that gateways serve and people read."""

import time
from typing import Any

from folkmoot.cluster.router_state import HostState, RouterState
from folkmoot.cluster.spec import ClusterSpec
from folkmoot.experts import expert_map as maps


def document(spec: ClusterSpec, state: RouterState, error: str | None) -> dict[str, Any]:
    """The document: keys are stable, new ones may come. Times are Unix seconds, sizes bytes."""
    missing = maps.missing(state.expert_map)
    return {
        "cluster": spec.name,
        "model": spec.model,
        "architecture": spec.architecture,
        "time_s": time.time(),
        "error": error,
        "map": {
            "version": state.expert_map.version,
            "layers": len(state.moe_layers),
            "experts": state.num_columns,
            "replicas_wanted": state.replicas,
            "replicas_least": min(_replica_counts(state), default=0),
            "missing": len(missing),
            "published": state.is_publishable,
        },
        "hosts": [_host(h) for h in sorted(state.hosts.values(), key=lambda h: h.host)],
        "engines": [
            {"engine": e.engine, "phase": e.phase, "pid": e.pid, **e.info}
            for e in sorted(state.engines.values(), key=lambda e: e.engine)
        ],
    }


def _replica_counts(state: RouterState) -> list[int]:
    return [len(replicas) for experts in state.expert_map.layers.values() for replicas in experts]


def _host(host: HostState) -> dict[str, Any]:
    return {
        "host": host.host,
        "phase": str(host.phase),
        "alive": host.phase == "ready",
        "node": host.node,
        "pid": host.pid,
        "actor_pid": host.actor_pid,
        "incarnation": host.incarnation,
        "experts": list(host.columns),
        "bytes": host.bytes,
        "shared_bytes": host.shared_bytes,
        "load_s": round(host.load_s, 3),
        "requests": host.requests,
        "rows": host.rows,
        "busy_s": round(host.busy_s, 3),
        "reason": host.reason,
    }
