"""How many engines there should be: a pure function of what is owed, by when, and what an engine was seen to do.

Batch work asks for the fewest engines with which every deadline is met if nothing else comes: the largest, over all
deadlines, of the tokens due by then over the time until then. That is "Optimal Available" (Yao, Demers, Shenker: A
scheduling model for reduced CPU energy, 1995). An engine-hour costs the same whenever it is spent, so what can be saved
is idle time and starts. Therefore batch work fills what interactive work leaves; engines that are up are kept for as
long as there is work to fill them; and one without work is kept for as long as starting it takes: the break-even rule
of ski rental, which never costs more than twice the best in hindsight (Karlin, Manasse, Rudolph, Sleator: Competitive
snoopy caching, 1988; for servers Lin, Wierman, Andrew, Thereska: Dynamic right-sizing for power-proportional data
centers, 2011).

Interactive work gets square-root staffing (Halfin, Whitt: Heavy-traffic limits for queues with many exponential
servers, 1981): work that fills R engines gets R + head_room * sqrt(R).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Limits:
    """Fewest and most engines, both included."""

    least: int
    most: int

    def clip(self, engines: int) -> int:
        """The nearest number that is allowed."""
        return max(self.least, min(self.most, engines))


@dataclass(frozen=True)
class Due:
    """Batch tokens, queued and leased, that share a deadline (in seconds of the same clock as `now_s`; inf: none)."""

    tokens: float
    deadline_s: float


@dataclass(frozen=True)
class Seen:
    """The world at `now_s`. Tokens are the queue's estimates, prompt and answer; rates are in tokens/s."""

    now_s: float
    ready: int
    """engines that serve"""
    target: int
    """engines that serve or are being started, as asked for last"""
    interactive_rate: float
    """submitted lately"""
    interactive_waiting: float
    """tokens that no engine has leased"""
    interactive_idle_s: float
    """since when nothing interactive is there; 0 while something is, inf if there never was"""
    due: tuple[Due, ...]
    tokens_per_s: float | None
    """what one busy engine does; None: not measured yet"""
    start_s: float
    """from asking for an engine to its first token"""


@dataclass(frozen=True)
class Policy:
    """What operators may weigh. The defaults are those that did best in the simulator (docs/autoscaling.md)."""

    head_room: float = 0.6
    """of square-root staffing"""
    margin: float = 0.1
    """part of the time until a deadline that is kept in reserve"""
    idle_s: float = 300.0
    """the last engine stays for so long after the last interactive request"""


@dataclass(frozen=True)
class Memory:
    """What was needed lately: (when, engines), the newest last; older ones only where they were larger."""

    needed: tuple[tuple[float, int], ...] = ()


@dataclass(frozen=True)
class Decision:
    """Engines wanted, and why, for people. `late` is the first deadline that most engines cannot meet, if any."""

    engines: int
    reason: str
    late: float | None = None
    memory: Memory = field(default_factory=Memory)


def decide(seen: Seen, memory: Memory, limits: Limits, policy: Policy) -> Decision:
    """Engines wanted now: what is needed at once, and fewer only when no more were needed for a break-even time."""
    interactive, batch = for_interactive(seen, policy), for_batch(seen, limits, policy)
    needed = max(interactive, batch, kept_busy(seen, interactive))
    memory = remembered(memory, seen.now_s, needed, seen.start_s)
    wanted = limits.clip(max(count for _, count in memory.needed))
    late = first_late(seen, limits.most, policy) if batch >= limits.most else None
    return Decision(wanted, _reason(seen, interactive, batch, needed, wanted), late, memory)


def for_interactive(seen: Seen, policy: Policy) -> int:
    """Engines that interactive work needs. Those that wait are to be served within the time that a start takes."""
    if seen.interactive_idle_s > policy.idle_s:
        return 0
    if seen.tokens_per_s is None:
        return 1
    load = (seen.interactive_rate + seen.interactive_waiting / max(seen.start_s, 1.0)) / seen.tokens_per_s
    return max(1, math.ceil(load + policy.head_room * math.sqrt(load) - 1e-9))


def for_batch(seen: Seen, limits: Limits, policy: Policy) -> int:
    """The fewest engines that meet every deadline, or `limits.most` where even those do not."""
    due = [d for d in by_deadline(seen.due) if d.tokens > 0]
    if not due:
        return 0
    if seen.tokens_per_s is None:
        return 1  # to measure one
    return next((n for n in range(1, limits.most) if _meets_all(n, due, seen, policy)), limits.most)


def kept_busy(seen: Seen, interactive: int) -> int:
    """Of the engines asked for, those that batch work keeps busy for longer than a start takes: to let go of them now
    would save nothing, since the work is the same later."""
    if seen.tokens_per_s is None:
        return 0
    filled = sum(d.tokens for d in seen.due) / (seen.tokens_per_s * max(seen.start_s, 1.0))
    return min(seen.target, interactive + math.floor(filled))


def first_late(seen: Seen, engines: int, policy: Policy) -> float | None:
    """The first deadline that so many engines cannot meet, reserve left aside; None where they meet all, or their speed
    is not known."""
    tokens = 0.0
    for due in by_deadline(seen.due):
        tokens += due.tokens
        if due.tokens > 0 and seen.tokens_per_s and not _meets(engines, tokens, due.deadline_s, seen, margin=0.0):
            return due.deadline_s
    return None


def remembered(memory: Memory, now_s: float, needed: int, hold_s: float) -> Memory:
    """The memory with one more entry, without what is older than `hold_s` or can never be the largest again."""
    kept = tuple((t, count) for t, count in memory.needed if count > needed and t > now_s - hold_s)
    return Memory((*kept, (now_s, needed)))


def by_deadline(due: Sequence[Due]) -> list[Due]:
    """The earliest first."""
    return sorted(due, key=lambda d: d.deadline_s)


def _meets_all(engines: int, due: Sequence[Due], seen: Seen, policy: Policy) -> bool:
    tokens = 0.0
    for one in due:
        tokens += one.tokens
        if not _meets(engines, tokens, one.deadline_s, seen, policy.margin):
            return False
    return True


def _meets(engines: int, tokens: float, deadline_s: float, seen: Seen, margin: float) -> bool:
    """Whether so many engines do these tokens in time, beside interactive work as it is now. New ones need a start."""
    if math.isinf(deadline_s):
        return True
    assert seen.tokens_per_s is not None
    time_s = max(0.0, deadline_s - seen.now_s)
    old, new = min(engines, seen.ready), max(0, engines - seen.ready)
    engine_s = old * time_s + new * max(0.0, time_s - seen.start_s)
    return engine_s * seen.tokens_per_s - seen.interactive_rate * time_s >= tokens / (1 - margin)


def _reason(seen: Seen, interactive: int, batch: int, needed: int, wanted: int) -> str:
    owed = sum(d.tokens for d in seen.due)
    parts = [f"interactive work needs {interactive}"] if interactive else []
    if owed:
        parts.append(f"{owed:.0f} batch tokens need {batch}")
    if needed > max(interactive, batch):
        parts.append("batch work fills those that are up")
    elif wanted > needed:
        parts.append("more were needed a moment ago, or are the least")
    if seen.tokens_per_s is None and (interactive or owed):
        parts.append("an engine's speed is yet to be measured")
    return "; ".join(parts) or "nothing is owed"
