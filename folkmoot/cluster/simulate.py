"""A day in seconds: the autoscaling policy on a trace of arrivals, with engines that take time to start and to leave.

A fluid model: an engine works off so many tokens a second (with noise, and off by a constant that the policy has to
find out), interactive work first, then batches by deadline. What it does not know: batch sizes inside an engine, KV
cache, prefill apart from decoding, failures. A request waits until the work of its lane before it is done.
"""

import bisect
import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from folkmoot.cluster.autoscale import Due, Limits, Memory, Policy, decide
from folkmoot.cluster.autoscale_meter import Counts, Meter, known, measured, seen
from folkmoot.cluster.simulate_trace import Arrival

Planner = Callable[[Counts], int]
"""Engines wanted, given what can be counted. Called once a step, in order of time."""


@dataclass(frozen=True)
class World:
    """What engines are like in the simulation."""

    tokens_per_s: float = 2000.0
    """of one engine under full load"""
    start_s: float = 90.0
    """from asking for an engine to its first token, a node's start included"""
    drain_s: float = 10.0
    """from telling an engine to go to its end; it takes no new work then"""
    noise: float = 0.1
    """standard deviation of speeds and start-up times, as a part of them"""
    first_token_s: float = 0.3
    """time to the first token of a request that does not wait"""
    estimate: float = 1.0
    """what the queue takes a token for, before it is known how long answers really are"""
    step_s: float = 5.0
    """between two looks of the policy"""
    seed: int = 0


@dataclass(frozen=True)
class Sample:
    """One step: what was there, and what was asked for."""

    time_s: float
    ready: int
    target: int
    interactive_owed: float
    batch_owed: float


@dataclass(frozen=True)
class Outcome:
    """What came of a simulation."""

    deadlines: int
    misses: int
    """batches that were not done in time"""
    engine_hours: float
    """from asking for an engine to its end"""
    waits_s: tuple[tuple[float, int], ...]
    """time to the first token of interactive arrivals, and how many requests those were; sorted"""
    peak: int
    starts: int
    unfinished_tokens: float
    tokens_per_s: float
    """what an engine really did, but for the noise"""
    samples: tuple[Sample, ...]

    def ttft_s(self, quantile: float) -> float:
        """A quantile of the time to the first token of interactive requests; 0 where there are none."""
        total, passed = sum(n for _, n in self.waits_s), 0
        for wait_s, requests in self.waits_s:
            passed += requests
            if passed >= quantile * total:
                return wait_s
        return 0.0


@dataclass
class _Job:
    deadline_s: float
    left: float

    def __lt__(self, other: "_Job") -> bool:
        return self.deadline_s < other.deadline_s


@dataclass
class _Fleet:
    """Engines that serve, and when those that are being started will. `engine_s` is what all have cost."""

    world: World
    draw: random.Random
    ready: int = 0
    starting: list[float] = field(default_factory=list)
    engine_s: float = 0.0
    starts: int = 0
    peak: int = 0

    @property
    def target(self) -> int:
        return self.ready + len(self.starting)

    def resize(self, target: int, now_s: float) -> None:
        """Those that are not up yet go first, the youngest before the others."""
        while self.target < target:
            wait_s = self.world.start_s * max(0.3, self.draw.gauss(1.0, 2 * self.world.noise))
            bisect.insort(self.starting, now_s + wait_s)
            self.starts += 1
        while self.target > target and self.starting:
            self.starting.pop()
        if self.ready > target:
            self.engine_s += (self.ready - target) * self.world.drain_s
            self.ready = target
        self.peak = max(self.peak, self.target)

    def pass_time(self, now_s: float) -> None:
        """One step: it costs, and engines whose time has come serve from its end on."""
        self.engine_s += self.target * self.world.step_s
        while self.starting and self.starting[0] <= now_s:
            self.starting.pop(0)
            self.ready += 1


def run(
    trace: Sequence[Arrival], planner: Planner, world: World, on_time: Callable[[float], None] = lambda part: None
) -> Outcome:
    """Simulate until the last arrival and deadline are over and all is done, but for at most a day more. `on_time` is
    told how far it is, from 0 to 1."""
    state = _Run(trace, planner, world)
    end_s = max(a.time_s + (0.0 if math.isinf(a.deadline_s) else a.deadline_s) for a in trace)
    while state.now_s < end_s or (state.now_s < end_s + 86_400 and not state.is_done):
        state.step()
        on_time(min(1.0, state.now_s / end_s) if end_s else 1.0)
    return state.outcome()


