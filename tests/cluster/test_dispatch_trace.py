"""What a request's span says of dispatch: the growth of counts while it ran."""

import asyncio
from typing import Any

from folkmoot.cluster.dispatch_trace import LOOK_EVERY_S, DispatchTrace, grown


def counts(calls: int, rows: int, dropped: int = 0, **host_s: float) -> dict[str, Any]:
    settled = {"rows_again": 0, "late_hosts": 2, "waited_s": 0.5}
    return {"calls": calls, "rows": rows, **settled, "dropped_hosts": dropped, "host_s": host_s}


def test_growth_is_of_what_happened_meanwhile() -> None:
    before, now = counts(10, 100, a=1.0, b=2.0, c=9.0), counts(14, 180, dropped=1, a=1.25, b=2.5, c=9.0)
    assert grown(before, now) == {
        "folkmoot.dispatch.calls": 4, "folkmoot.dispatch.rows": 80, "folkmoot.dispatch.rows_again": 0,
        "folkmoot.dispatch.late_hosts": 0, "folkmoot.dispatch.dropped_hosts": 1, "folkmoot.dispatch.waited_s": 0.0,
        "folkmoot.dispatch.hosts": 2,
        "folkmoot.dispatch.slowest_host": "b", "folkmoot.dispatch.slowest_host_s": 0.5,
    }  # fmt: skip
    assert grown({}, {}) == {}
    assert grown(now, now)["folkmoot.dispatch.hosts"] == 0


async def test_it_looks_while_somebody_watches() -> None:
    trace, seen = DispatchTrace(), list[int]()

    def look() -> dict[str, Any]:
        seen.append(len(seen) + 1)
        return counts(seen[-1], 10 * seen[-1])

    async def looked(times: int) -> None:
        async with asyncio.timeout(10.0):
            while len(seen) < times:
                await asyncio.sleep(0.005)

    following = asyncio.create_task(trace.follow(look))
    with trace.watched(False) as unwanted:
        await asyncio.sleep(2 * LOOK_EVERY_S)
        assert not seen and unwanted.attributes() == {}
    with trace.watched(True) as first:
        await looked(2)
        with trace.watched(True) as second:
            begun = len(seen)
            await looked(begun + 2)
            assert second.before["calls"] > first.before["calls"] == 1, "each from its own first look on"
        assert second.attributes()["folkmoot.dispatch.rows"] >= 10
        await looked(len(seen) + 1)
    last = len(seen)
    await asyncio.sleep(4 * LOOK_EVERY_S)
    assert len(seen) <= last + 1, "nobody looks while nobody watches"
    assert first.attributes()["folkmoot.dispatch.calls"] in (last - 1, last)
    with trace.watched(True) as third:
        await looked(last + 2)
        assert third.before["calls"] > first.now["calls"], "not what was seen long ago"
    following.cancel()
