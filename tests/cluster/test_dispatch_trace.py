"""What a request's span says of dispatch: the growth of counts while it ran."""

import asyncio
from typing import Any

from folkmoot.cluster.dispatch_trace import LOOK_EVERY_S, DispatchTrace, grown


def counts(calls: int, rows: int, dropped: int = 0, **host_s: float) -> dict[str, Any]:
    return {"calls": calls, "rows": rows, "rows_again": 0, "dropped_hosts": dropped, "waited_s": 0.5, "host_s": host_s}


def test_growth_is_of_what_happened_meanwhile() -> None:
    before, now = counts(10, 100, a=1.0, b=2.0, c=9.0), counts(14, 180, dropped=1, a=1.25, b=2.5, c=9.0)
    assert grown(before, now) == {
        "folkmoot.dispatch.calls": 4, "folkmoot.dispatch.rows": 80, "folkmoot.dispatch.rows_again": 0,
        "folkmoot.dispatch.dropped_hosts": 1, "folkmoot.dispatch.waited_s": 0.0, "folkmoot.dispatch.hosts": 2,
        "folkmoot.dispatch.slowest_host": "b", "folkmoot.dispatch.slowest_host_s": 0.5,
    }  # fmt: skip
    assert grown({}, {}) == {}
    assert grown(now, now)["folkmoot.dispatch.hosts"] == 0


async def test_it_looks_while_there_is_something_to_see() -> None:
    """Also once more after the last request has ended, so that the next one is not blamed for its last steps."""
    trace, seen = DispatchTrace(), list[int]()

    def look() -> dict[str, Any]:
        seen.append(min(len(seen) + 1, 3))
        return counts(seen[-1], 10 * seen[-1])

    async def looked(times: int) -> None:
        async with asyncio.timeout(10.0):
            while len(seen) < times:
                await asyncio.sleep(0.005)

    told = trace.of_request()
    following = asyncio.create_task(trace.follow(look, lambda: len(seen) < 2))
    await looked(4)  # two while busy, the third brings news, the fourth none
    await asyncio.sleep(4 * LOOK_EVERY_S)
    assert seen == [1, 2, 3, 3], "nobody looks while nothing changes"
    assert told()["folkmoot.dispatch.rows"] == 30
    assert trace.of_request()()["folkmoot.dispatch.rows"] == 0
    following.cancel()
