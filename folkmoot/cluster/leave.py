"""Leave a Ray node that is about to end: `python -m folkmoot.cluster.leave --within 50`, before it gets SIGTERM.

On Kubernetes this is the preStop hook of Ray's pods. It tells Ray that the node drains. Then Serve starts engines
elsewhere and lets those of this node finish or hand over what they run, at the latest when the time is up; and the
expert router places the experts of this node's hosts on others, while these go on serving until their end. It returns
as soon as both have happened.
"""

import argparse
import logging
import sys
import time
from typing import Any

import ray
from ray.core.generated import autoscaler_pb2

from folkmoot import logs
from folkmoot.cluster.ray_slots import gcs_client
from folkmoot.cluster.spec import ROUTER, namespace_of

log = logging.getLogger(__name__)

POLL_S = 0.5
ANSWER_S = 5.0


def leave(node: str, name: str, within_s: float) -> str:
    """Leave this node, of a Ray that is connected to; what still stands in the way after `within_s`, empty: nothing."""
    until_s = time.monotonic() + within_s
    drain(node, within_s)
    while True:
        left = remaining(_status(name), node)
        if not left or time.monotonic() > until_s:
            return left
        time.sleep(POLL_S)


def drain(node: str, within_s: float) -> None:
    """Tell Ray that a node will be gone after so long: nothing new is placed there. Raises RuntimeError if refused."""
    reason = autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
    until_ms = int((time.time() + within_s) * 1000)
    accepted, why_not = gcs_client().drain_node(node, reason, "the machine is being taken away", until_ms)
    if not accepted:
        raise RuntimeError(f"Ray does not drain node {node}: {why_not}")


def remaining(status: dict[str, Any], node: str) -> str:
    """What still keeps a drained node, in words, by the cluster's status document; empty: nothing.

    The hosts of a drained node have no place any more: they serve, but nobody counts on them.
    """
    engines = [e["engine"] for e in status.get("engines", []) if e.get("node") == node and e["phase"] != "dead"]
    if engines:
        return f"{', '.join(engines)} not stopped yet"
    if any(host["alive"] and host["node"] == node for host in status.get("hosts", [])):
        return "the expert router has not seen it yet"
    serving = [host for host in status.get("hosts", []) if host["alive"]]
    staying = {expert for host in serving if host["node"] is not None for expert in host["experts"]}
    lacking = sorted({expert for host in serving for expert in host["experts"]} - staying)
    return f"experts {lacking} are nowhere else yet" if lacking else ""


def _status(name: str) -> dict[str, Any]:
    """The status document; empty where no such cluster runs here."""
    try:
        router = ray.get_actor(ROUTER, namespace_of(name))
    except ValueError:
        return {}
    document: dict[str, Any] = ray.get(router.status.remote(), timeout=ANSWER_S)
    return document


def main() -> None:
    """Command line; exit code 1 where the time was not enough."""
    p = argparse.ArgumentParser(prog="python -m folkmoot.cluster.leave", description=__doc__)
    p.add_argument("--within", type=float, required=True, metavar="SECONDS", help="how long the node has")
    p.add_argument("--name", default="default", help="which cluster, if several run here (default: default)")
    args = p.parse_args()
    if args.within <= 0:
        p.error(f"--within must be more than 0, not {args.within:g}")
    logs.set_up("leave")
    ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    left = leave(ray.get_runtime_context().get_node_id(), args.name, args.within)
    if left:
        log.error("not all is done after %g s: %s", args.within, left)
        sys.exit(1)


if __name__ == "__main__":
    main()
