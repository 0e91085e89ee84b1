"""What the autoscaler measures: an engine's speed, how long one takes to start, what interactive work comes. Pure."""

import math
from dataclasses import dataclass, replace

from folkmoot.cluster.autoscale import Due, Seen

RATE_WINDOW_S = 120.0
"""Time constant of the mean of interactive work submitted."""
SPEED_HALF_LIFE_S = 600.0
"""Engine-seconds under full load after which a measurement counts half."""
SPEED_LEAST_S = 10.0
"""Engine-seconds under full load before a speed is believed."""
TRUTH_HALF_LIFE_S = 1800.0
TRUTH_LEAST, TRUTH_MOST = 10_000.0, 10.0
"""Estimated tokens finished before estimates are corrected; by at most this factor."""
START_WEIGHT = 0.3
"""Of the newest start in the mean of those seen."""
START_DEFAULT_S = 60.0
"""Until a start has been seen."""


@dataclass(frozen=True)
class Counts:
    """What can be counted at `now_s`. Tokens are estimates as in the queue, but for `processed`; counters only grow,
    apart from resets."""

    now_s: float
    ready: int
    """engines that serve"""
    target: int
    """engines asked for"""
    processed: float
    """tokens that engines have worked off, ever, as they really were"""
    submitted: float
    """interactive tokens, ever"""
    interactive_waiting: float
    interactive_running: float
    due: tuple[Due, ...] = ()
    """batch tokens, queued and leased"""
    batch_waiting: float = 0.0
    """those of them that no engine has leased"""
    finished: float = 0.0
    """tokens of requests that have ended, ever"""


@dataclass(frozen=True)
class Meter:
    """The measurements so far."""

    last: Counts | None = None
    busy_tokens: float = 0.0
    busy_s: float = 0.0
    rate: float = 0.0
    interactive_s: float = -math.inf
    """when something interactive was there last"""
    asked_s: tuple[float, ...] = ()
    """since when engines that are not there yet are asked for, the oldest first"""
    start_s: float = START_DEFAULT_S
    starts: int = 0
    done_tokens: float = 0.0
    done_estimate: float = 0.0
    """of what was worked off lately: tokens as they were, and as they had been estimated"""

    @property
    def truth(self) -> float:
        """Tokens that one estimated token turns out to be: answers are often shorter than they were allowed to be."""
        if self.done_estimate < TRUTH_LEAST:
            return 1.0
        return min(TRUTH_MOST, max(1 / TRUTH_MOST, self.done_tokens / self.done_estimate))

    @property
    def tokens_per_s(self) -> float | None:
        """Of one engine under full load; None: not known yet."""
        return self.busy_tokens / self.busy_s if self.busy_s >= SPEED_LEAST_S and self.busy_tokens > 0 else None


def known(tokens_per_s: float | None, start_s: float | None) -> Meter:
    """A meter that begins with what an earlier one, or an operator, found out."""
    meter = Meter() if start_s is None else Meter(start_s=start_s, starts=1)
    if tokens_per_s is None:
        return meter
    return replace(meter, busy_tokens=tokens_per_s * SPEED_LEAST_S, busy_s=SPEED_LEAST_S)


def measured(meter: Meter, now: Counts) -> Meter:
    """The meter after one more look."""
    meter = _starts(meter, now)
    if now.interactive_waiting + now.interactive_running > 0:
        meter = replace(meter, interactive_s=now.now_s)
    if (before := meter.last) is not None and (passed_s := now.now_s - before.now_s) > 0:
        came = max(0.0, now.submitted - before.submitted)
        if came:
            meter = replace(meter, interactive_s=now.now_s)
        weight = 1 - math.exp(-passed_s / RATE_WINDOW_S)
        meter = _truth(_speed(meter, before, now), before, now)
        meter = replace(meter, rate=meter.rate + weight * (came / passed_s - meter.rate))
    return replace(meter, last=now)


def seen(meter: Meter, now: Counts) -> Seen:
    """What the policy looks at: estimates corrected by what came of earlier ones."""
    return Seen(
        now_s=now.now_s,
        ready=now.ready,
        target=now.target,
        interactive_rate=meter.rate * meter.truth,
        interactive_waiting=now.interactive_waiting * meter.truth,
        interactive_idle_s=now.now_s - meter.interactive_s,
        due=tuple(Due(one.tokens * meter.truth, one.deadline_s) for one in now.due),
        tokens_per_s=meter.tokens_per_s,
        start_s=meter.start_s,
    )


def _speed(meter: Meter, before: Counts, now: Counts) -> Meter:
    """Counts where work was waiting all the time, so that every engine was full."""
    is_full = all(c.interactive_waiting + c.batch_waiting > 0 for c in (before, now))
    done = now.processed - before.processed
    if not is_full or now.ready != before.ready or not now.ready or done < 0:
        return meter
    engine_s = now.ready * (now.now_s - before.now_s)
    kept = 0.5 ** (engine_s / SPEED_HALF_LIFE_S)
    return replace(meter, busy_tokens=kept * meter.busy_tokens + done, busy_s=kept * meter.busy_s + engine_s)


def _truth(meter: Meter, before: Counts, now: Counts) -> Meter:
    done, estimate = now.processed - before.processed, now.finished - before.finished
    if done < 0 or estimate < 0:
        return meter
    kept = 0.5 ** ((now.now_s - before.now_s) / TRUTH_HALF_LIFE_S)
    return replace(
        meter, done_tokens=kept * meter.done_tokens + done, done_estimate=kept * meter.done_estimate + estimate
    )


def _starts(meter: Meter, now: Counts) -> Meter:
    """Match engines that came with when they were asked for."""
    before = meter.last
    came = max(0, now.ready - before.ready) if before is not None else 0
    for asked_s in meter.asked_s[:came]:
        took_s = now.now_s - asked_s
        mean_s = took_s if not meter.starts else meter.start_s + START_WEIGHT * (took_s - meter.start_s)
        meter = replace(meter, start_s=mean_s, starts=meter.starts + 1)
    waiting = meter.asked_s[came:]
    missing = max(0, now.target - now.ready)
    return replace(meter, asked_s=(*waiting, *[now.now_s] * (missing - len(waiting)))[:missing])
