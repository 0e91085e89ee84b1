"""Who is next among tenants: shares by tokens and weights, deadlines within a tenant, and nothing left behind."""

import asyncio
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from folkmoot.gateway.embedded import EmbeddedStore
from folkmoot.gateway.errors import QueueFull, StoreRefused
from folkmoot.gateway.keys import LAYOUT
from folkmoot.gateway.pb import gateway_pb2 as pb
from folkmoot.gateway.queue import Append, Lease, Load, QueueSettings, RequestQueue, Room, Submission
from folkmoot.gateway.store import Store
from tests.gateway.conftest import token_request
from tests.gateway.echo import MODEL

ENDLESS = QueueSettings(lease_s=3600.0, max_waiting_requests=100_000)


def submission(
    request_id: str, tenant: str, cost: int = 8, lane: "pb.Lane" = pb.BATCH, remaining_s: float = 3600.0
) -> Submission:
    request = token_request(1, request_id=request_id, tenant=tenant, lane=lane, max_tokens=cost - 1)
    return Submission(request_id, MODEL.name, request, cost, remaining_s, grace_s=0.0)


async def finish(queue: RequestQueue, lease: Lease, used: int) -> None:
    """End a request that took `used` tokens, one of them the prompt."""
    response = pb.GenerateResponse(token_ids=[7] * (used - 1), finish=pb.Finish(reason=pb.STOP))
    response.usage.prompt_tokens = 1
    await queue.append_many([Append(lease.request_id, lease.epoch, response)])


@dataclass
class Tenant:
    """What one tenant has waiting, was served and has reserved, all in tokens."""

    weight: float
    waiting: int
    served: float = 0.0
    reserved: int = 0
    most: dict[str, float] | None = None  # other -> how far ahead of that one this one may be, in shares


JOBS = st.lists(st.tuples(st.integers(2, 40), st.integers(1, 20)), min_size=4, max_size=10)  # cost, of it unused
WEIGHTS = st.sampled_from([0.5, 1.0, 3.0])


@given(st.lists(st.tuples(WEIGHTS, JOBS), min_size=2, max_size=4), st.integers(1, 4), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None, database=None)
def _no_tenant_is_far_ahead(url: str, plans: Sequence[tuple[float, Any]], slots: int, random: Any) -> None:
    """The bound that shares.py states, after every event, in tokens that requests really took."""

    async def play() -> None:
        tenants = {f"t{i}": Tenant(weight, len(jobs)) for i, (weight, jobs) in enumerate(plans)}
        weights = {name: tenant.weight for name, tenant in tenants.items()}
        queue = RequestQueue(Store(url, f"s{secrets.token_hex(6)}"), replace(ENDLESS, tenant_weights=weights))
        used = {}
        for name, (_, jobs) in zip(tenants, plans, strict=True):
            for number, (cost, unused) in enumerate(jobs):
                used[f"{name}-{number}"] = max(2, cost - unused)
                await queue.submit(submission(f"{name}-{number}", name, cost))
        running: list[Lease] = []
        while running or any(tenant.waiting for tenant in tenants.values()):
            got = await queue.lease(MODEL.name, "e", 1) if len(running) < slots else []
            for lease in got:
                _leased(tenants, lease)
            running += got
            if not got:
                lease = running.pop(random.randrange(len(running)))
                tenant = tenants[lease.request.tenant]
                tenant.reserved -= lease.cost
                tenant.served += used[lease.request_id]
                await finish(queue, lease, used[lease.request_id])
            _assert_bounded(tenants)
        await queue.store.close()

    asyncio.run(play())


def _leased(tenants: dict[str, Tenant], lease: Lease) -> None:
    b = tenants[lease.request.tenant]
    b.most = {
        name: (a.reserved / a.weight + lease.cost / b.weight) for name, a in tenants.items() if a is not b and a.waiting
    }
    b.waiting -= 1
    b.reserved += lease.cost


