"""The router's way from the store to a wish and back, on a real store: also after a restart, and for another run."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from folkmoot.cluster.operation_runner import OperationRunner
from folkmoot.cluster.router_events import SlotsSeen, Wished, apply
from folkmoot.cluster.router_state import RouterState
from folkmoot.cluster.spec import ClusterSpec
from folkmoot.cluster.wish import Wish
from folkmoot.cluster.wish_store import WishStore
from folkmoot.gateway.embedded import EmbeddedStore
from folkmoot.gateway.operations import FAILED, SUCCEEDED, UNDER_WAY, Command, Operation, Operations
from folkmoot.gateway.store import Store
from folkmoot.gateway.tasks import cancel
from tests.cluster.test_router_state import carried_out, running


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedStore]:
    with EmbeddedStore(tmp_path_factory.mktemp("store")) as server:
        yield server


@pytest.fixture
async def store(server: EmbeddedStore, tmp_path: Path) -> AsyncIterator[Store]:
    store = Store(server.url, f"t{tmp_path.name}")
    yield store
    await store.close()


def spec_of(run_dir: str = "/run/1") -> ClusterSpec:
    return ClusterSpec("d", "/m", "m", "A", (0, 1), 4, "redis", "ns", run_dir, "/logs")


class Router:
    """As much of the actor as an operation needs: a state that changes by wishes. A host comes up when told to."""

    def __init__(self, store: Store, state: RouterState) -> None:
        self.state = state
        self.wishes = 0
        self.is_in_charge = True
        wishes = WishStore(store, spec_of())
        self.runner = OperationRunner(
            spec_of(), Operations(store), wishes, lambda: self.state, self.wished, lambda: self.is_in_charge
        )

    async def wished(self, wish: Wish) -> None:
        self.wishes += 1
        self.state = apply(Wished(wish), self.state)

    async def __aenter__(self) -> "Router":
        self._tasks = [asyncio.create_task(self.runner.run()), asyncio.create_task(self.runner.watch())]
        return self

    async def __aexit__(self, *_: object) -> None:
        await cancel(self._tasks)


async def reached(operations: Operations, request_id: str, state: str) -> Operation:
    async with asyncio.timeout(10.0):
        while (operation := await operations.get(request_id)).state != state:
            await asyncio.sleep(0.02)
    return operation


async def test_an_operation_is_taken_up_once_and_ends_when_the_hosts_are_there(store: Store) -> None:
    operations = Operations(store)
    await operations.submit("x", Command("scale", "hosts", 3))
    async with Router(store, running(hosts=2)) as router:
        await reached(operations, "x", UNDER_WAY)
        assert router.wishes == 1 and len(router.state.wish.open_hosts) == 3
    assert await WishStore(store, spec_of()).load() == router.state.wish
    async with Router(store, router.state) as restarted:
        slots = tuple(
            replace(h.slot, host=name)
            for h, name in zip([restarted.state.hosts["host-0"]] * 3, restarted.state.wish.open_hosts, strict=True)
        )
        restarted.state = carried_out(apply(SlotsSeen(slots), restarted.state))
        while_draining = await operations.get("x")
        assert while_draining.state == UNDER_WAY
        restarted.state = replace(restarted.state, now_s=restarted.state.now_s + 60)
        restarted.state = carried_out(restarted.state)
        assert (await reached(operations, "x", SUCCEEDED)).message == "3 hosts, 2 replicas of each expert"
        assert restarted.wishes == 0, "a restarted router does not decide again what was decided"


async def test_a_refusal_is_written_down_and_changes_nothing(store: Store) -> None:
    operations = Operations(store)
    await operations.submit("x", Command("scale", "replicas", 9))
    async with Router(store, running(hosts=2)) as router:
        refused = await reached(operations, "x", FAILED)
        assert refused.code == 9 and "there are 2" in refused.message
        assert router.wishes == 0 and await WishStore(store, spec_of()).load() is None


async def test_the_wish_of_another_run_counts_no_more(store: Store) -> None:
    await WishStore(store, spec_of("/run/1")).save(Wish(2, 1, (3,)))
    assert await WishStore(store, spec_of("/run/1")).load() == Wish(2, 1, (3,))
    assert await WishStore(store, spec_of("/run/2")).load() is None


async def test_a_cluster_that_is_not_in_charge_leaves_operations_to_the_one_that_is(store: Store) -> None:
    operations = Operations(store)
    await operations.submit("a", Command("scale", "hosts", 3))
    other = Router(store, running(hosts=2))
    other.is_in_charge = False
    async with other, Router(store, running(hosts=2)) as ours:
        operation = await reached(operations, "a", UNDER_WAY)
        assert operation.message
        assert (other.wishes, ours.wishes) == (0, 1)
        ours.is_in_charge, other.is_in_charge = False, True
        await operations.submit("b", Command("scale", "hosts", 4))
        await reached(operations, "b", UNDER_WAY)
        assert (other.wishes, ours.wishes) == (1, 1)
