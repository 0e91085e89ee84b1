"""What an autoscaler asks of the store and tells it: tokens owed by lane and deadline, and that engines come and go.

Owed is all that was accepted and is not done, whether an engine holds it or nobody: leased requests count with the
tokens that they still lack. Who keeps work outside the queue (a batch of which only a part is queued) says so with
`Demands.owe`, again and again while it lives.
"""

import json
import math
import time
from dataclasses import asdict, dataclass
from typing import Any

from folkmoot.gateway.keys import LANES, Lane
from folkmoot.gateway.queue import Load
from folkmoot.gateway.store import Store

DEADLINE_STEP_S = 10.0
"""Deadlines are counted in steps of so long, rounded down."""
MOST_LOOKED_AT = 2000
"""Queue entries of which the deadline is read in one look; those beyond count as those within."""
OWED_S = 60.0
"""What `owe` said holds for so long."""
SCALING_S = 10.0
"""What `announce` said holds for so long."""

# ARGV: model, lane, entries to look at, step of deadlines in ms. Returns entries of the queue, tokens looked at, then
# pairs of deadline (ms) and tokens that are still to be made by then.
OWED = """
local root, model, lane = KEYS[1], ARGV[1], ARGV[2]
local most, step = tonumber(ARGV[3]), tonumber(ARGV[4])
local queue = root .. ':queue:' .. model .. ':' .. lane
local by_deadline, looked = {}, 0
for _, item in ipairs(redis.call('XRANGE', queue, '-', '+', 'COUNT', most)) do
  local values = redis.call('HMGET', root .. ':request:' .. item[2][2], 'cost', 'next', 'deadline', 'state')
  if values[1] and values[4] ~= 'done' then
    local at = math.floor(tonumber(values[3]) / step) * step
    local left = math.max(1, tonumber(values[1]) - tonumber(values[2]))
    by_deadline[at] = (by_deadline[at] or 0) + left
    looked = looked + 1
  end
end
local out = {redis.call('XLEN', queue), looked}
for at, tokens in pairs(by_deadline) do
  out[#out + 1] = at
  out[#out + 1] = tokens
end
return out
"""


@dataclass(frozen=True)
class Owed:
    """Estimated tokens, prompt and answer, that are due by `deadline_s` (Unix seconds; inf: some time)."""

    tokens: float
    deadline_s: float


@dataclass(frozen=True)
class Demand:
    """All that is owed of one model, at one time."""

    interactive: Load
    batch: Load
    submitted: int
    """interactive tokens, ever"""
    finished: int
    """tokens of requests that have ended, of both lanes, ever"""
    due: tuple[Owed, ...]
    """of the batch lane: in the queue, leased, and kept outside"""
    outside: float
    """of those, tokens that are kept outside"""


@dataclass(frozen=True)
class Scaling:
    """What the autoscaler says of itself while it lives. `start_s`: how long an engine takes to come."""

    model: str
    least: int
    most: int
    ready: int
    wanted: int
    start_s: float

    @property
    def accepts(self) -> bool:
        """Whether requests are welcome although no engine is up: one will be started for them."""
        return self.least == 0 < self.most


class Demands:
    """One store's demand. Every method may raise StoreError."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def read(self, model: str) -> Demand:
        """Everything that is owed now."""
        keys = self._store.keys
        loads = {lane: await self._load(model, lane) for lane in LANES}
        submitted = {lane: await self._submitted(model, lane) for lane in LANES}
        args = (model, "batch", MOST_LOOKED_AT, int(DEADLINE_STEP_S * 1000))
        length, looked, *pairs = await self._store.command("EVAL", OWED, 1, keys.root, *args)
        more = length / looked if looked else 1.0
        queued = [Owed(int(t) * more, int(at) / 1000) for at, t in zip(pairs[::2], pairs[1::2], strict=True)]
        outside = await self._outside(model)
        return Demand(
            interactive=loads["interactive"],
            batch=loads["batch"],
            submitted=submitted["interactive"],
            finished=sum(submitted.values()) - sum(o.waiting_tokens + o.running_tokens for o in loads.values()),
            due=(*queued, *outside),
            outside=sum(one.tokens for one in outside),
        )

    async def owe(self, model: str, source: str, tokens: float, deadline_s: float = math.inf) -> None:
        """Say for the next OWED_S that `source` (a name of its own) owes so many tokens outside the queue, due by
        `deadline_s` (Unix seconds). With no tokens: that it owes nothing any more."""
        key = self._store.keys.owed(model)
        if tokens <= 0:
            await self._store.command("HDEL", key, source)
            return
        until_s = time.time() + OWED_S
        deadline = None if math.isinf(deadline_s) else deadline_s
        await self._store.command("HSET", key, source, json.dumps([tokens, deadline, until_s]))
        await self._store.command("PEXPIRE", key, int(2 * OWED_S * 1000))

    async def announce(self, scaling: Scaling) -> None:
        """Say for the next SCALING_S that engines come and go."""
        text = json.dumps(asdict(scaling))
        await self._store.command("SET", self._store.keys.scaling, text, "PX", int(SCALING_S * 1000))

    async def withdraw(self) -> None:
        """Say that they do not, any more."""
        await self._store.command("DEL", self._store.keys.scaling)

    async def scaling(self) -> Scaling | None:
        """What an autoscaler has announced lately; None: there is none."""
        text = await self._store.command("GET", self._store.keys.scaling)
        return Scaling(**json.loads(text)) if text else None

    async def remember(self, model: str, facts: dict[str, Any]) -> None:
        """Keep what was found out of this model's engines."""
        await self._store.command("SET", self._store.keys.measured(model), json.dumps(facts))

    async def remembered(self, model: str) -> dict[str, Any]:
        """What `remember` was given last; empty at first."""
        text = await self._store.command("GET", self._store.keys.measured(model))
        facts: dict[str, Any] = json.loads(text) if text else {}
        return facts

    async def _submitted(self, model: str, lane: Lane) -> int:
        return int(await self._store.command("HGET", self._store.keys.load(model, lane), "submitted_tokens") or 0)

    async def _load(self, model: str, lane: Lane) -> Load:
        names = tuple(asdict(Load()))
        values = await self._store.command("HMGET", self._store.keys.load(model, lane), *names)
        return Load(**{name: int(value or 0) for name, value in zip(names, values, strict=True)})

    async def _outside(self, model: str) -> list[Owed]:
        key, now_s = self._store.keys.owed(model), time.time()
        flat = await self._store.command("HGETALL", key)
        owed = []
        for source, text in zip(flat[::2], flat[1::2], strict=True):
            tokens, deadline_s, until_s = json.loads(text)
            if until_s < now_s:  # whoever owed it is gone, or somebody else has taken it over
                await self._store.command("HDEL", key, source)
            else:
                owed.append(Owed(tokens, math.inf if deadline_s is None else deadline_s))
        return owed