def _assert_bounded(tenants: dict[str, Tenant]) -> None:
    for b in tenants.values():
        for name, most in (b.most or {}).items():
            a = tenants[name]
            if a.waiting:
                assert b.served / b.weight - a.served / a.weight <= most + 1e-6


def test_no_tenant_is_far_ahead(store_server: EmbeddedStore) -> None:
    _no_tenant_is_far_ahead(store_server.url)


async def test_weights_share_the_tokens(store_server: EmbeddedStore, namespace: str) -> None:
    """Estimates of one tenant are ten times too high; tokens are shared three to one all the same."""
    queue = RequestQueue(Store(store_server.url, namespace), replace(ENDLESS, tenant_weights={"gold": 3.0}))
    for i in range(600):
        await queue.submit(submission(f"g{i}", "gold", 100))
        await queue.submit(submission(f"p{i}", "plain", 10))
    served = {"gold": 0, "plain": 0}
    running: list[Lease] = []
    for _ in range(600):
        running += await queue.lease(MODEL.name, "e", 8 - len(running))
        lease = running.pop(0)
        served[lease.request.tenant] += 10
        await finish(queue, lease, 10)
    assert 2.5 < served["gold"] / served["plain"] < 3.5
    await queue.store.close()


@pytest.mark.parametrize("lane", [pb.INTERACTIVE, pb.BATCH])
async def test_a_flood_of_one_tenant_holds_up_no_other(queue: RequestQueue, lane: "pb.Lane") -> None:
    for i in range(200):
        await queue.submit(submission(f"f{i}", "flood", lane=lane))
    first = await queue.lease(MODEL.name, "e", 20)
    assert {lease.request.tenant for lease in first} == {"flood"}
    await queue.submit(submission("one", "quiet", lane=lane))
    (lease,) = await queue.lease(MODEL.name, "e", 1)
    assert lease.request_id == "one"


async def test_a_full_lane_has_room_for_who_has_less_than_a_share(store_server: EmbeddedStore, namespace: str) -> None:
    queue = RequestQueue(Store(store_server.url, namespace), QueueSettings(max_waiting_requests=8))
    for i in range(8):
        await queue.submit(submission(f"f{i}", "flood"))
    with pytest.raises(QueueFull):
        await queue.submit(submission("f8", "flood"))
    for i in range(4):
        await queue.submit(submission(f"q{i}", "quiet"))
    with pytest.raises(QueueFull):
        await queue.submit(submission("q4", "quiet"))
    taken = 0
    for i in range(100):  # as many names as anybody likes
        with suppress(QueueFull):
            taken += await queue.submit(submission(f"n{i}", f"name-{i}"))
    assert taken == 6  # the lane's 8 divided by the tenants is at least 1 up to 8 of them
    await queue.store.close()


async def test_earliest_deadline_first_else_in_order(queue: RequestQueue) -> None:
    for name in ("a", "b", "c"):
        await queue.submit(submission(name, "t"))
    for name, remaining_s in (("soon", 60.0), ("sooner", 30.0)):
        await queue.submit(submission(name, "t", remaining_s=remaining_s))
    order = [lease.request_id for lease in await queue.lease(MODEL.name, "e", 9)]
    assert order == ["sooner", "soon", "a", "b", "c"]


async def test_interactive_goes_first_and_batch_has_limits_of_its_own(queue: RequestQueue) -> None:
    for i in range(4):
        await queue.submit(submission(f"b{i}", "t", 10))
    await queue.submit(submission("i", "t", 10, pb.INTERACTIVE))
    assert [lease.request_id for lease in await queue.lease(MODEL.name, "e", 9, batch=Room(0))] == ["i"]
    assert [lease.request_id for lease in await queue.lease(MODEL.name, "e", 9, batch=Room(9, 15))] == ["b0", "b1"]
    assert [lease.request_id for lease in await queue.lease(MODEL.name, "e", 9, batch=Room(1))] == ["b2"]


