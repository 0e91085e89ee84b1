"""Who may talk to whom, as NetworkPolicies have it: the rules of networking.k8s.io/v1, for pods of one namespace."""

from dataclasses import dataclass

from tests.k8s.checks import selects
from tests.k8s.manifests import Object, of_kind

HERE = {"kubernetes.io/metadata.name": "folkmoot"}


@dataclass(frozen=True)
class Peer:
    """A pod: its labels, and those of its namespace."""

    labels: dict[str, str]
    namespace: dict[str, str]


def ours(component: str) -> Peer:
    return Peer({"app.kubernetes.io/component": component}, HERE)


def may_talk(objects: list[Object], source: Peer, target: Peer, port: int) -> bool:
    """Whether a TCP connection gets through: out of the source's namespace and into the target's, if those are ours."""
    out = source.namespace != HERE or _allowed(objects, "Egress", source, target, port)
    return out and (target.namespace != HERE or _allowed(objects, "Ingress", target, source, port))


def _allowed(objects: list[Object], direction: str, pod: Peer, other: Peer, port: int) -> bool:
    """A pod that no policy of this direction selects may do anything; else one of them has to allow it."""
    policies = [o["spec"] for o in of_kind(objects, "NetworkPolicy") if direction in o["spec"]["policyTypes"]]
    mine = [spec for spec in policies if selects(spec["podSelector"], pod.labels)]
    peers = "to" if direction == "Egress" else "from"
    rules = [rule for spec in mine for rule in spec.get(direction.lower(), [])]
    return not mine or any(_has_port(rule, port) and _has_peer(rule.get(peers), other) for rule in rules)


def _has_port(rule: Object, port: int) -> bool:
    return "ports" not in rule or any(p["protocol"] == "TCP" and p["port"] == port for p in rule["ports"])


def _has_peer(peers: list[Object] | None, other: Peer) -> bool:
    """No list: anybody. A peer without a namespaceSelector: of this namespace."""
    return peers is None or any(_is_peer(peer, other) for peer in peers)


def _is_peer(peer: Object, other: Peer) -> bool:
    is_there = selects(peer["namespaceSelector"], other.namespace) if "namespaceSelector" in peer else _is_here(other)
    return is_there and selects(peer.get("podSelector", {}), other.labels)


def _is_here(other: Peer) -> bool:
    return other.namespace == HERE
