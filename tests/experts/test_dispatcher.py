"""The dispatcher against real host processes: exact rows on every transport, placement and through deaths."""

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from folkmoot.experts import expert_map as em
from folkmoot.experts.dispatch_config import DispatchConfig, DispatchError
from folkmoot.experts.dispatcher import Dispatcher
from folkmoot.experts.expert_map import NoReplicaError
from tests.experts.hosts import Hosts, expected

HIDDEN = 96


def batch(tokens: int, k: int, num_experts: int = 8, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> tuple:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn((tokens, HIDDEN), generator=g).to(dtype)
    ids = torch.stack([torch.randperm(num_experts, generator=g)[:k] for _ in range(tokens)]).int()
    weights = torch.rand((tokens, k), generator=g)
    return x, weights, ids


def dispatcher(hosts: Hosts, **settings: object) -> Dispatcher:
    return Dispatcher(DispatchConfig("test", hosts.secret_file, map_path=hosts.write_map(), **settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_rows_are_exact(hosts: Hosts, transport: str, dtype: torch.dtype, k: int) -> None:
    hosts.start("a", hosts.all_layers([6, 0, 1, 3]))
    hosts.start("b", {0: [7, 2, 4, 5], 3: [2, 4, 5, 7, 0]})
    d = dispatcher(hosts, transport=transport)
    for layer in (0, 3, 0):
        for tokens in (1, 7, 64):
            x, w, ids = batch(tokens, k, dtype=dtype, seed=tokens + layer)
            routed, shared = d.forward(layer, x, w, ids, lambda: torch.ones(1))
            assert torch.equal(routed, expected(layer, x, w, ids))
            assert shared is not None and shared.item() == 1
    assert sum(d.rows_served.values()) == 3 * (1 + 7 + 64) * k
    assert int(d.expert_rows().counts.sum()) == 3 * (1 + 7 + 64) * k
    d.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_products_may_be_rounded_before_they_are_added(hosts: Hosts, dtype: torch.dtype) -> None:
    hosts.start("a", hosts.all_layers(range(8)))
    config = DispatchConfig("test", hosts.secret_file, map_path=hosts.write_map())
    x, w, ids = batch(64, 4, dtype=dtype)
    x *= 1.1  # so that products are not exact
    fused, rounded = (Dispatcher(config, fused=fused).forward(3, x, w, ids)[0] for fused in (True, False))
    assert torch.equal(fused, expected(3, x, w, ids))
    assert torch.equal(rounded, expected(3, x, w, ids, fused=False))
    if dtype == torch.float32:
        assert not torch.equal(fused, rounded)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_weighted_sums_come_close(hosts: Hosts, transport: str) -> None:
    hosts.start("a", hosts.all_layers([0, 1, 2, 3]))
    hosts.start("b", hosts.all_layers([4, 5, 6, 7]))
    d = dispatcher(hosts, combine="sum", transport=transport)
    x, w, ids = batch(50, 4, dtype=torch.float32)
    torch.testing.assert_close(d.forward(0, x, w, ids)[0], expected(0, x, w, ids))
    d.close()


def test_many_tokens_are_split(hosts: Hosts) -> None:
    hosts.start("a", hosts.all_layers(range(8)))
    d = dispatcher(hosts, max_tokens=32)
    x, w, ids = batch(100, 2)
    assert torch.equal(d.forward(3, x, w, ids)[0], expected(3, x, w, ids))
    d.close()


def test_no_tokens(hosts: Hosts) -> None:
    hosts.start("a", hosts.all_layers(range(8)))
    d = dispatcher(hosts)
    x, w, ids = batch(4, 2)
    assert d.forward(0, x[:0], w[:0], ids[:0])[0].shape == (0, HIDDEN)
    d.close()


def test_replicas_share_the_rows(hosts: Hosts) -> None:
    for name in "ab":
        hosts.start(name, hosts.all_layers(range(8)))
    d = dispatcher(hosts)
    x, w, ids = batch(64, 2)
    assert torch.equal(d.forward(0, x, w, ids)[0], expected(0, x, w, ids))
    assert min(d.rows_served.values()) > 32  # of 128
    d.close()


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_killed_host_is_replaced_within_the_layer(hosts: Hosts, transport: str) -> None:
    """SIGKILL while rows are away: the layer finishes with the exact answer from the replica."""
    hosts.start("a", hosts.all_layers(range(8)))
    victim = hosts.start("b", hosts.all_layers(range(8)), stall_s=0.5)
    d = dispatcher(hosts, transport=transport)
    x, w, ids = batch(16, 2)
    threading.Timer(0.2, victim.kill).start()
    assert torch.equal(d.forward(0, x, w, ids)[0], expected(0, x, w, ids))
    assert victim.wait(5)  # it really died
    assert d.rows_served == {"a": 32}
    d.close()


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_stalled_host_is_replaced_after_its_deadline(hosts: Hosts, transport: str) -> None:
    hosts.start("a", hosts.all_layers(range(8)))
    victim = hosts.start("b", hosts.all_layers(range(8)))
    d = dispatcher(hosts, transport=transport, hedge_s=0.3, stall_s=0.3, call_timeout_s=0.3)
    x, w, ids = batch(16, 2)
    d.forward(0, x, w, ids)
    os.kill(victim.pid, signal.SIGSTOP)
    began = time.monotonic()
    assert torch.equal(d.forward(0, x, w, ids)[0], expected(0, x, w, ids))
    assert time.monotonic() - began > 0.29
    assert d.counts.dropped_hosts == 1
    assert torch.equal(d.forward(3, x, w, ids)[0], expected(3, x, w, ids))  # and it is not asked again
    d.close()


def links_here() -> int:
    """Segments that this process shares with hosts."""
    return sum("memfd:folkmoot-link" in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_an_idle_engine_lets_go_of_a_host_that_has_left_the_map(hosts: Hosts) -> None:
    """Without another call; during one its thread does, once it does not wait on that host."""
    hosts.start("a", hosts.all_layers(range(8)))
    leaving = hosts.start("b", hosts.all_layers(range(8)), stall_s=0.5)
    d = dispatcher(hosts, transport="shm")
    x, w, ids = batch(16, 2)
    d.forward(0, x, w, ids)
    both, without = links_here(), em.remove_host(hosts.map, "b")
    leave = threading.Timer(0.2, d.use_map, (without,))
    leave.start()
    assert torch.equal(d.forward(0, x, w, ids)[0], expected(0, x, w, ids))
    leave.join()
    assert d.rows_served["b"] > 16, "it was waited for, although it had left"
    d.use_map(replace(without, version=without.version + 1))
    assert links_here() == both - 1
    d.use_map(em.remove_host(replace(without, version=without.version + 1), "a"))
    assert links_here() == both - 2
    leaving.kill()
    d.close()


def test_no_replica_left_is_a_clear_error(hosts: Hosts) -> None:
    victim = hosts.start("a", hosts.all_layers(range(8)))
    d = dispatcher(hosts, no_replica_timeout_s=0.3)
    x, w, ids = batch(4, 2)
    d.forward(0, x, w, ids)
    victim.kill()
    with pytest.raises(NoReplicaError, match=r"layer 3, expert .* has no replica"):
        d.forward(3, x, w, ids)
    d.close()


def test_layer_waits_for_a_replacement(hosts: Hosts) -> None:
    """Without a replica the layer blocks until a newer map names a live host."""
    victim = hosts.start("a", hosts.all_layers(range(8)))
    d = dispatcher(hosts)
    x, w, ids = batch(4, 2)
    d.forward(0, x, w, ids)
    victim.kill()

    def replace() -> None:
        hosts.start("a2", hosts.all_layers(range(8)))
        d.use_map(hosts.map)

    threading.Timer(0.2, replace).start()
    assert torch.equal(d.forward(0, x, w, ids)[0], expected(0, x, w, ids))
    d.close()


def test_two_engines_share_a_host(hosts: Hosts) -> None:
    hosts.start("a", hosts.all_layers(range(8)))
    engines = [dispatcher(hosts), dispatcher(hosts, transport="tcp"), dispatcher(hosts)]
    failures: list[str] = []

    def run(d: Dispatcher, seed: int) -> None:
        for i in range(200):
            x, w, ids = batch(1 + i % 5, 2, seed=seed + i)
            if not torch.equal(d.forward(0, x, w, ids)[0], expected(0, x, w, ids)):
                failures.append(f"engine {seed}, call {i}")

    threads = [threading.Thread(target=run, args=(d, 1000 * i)) for i, d in enumerate(engines)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
        assert not t.is_alive()
    assert not failures
    for d in engines:
        d.close()


def test_ids_out_of_range(hosts: Hosts) -> None:
    hosts.start("a", hosts.all_layers(range(8)))
    d = dispatcher(hosts)
    x, w, ids = batch(4, 2)
    for bad in (-1, 8):
        ids[2, 1] = bad
        with pytest.raises(DispatchError, match=r"topk_ids outside 0\.\.7"):
            d.forward(0, x, w, ids)
    with pytest.raises(DispatchError, match="layer 1 is not in expert map"):
        d.forward(1, x, w, ids)
    d.close()


def test_unknown_setting_stops_the_start() -> None:
    with pytest.raises(DispatchError, match="unknown keys \\['spped'\\]"):
        DispatchConfig.from_json('{"engine": "e", "map_path": "m", "spped": 1}')
    with pytest.raises(DispatchError, match="exactly one of feed and map_path"):
        DispatchConfig.from_json('{"engine": "e", "secret_file": "s"}')


def test_a_host_idles_without_work(hosts: Hosts) -> None:
    """No process spins: an idle host with connections uses next to no processor time."""
    child = hosts.start("a", hosts.all_layers(range(8)))
    d = dispatcher(hosts)
    x, w, ids = batch(4, 2)
    d.forward(0, x, w, ids)

    def ticks() -> int:
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    before = ticks()
    time.sleep(1.0)
    assert ticks() - before <= 1  # of 100
    d.close()