async def test_hostile_tenant_names_leave_nothing_behind(store_server: EmbeddedStore, namespace: str) -> None:
    """Thousands of names that look like keys; finished, cancelled while they ran and while they waited."""
    queue = RequestQueue(Store(store_server.url, namespace), ENDLESS)
    names = [f"{i}:batch:{{x}} \n waiting" for i in range(2000)]
    for i, name in enumerate(names):
        await queue.submit(submission(f"r{i}", name))
    for lease in await queue.lease(MODEL.name, "e", 1000):
        await finish(queue, lease, 3)
    for lease in await queue.lease(MODEL.name, "e", 500):
        await queue.cancel(lease.request_id)
    for i in range(len(names)):
        if (await queue.status(f"r{i}")).state == pb.QUEUED:
            await queue.cancel(f"r{i}")
    keys, root = queue.store.keys, queue.store.keys.root
    _, found = await queue.store.command("SCAN", 0, "MATCH", f"{root.replace('{', '[{]')}:*", "COUNT", 1_000_000)
    left = {key.decode() for key in found if b":request:" not in key and b":journal:" not in key}
    assert left == {keys.layout, keys.queue(MODEL.name, "batch"), keys.load(MODEL.name, "batch")}
    assert await queue.store.command("XLEN", keys.queue(MODEL.name, "batch")) == 0
    assert await queue.tenant_loads(MODEL.name, "batch") == {}
    await queue.store.close()


async def test_tenants_with_the_most_load_come_first(queue: RequestQueue) -> None:
    for tenant, number in (("small", 1), ("large", 3), ("middle", 2)):
        for i in range(number):
            await queue.submit(submission(f"{tenant}{i}", tenant, 10))
    assert len(await queue.lease(MODEL.name, "e", 3)) == 3  # one of each
    loads = await queue.tenant_loads(MODEL.name, "batch", limit=2)
    assert loads == {"large": Load(2, 20, 1, 10), "middle": Load(1, 10, 1, 10)}
    assert list(loads) == ["large", "middle"]


async def test_a_store_of_an_older_layout_ends_its_requests_in_words(queue: RequestQueue) -> None:
    """As the version before wrote it: no set of waiting requests, a stream with a consumer group, no layout."""
    store, keys = queue.store, queue.store.keys
    entry = await store.command("XADD", keys.queue(MODEL.name, "interactive"), "*", "id", "old", "cost", 8)
    await store.command("XGROUP", "CREATE", keys.queue(MODEL.name, "interactive"), "engines", "0")
    old = {
        **{"model": MODEL.name, "lane": "interactive", "tenant": "", "digest": "d", "body": "", "cost": 8},
        **{"state": "queued", "epoch": 0, "attempts": 0, "engine": "", "entry": entry, "next": 0, "submitted": 1},
        **{"deadline": 1 << 45, "queue_deadline": 1 << 45, "grace": 0, "attended": 0, "retention": 60000},
        "watchers": "",
    }
    await store.command("HSET", keys.request("old"), *(part for item in old.items() for part in item))
    await store.command("HSET", keys.load(MODEL.name, "interactive"), "waiting_requests", 1, "waiting_tokens", 8)
    await store.command("HSET", keys.models, MODEL.name, "{}")
    await queue.submit(submission("new", "t", lane=pb.INTERACTIVE))
    status = await queue.status("old")
    assert (status.state, status.finish.code) == (pb.DONE, 14)
    assert "send it again" in status.finish.message
    assert (await queue.load(MODEL.name)).waiting_requests == 1
    assert [lease.request_id for lease in await queue.lease(MODEL.name, "e", 9)] == ["new"]
    assert int(await store.command("GET", keys.layout)) == LAYOUT


async def test_a_store_of_a_newer_layout_is_left_alone(queue: RequestQueue) -> None:
    await queue.store.command("SET", queue.store.keys.layout, LAYOUT + 1)
    with pytest.raises(StoreRefused, match=f"layout {LAYOUT + 1}, this version knows {LAYOUT}"):
        await queue.submit(submission("x", "t"))
    assert await queue.store.command("EXISTS", queue.store.keys.request("x")) == 0
