"""How quick each expert host counts as: what `speed=` says, or what hosts have measured, or their cores. Pure.

Hosts of one kind (a `--host-group`) count as alike: as the median of what they have measured. That is rounded to powers
of 1.25, since two measurements of one machine differ by some per cent, and a placement shall not follow those.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

from folkmoot.cluster.placement import HostSlot

STEP = 1.25

RowsPerS: TypeAlias = tuple[tuple[int, float], ...]
"""Rows/s by the number of rows in a call."""


def speed(rows_s: RowsPerS) -> float:
    """In one number: the geometric mean."""
    return statistics.geometric_mean(value for _, value in rows_s)


def with_speeds(slots: Sequence[HostSlot], measured: Mapping[str, RowsPerS]) -> dict[str, HostSlot]:
    """The slots by host, those of a kind with what hosts of that kind have measured. A kind that has not measured yet
    goes by its guess, against the guesses and speeds of those that have: so nothing changes before two have."""
    values: dict[int, list[float]] = {}
    guesses = {slot.kind: slot.speed for slot in slots if slot.kind is not None}
    for slot in slots:
        if slot.kind is not None and (rows_s := measured.get(slot.host)):
            values.setdefault(slot.kind, []).append(speed(rows_s))
    found = {kind: rounded(statistics.median(of_kind)) for kind, of_kind in values.items()}
    of_guess = statistics.median(found[kind] / guesses[kind] for kind in found) if found else 1.0
    speeds = {kind: found.get(kind, guess * of_guess) for kind, guess in guesses.items()}
    return {s.host: s if s.kind is None else replace(s, speed=speeds[s.kind]) for s in slots}


def rounded(value: float) -> float:
    """The nearest power of STEP."""
    return float(STEP ** round(math.log(value, STEP)))
