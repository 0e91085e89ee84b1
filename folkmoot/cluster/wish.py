"""What a cluster ought to look like, as last asked for: the expert router makes it so, and keeps it in the store.

Expert hosts are numbered for good. They come in groups, one a Ray placement group: the first of `folkmoot up`, another
with each growth. A host that is no longer wanted is *closed* (by scaling down: the next growth opens it again, as long
as its group has others) or *drained* (by name: it stays away).
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any

from folkmoot.cluster.autoscale import Limits
from folkmoot.cluster.spec import ClusterSpec


@dataclass(frozen=True)
class Place:
    """Where Ray keeps room for a host: the number of the placement group, and of the bundle in it."""

    group: int
    bundle: int


@dataclass(frozen=True)
class Wish:
    """Replicas of each expert column (`columns` names those with a number of their own), hosts, engines."""

    replicas: int
    engines: int
    groups: tuple[int, ...]
    """sizes of the placement groups"""
    closed: frozenset[str] = frozenset()
    drained: frozenset[str] = frozenset()
    forced: frozenset[str] = frozenset()
    """drained hosts that leave even if an expert is then without replica"""
    columns: Mapping[int, int] = field(default_factory=lambda: MappingProxyType({}))
    engine_version: int = 0
    """grows with each roll of the engines"""
    most_engines: int | None = None
    """None: exactly `engines`; else as many from there up to this as the autoscaler finds right"""
    host_limits: tuple[int, int] | None = None
    """fewest and most expert hosts, within which the autoscaler changes their number; None: it does not"""

    @property
    def engine_limits(self) -> Limits:
        """Fewest and most engines."""
        return Limits(self.engines, self.engines if self.most_engines is None else self.most_engines)

    def wanted(self, num_columns: int) -> tuple[int, ...]:
        """Replicas wanted of each column."""
        return tuple(self.columns.get(column, self.replicas) for column in range(num_columns))

    @property
    def places(self) -> dict[str, Place]:
        """All hosts there ever were, and their places."""
        every = [Place(group, bundle) for group, size in enumerate(self.groups) for bundle in range(size)]
        return {f"host-{number}": place for number, place in enumerate(every)}

    @property
    def open_hosts(self) -> tuple[str, ...]:
        """The hosts that are wanted."""
        return tuple(host for host in self.places if host not in self.closed and host not in self.drained)

    @property
    def open_groups(self) -> frozenset[int]:
        """Placement groups with a host that is wanted."""
        places = self.places
        return frozenset(places[host].group for host in self.open_hosts)

    def with_hosts(self, count: int) -> "Wish":
        """`count` hosts: the newest ones are closed, closed ones opened again, the rest is a new group."""
        open_hosts = self.open_hosts
        if count <= len(open_hosts):
            return replace(self, closed=self.closed | frozenset(open_hosts[count:]))
        places, kept = self.places, self.open_groups
        missing = count - len(open_hosts)
        again = [h for h in places if h in self.closed and h not in self.drained and places[h].group in kept][:missing]
        rest = missing - len(again)
        return replace(
            self, closed=self.closed - frozenset(again), groups=(*self.groups, rest) if rest else self.groups
        )

    def without_host(self, host: str, *, forced: bool) -> "Wish":
        """The host is drained."""
        return replace(
            self, drained=self.drained | {host}, forced=self.forced | {host} if forced else self.forced - {host}
        )

    def with_column(self, column: int, replicas: int) -> "Wish":
        """This many replicas of one column; as many as of the others is no exception any more."""
        columns = {c: n for c, n in self.columns.items() if c != column}
        if replicas != self.replicas:
            columns[column] = replicas
        return replace(self, columns=MappingProxyType(columns))

    def to_json(self) -> str:
        """As JSON; `from_json` makes an equal wish of it."""
        raw: dict[str, Any] = {**asdict(replace(self, columns={})), "columns": list(self.columns.items())}
        return json.dumps({k: sorted(v) if isinstance(v, frozenset) else v for k, v in raw.items()})

    @staticmethod
    def from_json(text: str | bytes) -> "Wish":
        """What `to_json` wrote. Raises ValueError, KeyError or TypeError for anything else."""
        raw = json.loads(text)
        sets = {name: frozenset(raw.pop(name)) for name in ("closed", "drained", "forced")}
        columns = MappingProxyType({int(c): int(n) for c, n in raw.pop("columns")})
        limits = None if raw["host_limits"] is None else tuple(raw["host_limits"])
        return Wish(**{**raw, **sets, "groups": tuple(raw["groups"]), "columns": columns, "host_limits": limits})


def first_wish(spec: ClusterSpec) -> Wish:
    """What `folkmoot up` asked for."""
    alike = (spec.hosts,) if spec.hosts else ()
    groups = tuple(group.hosts for group in spec.host_groups) or alike
    limits = None if spec.most_hosts is None else (spec.hosts, spec.most_hosts)
    return Wish(spec.replicas, spec.engines, groups, most_engines=spec.most_engines, host_limits=limits)
