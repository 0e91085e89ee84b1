"""Expert hosts of several kinds: what `--host-group` says, and what it means for placement. Pure.

    --host-group 2:cpu=4,memory=8GiB --host-group 1:cpu=1

Two hosts with four cores and room for 8 GiB of experts each, and one with a core. A host's share of the experts goes by
its speed, as far as its memory allows; its speed is `speed`, of which only ratios matter; where no group says one, what
hosts of the group measure when they have loaded (host_speeds.py), and before that the number of its cores.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from folkmoot.cluster.placement import PlacementError

UNITS = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
KEYS = ("cpu", "memory", "speed")


@dataclass(frozen=True)
class HostGroup:
    """Hosts that are alike."""

    hosts: int
    cpus: float | None = None
    """cores that Ray reserves for each, and that it computes with; None: as of hosts without a group"""
    memory: int | None = None
    """bytes of experts that fit on each; None: no limit"""
    speed: float | None = None
    """against hosts of other groups; None: not known"""

    @property
    def guess(self) -> float:
        """Its speed before anything has been measured."""
        return self.speed or self.cpus or 1.0

    def capacity(self, column_bytes: int, most: int | None) -> int | None:
        """How many columns fit on a host of this group, of which none is ever given more than `most`."""
        limits = [] if most is None else [most]
        if self.memory is not None:
            limits.append(self.memory // max(1, column_bytes))
        return min(limits, default=None)


def parse(text: str) -> HostGroup:
    """One `--host-group`. ValueError says what is wrong with it."""
    count, _, rest = text.partition(":")
    if not count.isdigit() or int(count) < 1:
        raise ValueError(f"{text!r}: begins with the number of hosts, as in 2:cpu=4,memory=8GiB")
    values: dict[str, float] = {}
    for word in filter(None, rest.split(",")):
        key, _, value = word.partition("=")
        if key not in KEYS or key in values:
            raise ValueError(f"{text!r}: {word!r} is not one of {', '.join(f'{k}=...' for k in KEYS)}, each once")
        values[key] = _number(text, key, value)
    memory = values.get("memory")
    return HostGroup(int(count), values.get("cpu"), None if memory is None else int(memory), values.get("speed"))


def check_fit(
    groups: Sequence[HostGroup], num_columns: int, replicas: int, column_bytes: int, most: int | None
) -> None:
    """Raises PlacementError where the groups' memory does not hold all experts."""
    room = 0
    for group in groups:
        capacity = group.capacity(column_bytes, most)
        if capacity == 0:
            raise PlacementError(
                f"a host with {_mebibytes(group.memory or 0)} has no room for one expert of every layer, "
                f"which takes {_mebibytes(column_bytes)}"
            )
        room += group.hosts * min(num_columns, num_columns if capacity is None else capacity)
    if room < num_columns * replicas:
        raise PlacementError(
            f"{num_columns} experts x {replicas} replicas do not fit: the host groups have room for {room}, an expert "
            f"of every layer taking {_mebibytes(column_bytes)}: more memory or hosts, fewer replicas, or a smaller "
            "--expert-dtype"
        )


def _number(text: str, key: str, value: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]iB)?", value)
    if found is None or (found[2] and key != "memory") or float(found[1]) <= 0:
        form = "a size such as 8GiB" if key == "memory" else "a number above 0"
        raise ValueError(f"{text!r}: {key} is {form}, not {value!r}")
    return float(found[1]) * UNITS[found[2] or ""]


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"
