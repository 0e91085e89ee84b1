"""The least engine-hours that a trace can be served with by one who knows it, and the engines, beforehand.

A bound rather than a schedule, in slots of a minute. Interactive work has engines for its mean over ten minutes, with
the same head-room as the policy gives (`head_room` 0: none). They start just in time; between two needs one stays
where that is cheaper than starting it again. Batch work fills what those leave, earliest deadline first, which does as
much of it in time as can be done; each token of the rest takes its time of some engine, of which one at least has to be
started. Nobody who gives interactive work as much can do with less.
"""

import heapq
import math
from collections.abc import Sequence
from itertools import pairwise

from folkmoot.cluster.simulate import World
from folkmoot.cluster.simulate_trace import Arrival

SLOT_S = 60.0
RATE_SLOTS = 10
"""Slots over which the true rate of interactive work is taken."""


def engine_hours(trace: Sequence[Arrival], world: World, speed: float, head_room: float) -> float:
    """The bound. `speed`: tokens/s that an engine really has in this run."""
    slots = 1 + math.ceil(max(a.time_s + (0.0 if math.isinf(a.deadline_s) else a.deadline_s) for a in trace) / SLOT_S)
    base = interactive_engines(trace, speed, head_room, slots)
    spare = [n * speed * SLOT_S for n in base]
    for a in trace:
        if a.lane == "interactive":
            spare[int(a.time_s / SLOT_S)] -= a.tokens
    extra_s = left_over(trace, spare) / speed
    one_start_s = world.start_s if extra_s else 0.0
    return (held_s(base, world.start_s) + extra_s + one_start_s) / 3600


def interactive_engines(trace: Sequence[Arrival], speed: float, head_room: float, slots: int) -> list[int]:
    """Engines that interactive work must have in each slot."""
    tokens = [0.0] * slots
    for a in trace:
        if a.lane == "interactive":
            tokens[int(a.time_s / SLOT_S)] += a.tokens
    needed = []
    for slot in range(slots):
        around = tokens[max(0, slot - RATE_SLOTS // 2) : slot + RATE_SLOTS // 2]
        load = sum(around) / (len(around) * SLOT_S * speed) if around else 0.0
        needed.append(math.ceil(load + head_room * math.sqrt(load) - 1e-9))
    return needed


def held_s(needed: Sequence[int], start_s: float) -> float:
    """Engine-seconds that these needs cost: engine by engine, gaps shorter than a start are kept up."""
    total_s = 0.0
    for level in range(1, max(needed, default=0) + 1):
        up = [slot for slot, count in enumerate(needed) if count >= level]
        gaps = [(b - a - 1) * SLOT_S for a, b in pairwise(up)]
        total_s += len(up) * SLOT_S + start_s + sum(min(gap, start_s) for gap in gaps)
    return total_s


def left_over(trace: Sequence[Arrival], spare: Sequence[float]) -> float:
    """Batch tokens that this room (tokens a slot, perhaps negative) does not hold in time."""
    batches = [a for a in trace if a.lane == "batch"]
    jobs: list[tuple[float, float]] = []
    at, missed = 0, 0.0
    for slot, room in enumerate(spare):
        now_s = slot * SLOT_S
        while at < len(batches) and batches[at].time_s <= now_s:
            heapq.heappush(jobs, (batches[at].time_s + batches[at].deadline_s, batches[at].tokens))
            at += 1
        while jobs and jobs[0][0] < now_s + SLOT_S:
            missed += heapq.heappop(jobs)[1]
        left = max(0.0, room)
        while jobs and left > 0:
            deadline_s, tokens = heapq.heappop(jobs)
            done = min(left, tokens)
            left -= done
            if tokens > done:
                heapq.heappush(jobs, (deadline_s, tokens - done))
    return missed + sum(tokens for _, tokens in jobs) + sum(a.tokens for a in batches[at:])