class _Run:
    def __init__(self, trace: Sequence[Arrival], planner: Planner, world: World) -> None:
        draw = random.Random(world.seed)
        self.world, self.planner, self.trace, self.draw = world, planner, trace, draw
        self.fleet = _Fleet(world, draw)
        self.speed = world.tokens_per_s * max(0.5, draw.gauss(1.0, world.noise))
        self.now_s, self.at = 0.0, 0
        self.submitted = self.served = self.processed = 0.0
        self.jobs: list[_Job] = []
        self.waiting: deque[tuple[float, float, int]] = deque()  # interactive: tokens before it, arrival, requests
        self.waits: list[tuple[float, int]] = []
        self.misses = 0
        self.samples: list[Sample] = []

    @property
    def is_done(self) -> bool:
        return self.at == len(self.trace) and not self.jobs and self.submitted - self.served < 1e-6

    def step(self) -> None:
        self.fleet.resize(self.planner(self._counts()), self.now_s)
        owed = sum(job.left for job in self.jobs)
        behind = self.submitted - self.served
        self.samples.append(Sample(self.now_s, self.fleet.ready, self.fleet.target, behind, owed))
        until_s = self.now_s + self.world.step_s
        self._arrive(until_s)
        room = self.fleet.ready * self.speed * self.world.step_s * max(0.1, self.draw.gauss(1.0, self.world.noise))
        self._serve_batches(self._serve_interactive(room), until_s)
        self.fleet.pass_time(until_s)
        self.now_s = until_s

    def outcome(self) -> Outcome:
        left = sum(job.left for job in self.jobs)
        return Outcome(
            deadlines=sum(a.lane == "batch" and not math.isinf(a.deadline_s) for a in self.trace),
            misses=self.misses + sum(job.deadline_s < self.now_s for job in self.jobs),
            engine_hours=self.fleet.engine_s / 3600,
            waits_s=tuple(sorted(self.waits)),
            peak=self.fleet.peak,
            starts=self.fleet.starts,
            unfinished_tokens=left + self.submitted - self.served,
            tokens_per_s=self.speed,
            samples=tuple(self.samples),
        )

    def _counts(self) -> Counts:
        k = self.world.estimate
        due = tuple(Due(k * job.left, job.deadline_s) for job in self.jobs)
        return Counts(
            now_s=self.now_s,
            ready=self.fleet.ready,
            target=self.fleet.target,
            processed=self.processed,
            submitted=k * self.submitted,
            interactive_waiting=k * (self.submitted - self.served),
            interactive_running=0.0,
            due=due,
            batch_waiting=sum(d.tokens for d in due),
            finished=k * self.processed,
        )

    def _arrive(self, until_s: float) -> None:
        while self.at < len(self.trace) and self.trace[self.at].time_s < until_s:
            one = self.trace[self.at]
            self.at += 1
            if one.lane == "batch":
                heapq.heappush(self.jobs, _Job(one.time_s + one.deadline_s, one.tokens))
            else:
                self.waiting.append((self.submitted, one.time_s, one.requests))
                self.submitted += one.tokens

    def _serve_interactive(self, room: float) -> float:
        """What is left of the room. A request's turn comes once all that came before it is done."""
        while self.waiting and self.waiting[0][0] < self.served + room:
            ahead, came_s, requests = self.waiting.popleft()
            turn_s = self.now_s + (ahead - self.served) / room * self.world.step_s
            self.waits.append((max(0.0, turn_s - came_s) + self.world.first_token_s, requests))
        done = min(room, self.submitted - self.served)
        self.served += done
        self.processed += done
        return room - done

    def _serve_batches(self, room: float, until_s: float) -> None:
        while self.jobs and room > 0:
            job = self.jobs[0]
            done = min(room, job.left)
            job.left -= done
            self.processed += done
            room -= done
            if job.left <= 1e-6:
                heapq.heappop(self.jobs)
                self.misses += until_s > job.deadline_s + self.world.step_s


@dataclass
class Autoscaled:
    """The policy that the cluster uses, on what it measures itself. Begins with a rough idea of an engine."""

    limits: Limits
    policy: Policy = field(default_factory=Policy)
    meter: Meter = field(default_factory=lambda: known(None, None))
    memory: Memory = field(default_factory=Memory)

    def __call__(self, counts: Counts) -> int:
        self.meter = measured(self.meter, counts)
        decision = decide(seen(self.meter, counts), self.memory, self.limits, self.policy)
        self.memory = decision.memory
        return decision.engines


def fixed(engines: int) -> Planner:
    """Always the same number."""
    return lambda counts: engines


def smallest_fixed(
    trace: Sequence[Arrival],
    world: World,
    most: int,
    ttft_p99_s: float,
    on_time: Callable[[float], None] = lambda part: None,
) -> tuple[int, Outcome]:
    """The smallest fleet of a fixed size that meets all deadlines and serves interactive requests as quickly, or `most`
    where none does."""
    engines = 1
    while True:
        outcome = run(trace, fixed(engines), world, on_time)
        if engines >= most or (not outcome.misses and outcome.ttft_s(0.99) <= ttft_p99_s):
            return engines, outcome
        engines += 1
