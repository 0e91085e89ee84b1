"""Rows that are not finite: hosts that lie are dropped, experts that overflow are believed, no request kills a host.

Each host can be told to lie by the row itself: `liar` in hosts.py is the bit of x[0] that makes its row NaN.
"""

import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from benchmarks.checkpoints import tiny
from folkmoot.experts import expert_map as em
from folkmoot.experts import secret, warm
from folkmoot.experts.dispatch_config import DispatchConfig
from folkmoot.experts.dispatcher import Dispatcher
from folkmoot.experts.doubt import liars
from folkmoot.experts.expert_map import HostAddress
from tests.experts.hosts import Hosts, expected
from tests.experts.test_dispatcher import batch, dispatcher

NAMES = "abc"
LIARS = st.integers(0, 7)  # for each token the hosts that lie about it, as bits


@pytest.fixture(scope="module")
def three(plain_parent: warm.WarmParent, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """Three hosts that hold everything, each a liar of its own bit."""
    hosts = Hosts(Path(tmp_path_factory.mktemp("hosts", numbered=True)), plain_parent)
    for bit, name in enumerate(NAMES):
        hosts.start(name, hosts.all_layers(range(8)), liar=bit)
    yield hosts
    hosts.close()


def lied_about(tokens: list[int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A batch in which token t's row makes the hosts of bits tokens[t] lie; -1: its x is itself not finite."""
    x, w, ids = batch(len(tokens), 2, dtype=dtype, seed=len(tokens))
    x[:, 0] = torch.tensor(tokens).to(dtype)
    x[x[:, 0] < 0] = math.inf
    return x, w, ids


def live(d: Dispatcher) -> set[str]:
    assert d._routes is not None
    return {link.address.host for link in d._routes.links}


@settings(deadline=None, max_examples=60)
@given(st.lists(st.just(-1) | LIARS, min_size=1, max_size=12), st.sampled_from(["rows", "sum"]), st.booleans())
def test_the_rule(three: Hosts, tokens: list[int], combine: str, in_float32: bool) -> None:
    """Whatever hosts lie about whatever tokens:

    - what at most one of the three lies about comes out right where one of them is honest; what all say comes out as
      they say; else it is the one or the other;
    - a host is dropped only for a lie that another one's answer refuted; one is always left.
    """
    x, w, ids = lied_about(tokens, torch.float32 if in_float32 else torch.bfloat16)
    d = dispatcher(three, combine=combine)
    routed = d.forward(0, x, w, ids)[0]
    right = expected(0, x, w, ids)
    provable = {name for bit, name in enumerate(NAMES) if any(m > 0 and m != 7 and m >> bit & 1 for m in tokens)}
    for t, mask in enumerate(tokens):
        if mask == 0 or (mask in (1, 2, 4) and len(provable) < 3) or (mask > 0 and routed[t].isfinite().all()):
            torch.testing.assert_close(routed[t], right[t], rtol=0 if combine == "rows" else 2e-2, atol=1e-6)
        if mask in (-1, 7):
            assert not routed[t].isfinite().any()
    dropped = set(NAMES) - live(d)
    assert dropped <= provable
    assert len(dropped) < 3
    if not provable:
        assert d.not_finite.refuted == 0
    d.close()


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)).filter(lambda p: p[0] != p[1]), max_size=12))
def test_hosts_that_accuse_each_other_are_never_all_dropped(pairs: list[tuple[int, int]]) -> None:
    accused, witnesses = np.array([p[0] for p in pairs], int), np.array([p[1] for p in pairs], int)
    dropped = set(liars(accused, witnesses))
    assert dropped <= {a for a, _ in pairs}
    if pairs:
        assert dropped, "somebody has lied"
        assert {w for _, w in pairs} - dropped, "somebody who speaks against it is believed"


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_a_liar_is_dropped_and_nothing_of_it_is_kept(three: Hosts, transport: str) -> None:
    d = dispatcher(three, transport=transport)
    x, w, ids = lied_about([1] * 32, torch.bfloat16)
    assert torch.equal(d.forward(0, x, w, ids)[0], expected(0, x, w, ids))
    assert live(d) == {"b", "c"}
    assert d.not_finite.refuted > 0
    d.close()


def test_what_all_replicas_say_is_the_truth(three: Hosts) -> None:
    """A poisonous request: every replica answers NaN to it. It is asked twice, all hosts stay, others are served."""
    d = dispatcher(three)
    x, w, ids = lied_about([0, 7, 0, 0], torch.bfloat16)
    right = expected(0, x, w, ids)
    for _ in range(3):
        routed = d.forward(0, x, w, ids)[0]
        assert torch.equal(routed[[0, 2, 3]], right[[0, 2, 3]])
        assert routed[1].isnan().all()
    assert live(d) == set(NAMES)
    assert (d.not_finite.confirmed, d.not_finite.refuted, d.not_finite.alone) == (6, 0, 0)
    d.close()


