"""Two clusters on one real store: which of them answers for both."""

from dataclasses import replace

from folkmoot.cluster.charge import Charge
from folkmoot.cluster.spec import ClusterSpec
from folkmoot.gateway.store import Store
from tests.cluster.test_operation_runner import server, spec_of, store

__all__ = ["server", "store"]  # fixtures


def started(number: int) -> ClusterSpec:
    return replace(spec_of(f"/run/{number}"), started_s=float(number))


async def test_the_newer_cluster_takes_charge_once_it_can_serve(store: Store) -> None:
    older, newer = Charge(store, started(1)), Charge(store, started(2))
    assert await older.claim(can_serve=False), "nobody else is there"
    assert not await newer.claim(can_serve=False), "it cannot serve yet"
    assert await older.claim(can_serve=True)
    assert await newer.claim(can_serve=True)
    assert not await older.claim(can_serve=True)
    assert await newer.claim(can_serve=False), "it keeps it"
    assert (older.is_ours, newer.is_ours) == (False, True)


async def test_a_restarted_router_is_in_charge_as_before(store: Store) -> None:
    assert await Charge(store, started(1)).claim(can_serve=True)
    assert await Charge(store, started(1)).claim(can_serve=False)
    assert not await Charge(store, started(0)).claim(can_serve=True)


async def test_the_older_cluster_takes_over_where_the_newer_one_ends(store: Store) -> None:
    older, newer = Charge(store, started(1)), Charge(store, started(2))
    assert await newer.claim(can_serve=True)
    assert not await older.claim(can_serve=True)
    assert 0 < await store.command("PTTL", store.keys.charge) <= 10_000
    await store.command("PEXPIRE", store.keys.charge, 0)  # the newer one has been silent for so long
    assert await older.claim(can_serve=True)
