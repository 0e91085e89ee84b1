"""The cluster's status document: what the router knows, as JSON data that gateways serve and people read."""

import time
from dataclasses import asdict
from typing import Any

from folkmoot.cluster.healing import phase_of, start_error, troubles
from folkmoot.cluster.placement import HostSlot
from folkmoot.cluster.router_state import HostState, Life, RouterState
from folkmoot.cluster.spec import ClusterSpec
from folkmoot.experts import expert_map as maps
from folkmoot.experts.expert_map import ExpertMap


def document(
    spec: ClusterSpec, state: RouterState, error: str | None, scaling: dict[str, Any], balance: dict[str, Any]
) -> dict[str, Any]:
    """The document: keys are stable, new ones may come. Times are Unix seconds, sizes bytes."""
    missing, slots = maps.missing(state.expert_map), state.slots
    return {
        "cluster": spec.name,
        "model": spec.model,
        "architecture": spec.architecture,
        "time_s": time.time(),
        "error": error or start_error(state),
        "map": {
            "version": state.expert_map.version,
            "layers": len(state.moe_layers),
            "experts": state.num_columns,
            "replicas_wanted": state.wish.replicas,
            "replicas_least": min(_replica_counts(state), default=0),
            "missing": len(missing),
            "published": state.is_publishable,
        },
        "expert_dtype": spec.expert_dtype,
        "expert_choice": None if spec.expert_choice is None else spec.expert_choice.document(),
        "autoscaling": scaling,
        "balance": balance,
        "healing": [asdict(trouble) for trouble in troubles(state)],
        "hosts": [_host(h, slots[h.host], state) for h in sorted(state.hosts.values(), key=lambda h: h.host)],
        "engines": [
            {"engine": e.engine, "phase": e.phase, "pid": e.pid, **e.info}
            for e in sorted(state.engines.values(), key=lambda e: e.engine)
        ],
    }


def replicas(expert_map: ExpertMap) -> dict[str, Any]:
    """Where each logical expert is: `hosts`, their names, and `replicas` [layer][expert], indices into them."""
    names = list(expert_map.hosts)
    at = {host: i for i, host in enumerate(names)}
    layers = [
        [[at[one.host] for one in found] for found in experts] for _, experts in sorted(expert_map.layers.items())
    ]
    return {"map_version": expert_map.version, "hosts": names, "replicas": layers}


def _replica_counts(state: RouterState) -> list[int]:
    return [len(replicas) for experts in state.expert_map.layers.values() for replicas in experts]


def _host(host: HostState, slot: HostSlot, state: RouterState) -> dict[str, Any]:
    life = host.serving or host.pending or (host.lives[-1] if host.lives else Life(host.incarnation, host.columns))
    return {
        "host": host.host,
        "phase": phase_of(host, state),
        "alive": host.serving is not None,
        "node": host.node,
        "pid": life.pid,
        "actor_pid": life.actor_pid,
        "incarnation": life.incarnation,
        "experts": list(life.columns),
        "extra_replicas": len(life.extras),
        "capacity": slot.capacity,
        "speed": slot.speed,
        "rows_per_s": dict(host.rows_s),
        "threads": life.threads,
        "bytes": life.bytes,
        "shared_bytes": life.shared_bytes,
        "load_s": round(life.load_s, 3),
        "requests": life.requests,
        "rows": life.rows,
        "busy_s": round(life.busy_s, 3),
        "failures": host.failures,
        "reason": host.reason,
    }