def test_a_request_that_is_not_finite_itself_accuses_nobody(three: Hosts) -> None:
    d = dispatcher(three)
    x, w, ids = lied_about([0, -1, 0], torch.bfloat16)
    served = 0
    for _ in range(2):
        assert torch.equal(d.forward(0, x, w, ids)[0][[0, 2]], expected(0, x, w, ids)[[0, 2]])
        served += 6
    assert sum(d.rows_served.values()) == served, "no row was asked for twice"
    assert (d.not_finite.confirmed, d.not_finite.refuted, d.not_finite.alone) == (0, 0, 0)
    d.close()


def test_without_another_replica_it_is_accepted_and_counted(hosts: Hosts) -> None:
    hosts.start("a", hosts.all_layers(range(8)), liar=0)
    d = dispatcher(hosts)
    x, w, ids = lied_about([0, 1], torch.bfloat16)
    routed = d.forward(0, x, w, ids)[0]
    assert torch.equal(routed[0], expected(0, x, w, ids)[0])
    assert routed[1].isnan().all()
    assert d.not_finite.alone == 2
    d.close()


@pytest.mark.parametrize("dies", [True, False], ids=["second-dies", "second-lives"])
def test_a_second_host_that_dies_while_it_is_asked(hosts: Hosts, dies: bool) -> None:
    """The only other replica is lost during the question: the first answer stands. With a third one, that decides."""
    hosts.start("a", {0: range(8)}, liar=0)
    victim = hosts.start("b", {0: [0, 1]}, stall_s=0.6)
    if not dies:
        hosts.start("c", {0: [0, 1]})
    d = dispatcher(hosts)
    x, w, _ = lied_about([1] * 4, torch.bfloat16)
    ids = torch.tensor([[5, 6]] * 4, dtype=torch.int32)
    d.forward(0, x, w, ids)  # nobody else holds these experts
    assert live(d) >= {"a", "b"}
    ids = torch.tensor([[0, 1]] * 4, dtype=torch.int32)
    assert d.not_finite.alone == 8
    killer = Killer(victim)
    routed = d.forward(0, x, w, ids)[0]
    killer.join()
    assert victim.wait(5)
    assert routed.isfinite().all() or dies
    if dies:
        assert live(d) == {"a"}
    d.close()


class Killer:
    """Kills a host a moment from now, from a thread."""

    def __init__(self, victim: warm.Child) -> None:
        import threading

        self._thread = threading.Timer(0.2, victim.kill)
        self._thread.start()

    def join(self) -> None:
        self._thread.join()


@pytest.mark.slow
def test_corrupted_weights(tmp_path: Path, short_dir: Path) -> None:
    """A real host with vLLM's kernels, whose weights of one expert are NaN, beside a sound replica."""
    good = tiny("mixtral", tmp_path / "good", dtype="float32")
    bad = tiny("mixtral", tmp_path / "bad", dtype="float32")
    file = next(bad.glob("*.safetensors"))
    weights = load_file(file)
    name = next(n for n in weights if "layers.1." in n and "experts.3." in n and n.endswith("w2.weight"))
    weights[name].fill_(math.nan)
    save_file(weights, file, metadata={"format": "pt"})
    process = warm.start(short_dir / "vllm.sock", short_dir / "vllm.log")
    children: list[warm.Child] = []
    try:
        parent = warm.connect(short_dir / "vllm.sock", 200.0)
        expert_map = em.empty([1], 8)
        for host, checkpoint in (("bad", bad), ("good", good)):
            child, address = start_real(parent, short_dir, host, checkpoint)
            children.append(child)
            expert_map = em.add_host(expert_map, address, {1: range(8)})
        (short_dir / "map.json").write_text(expert_map.to_json())
        config = DispatchConfig("test", str(short_dir / "secret"), map_path=str(short_dir / "map.json"))
        both, x = Dispatcher(config), torch.randn((24, 128))
        # The expert with the most rows is placed first, and goes to the first host.
        w, ids = torch.rand((24, 2)), torch.tensor([[3, e % 3] for e in range(24)], dtype=torch.int32)
        routed = both.forward(1, x, w, ids)[0]
        assert live(both) == {"good"}
        assert both.not_finite.refuted > 0
        (short_dir / "map.json").write_text(em.remove_host(expert_map, "bad").to_json())
        assert torch.equal(routed, Dispatcher(config).forward(1, x, w, ids)[0])
    finally:
        for child in children:
            child.kill()
        process.terminate()
        process.wait(10)


def start_real(parent: warm.WarmParent, folder: Path, host: str, checkpoint: Path) -> tuple[warm.Child, HostAddress]:
    """An expert host as in production."""
    spec = {
        "host": host,
        "incarnation": time.time_ns(),
        "checkpoint": str(checkpoint),
        "experts": {"1": list(range(8))},
        "unix_path": str(folder / f"{host}.sock"),
        "secret_file": str(secret.keep(folder / "secret")),
        "dtype": "float32",
    }
    child = parent.spawn("folkmoot.experts.host:main", spec, folder / f"{host}.log")
    ready = child.receive(60.0)
    assert ready is not None and ready["event"] == "ready", ready
    return child, HostAddress(**ready["address"])
