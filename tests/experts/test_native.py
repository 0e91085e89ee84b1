"""Routing, packing and combining in hop.c, against plain statements of what they must do."""

import ctypes
import os
import socket
import time
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from folkmoot.experts import native, wire


class Hop:
    """One call of hop.c over private memory: links without sockets, and a 'host' that tags each row with its slot."""

    def __init__(
        self, x: np.ndarray, ids: np.ndarray, table: np.ndarray, links: int, weights: np.ndarray | None = None,
        flags: int = 0, expert_cost: int = 4, start: Sequence[int] = (),
    ) -> None:  # fmt: skip
        self.x, self.ids, self.table = x, np.ascontiguousarray(ids, np.int32), np.ascontiguousarray(table, np.int32)
        self.tokens, self.k = ids.shape
        pairs, (experts, replicas, _) = ids.size, table.shape
        self.weights = np.ones(ids.shape, np.float32) if weights is None else weights
        self.done, self.rows = np.zeros(pairs, np.uint8), np.zeros(pairs, np.uint64)
        self.host, self.row = np.zeros(pairs, np.int32), np.zeros(pairs, np.int32)
        self.factors, self.served = np.zeros(pairs, np.float32), np.zeros(experts, np.int64)
        self.scratch, self.cost = np.zeros(experts * (1 + replicas), np.int32), np.zeros(links, np.int64)
        self.start = np.array(start or [0] * links, np.int64)
        columns = {name: getattr(self, name).ctypes.data for name in (
            "x", "ids", "weights", "table", "done", "host", "row", "rows", "factors", "served", "scratch", "cost",
            "start",
        )}  # fmt: skip
        self.row_bytes = x.shape[1] * x.itemsize
        self.call = native.Call(
            **columns, map_version=7, row_bytes=self.row_bytes, pairs=pairs, k=self.k, experts=experts,
            replicas=replicas, links=links, expert_cost=expert_cost, layer=2, flags=flags,
        )  # fmt: skip
        size = pairs * self.row_bytes + 3 * 4 * pairs + 1024
        self.areas = np.zeros((links, 2, size), np.uint8)
        self.links = [
            native.Link(request=a[0].ctypes.data, reply=a[1].ctypes.data, reply_limit=size, fd=-1, number=100 + i)
            for i, a in enumerate(self.areas)
        ]
        self.pointers = (ctypes.c_void_p * links)(*(ctypes.addressof(link) for link in self.links))

    def begin(self) -> int:
        return int(native.begin(ctypes.addressof(self.call), self.pointers))

    def request(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """x, slots, tokens, weights as the host reads them."""
        header = self.links[i].header
        n, area = header.pairs, self.areas[i, 0]
        at, column = -(-n * self.row_bytes // 64) * 64, -(-n * 4 // 64) * 64
        ints = [area[at + j * column :][: 4 * n] for j in range(3)]
        x = area[: n * self.row_bytes].view(self.x.dtype).reshape(n, -1)
        return x, ints[0].view(np.int32), ints[1].view(np.int32), ints[2].view(np.float32)

    def reply(self, i: int, rows: np.ndarray, /, **changes: int) -> None:
        """Write rows as link i's reply and let hop.c check it; `changes` falsify the header."""
        header = native.Header.from_buffer_copy(self.links[i].header)
        header.kind, header.payload_bytes = 2, rows.nbytes
        for name, value in changes.items():
            setattr(header, name, value)
        self.areas[i, 1, : rows.nbytes] = np.ascontiguousarray(rows).view(np.uint8).ravel()
        link = ctypes.addressof(self.links[i])
        native.collect(ctypes.addressof(self.call), link, ctypes.addressof(header))

    def combine(self) -> np.ndarray:
        out = np.zeros_like(self.x)
        native.combine(ctypes.addressof(self.call), out.ctypes.data, 0, True)
        return out


@st.composite
def routing(draw: st.DrawFn) -> tuple:
    experts, links = draw(st.integers(1, 12)), draw(st.integers(1, 5))
    replicas = draw(st.integers(1, links))
    table = np.full((experts, replicas, 2), -1, np.int32)
    for e in range(experts):
        chosen = draw(st.lists(st.integers(0, links - 1), unique=True, min_size=1, max_size=replicas))
        for i, link in enumerate(chosen):
            table[e, i] = (link, e)  # slot == expert, so that a row's slot tells its expert
    k, tokens = draw(st.integers(1, min(4, experts))), draw(st.integers(1, 20))
    ids = np.array([draw(st.permutations(range(experts)))[:k] for _ in range(tokens)], np.int32)
    dead = draw(st.sets(st.integers(0, links - 1)))
    return ids, table, links, dead


@settings(deadline=None)
@given(routing(), st.sampled_from([0, 1]))
def test_every_pair_goes_to_one_replica_of_its_expert_and_comes_back(case: tuple, flags: int) -> None:
    """Begin, 'hosts' of which some never answer, a second round to live ones: each pair once, order restored."""
    ids, table, links, dead = case
    tokens, k = ids.shape
    x = np.arange(tokens * 3, dtype=np.float32).reshape(tokens, 3)
    weights = np.arange(1, ids.size + 1, dtype=np.float32).reshape(ids.shape)
    hop = Hop(x, ids, table, links, weights, flags)
    assert hop.begin() == 0
    assert hop.served.tolist() == [int((ids == e).sum()) for e in range(len(table))]
    copies = []
    for round_ in range(2):
        for i, link in enumerate(hop.links):
            assert (link.state == native.WAITING) == (link.rows > 0)
            if not link.rows or (round_ == 0 and i in dead):
                continue
            got_x, slots, tokens_of, w = hop.request(i)
            mine = [p for p in range(ids.size) if not hop.done[p] and hop.host[p] == 100 + i]
            assert link.rows == link.header.pairs == len(mine)
            np.testing.assert_array_equal(got_x, x[[p // k for p in mine]])
            np.testing.assert_array_equal(slots, ids.ravel()[mine])
            assert all([i, e] in table[e].tolist() for e in slots.tolist())
            rows = got_x * 100 + slots[:, None].astype(np.float32)
            if flags:
                sums = np.zeros((link.header.rows, 3), np.float32)
                np.add.at(sums, tokens_of, rows * w[:, None])
                rows = sums
            hop.reply(i, rows)
            assert link.state == native.DONE
        if hop.done.all():
            break
        live = np.where(hop.rows != 0)[0]
        for p in live.tolist():  # the second round overwrites the areas
            copies.append(np.ctypeslib.as_array((ctypes.c_float * 3).from_address(int(hop.rows[p]))).copy())
            hop.rows[p] = copies[-1].ctypes.data
        assert hop.begin() == 0
    assert hop.done.all()
    expected = (weights[:, :, None] * (x[:, None] * 100 + ids[:, :, None])).sum(1)
    np.testing.assert_allclose(hop.combine(), expected, rtol=1e-6)


def test_an_expert_without_replica_and_an_unknown_one() -> None:
    table = np.array([[[0, 0]], [[-1, -1]]], np.int32)
    x = np.zeros((1, 3), np.float32)
    assert Hop(x, np.array([[0, 1]]), table, 1).begin() == -2
    for bad in (-1, 2):
        assert Hop(x, np.array([[0, bad]]), table, 1).begin() == native.OUT_OF_RANGE


def test_rows_are_levelled_over_replicas() -> None:
    table = np.array([[[0, e], [1, e]] for e in range(8)], np.int32)
    ids = np.array([[e] for e in [0] * 8 + [1] * 4 + [2] * 2 + [3] * 2])
    hop = Hop(np.zeros((16, 3), np.float32), ids, table, 2, expert_cost=0)
    assert hop.begin() == 0
    assert [link.rows for link in hop.links] == [8, 8]


@pytest.mark.parametrize(
    ("rows", "cost", "expected"),
    [(64, 16, [22, 22, 20]), (32, 16, [16, 16, 0]), (31, 16, [31, 0, 0]), (3, 0, [1, 1, 1])],
)
def test_one_experts_rows_are_split_where_that_pays(rows: int, cost: int, expected: list[int]) -> None:
    """A replica takes part if it gets at least as many rows as reading the weights costs."""
    table = np.array([[[0, 5], [1, 6], [2, 7]]], np.int32)
    hop = Hop(np.zeros((rows, 3), np.float32), np.zeros((rows, 1), np.int32), table, 3, expert_cost=cost)
    assert hop.begin() == 0
    assert sorted((link.rows for link in hop.links), reverse=True) == expected
    for i, slot in enumerate((5, 6, 7)):
        assert not hop.links[i].rows or set(hop.request(i)[1].tolist()) == {slot}


def test_a_busy_host_gets_fewer_of_a_hot_experts_rows() -> None:
    table = np.array([[[0, 0], [1, 0]], [[0, 1], [-1, -1]]], np.int32)
    ids = np.array([[0]] * 60 + [[1]] * 20)
    hop = Hop(np.zeros((80, 3), np.float32), ids, table, 2, expert_cost=0)
    assert hop.begin() == 0
    assert [link.rows for link in hop.links] == [40, 40]


@pytest.mark.parametrize(("far", "expected"), [(0, [4, 4]), (40, [5, 3]), (1000, [8, 0])])
def test_near_replicas_are_taken_first(far: int, expected: list[int]) -> None:
    """The other host begins at a cost, and takes part where the near one would be busier than that."""
    table = np.array([[[0, e], [1, e]] for e in range(8)], np.int32)
    hop = Hop(np.zeros((8, 3), np.float32), np.arange(8)[:, None], table, 2, expert_cost=16, start=(0, far))
    assert hop.begin() == 0
    assert [link.rows for link in hop.links] == expected


@pytest.mark.parametrize(
    "change",
    [{"seq": 9}, {"layer": 3}, {"kind": 3}, {"map_version": 6}, {"engine_incarnation": 1}, {"host_incarnation": 1},
     {"rows": 2}, {"payload_bytes": 1 << 30}, {"magic": 0}],
)  # fmt: skip
def test_a_reply_that_does_not_match_is_refused(change: dict[str, int]) -> None:
    x = np.ones((1, 3), np.float32)
    hop = Hop(x, np.array([[0]]), np.array([[[0, 0]]]), 1)
    assert hop.begin() == 0
    hop.reply(0, x, **change)
    assert hop.links[0].state == native.WRONG
    assert not hop.done.any()


@given(st.integers(1, 600), st.integers(1, 5), st.integers(0, 1 << 30), st.booleans())
@settings(deadline=None, max_examples=50)
def test_combine_rounds_once(hidden: int, k: int, seed: int, fused: bool) -> None:
    """bf16 and fp16: float32 accumulation in slot order, one rounding to nearest even at the end."""
    g = torch.Generator().manual_seed(seed)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        rows = torch.randn((k, hidden), generator=g).to(dtype)
        w = torch.rand(k, generator=g)
        total = w[0] * rows[0].float()
        for s in range(1, k):
            if fused:
                total = (w[s].double() * rows[s].double() + total.double()).float()
            else:
                total = w[s] * rows[s].float() + total
        pointers = np.array([rows[s].data_ptr() for s in range(k)], np.uint64)
        out = torch.empty(hidden, dtype=dtype)
        call = native.Call(
            rows=pointers.ctypes.data, factors=w.data_ptr(), pairs=k, k=k, row_bytes=hidden * dtype.itemsize
        )
        code = native.DTYPES[str(dtype).removeprefix("torch.")]
        native.combine(ctypes.addressof(call), out.data_ptr(), code, fused)
        assert torch.equal(out, total.to(dtype))


def good_request(rows: int = 2, flags: int = 0) -> tuple[native.Connection, np.ndarray, list[np.ndarray]]:
    """A host's connection with a sound request of 8-byte rows for layer 1, and what keeps its memory alive."""
    area, num_slots = np.zeros(1024, np.uint8), np.array([0, 3], np.int32)
    private = np.zeros((2, 16), np.int32)
    size = 64 + (3 * 64 if flags else 4 * rows)
    header = native.Header(
        magic=wire.MAGIC, kind=1, flags=flags, seq=1, engine_incarnation=5, host_incarnation=6, layer=1, rows=rows,
        pairs=rows, payload_bytes=size,
    )  # fmt: skip
    connection = native.Connection(
        header=header, request=area.ctypes.data, num_slots=num_slots.ctypes.data, slots=private[0].ctypes.data,
        tokens=private[1].ctypes.data, engine_incarnation=5, host_incarnation=6, row_bytes=8, max_rows=4, num_layers=2,
    )  # fmt: skip
    return connection, area, [num_slots, private]


def test_a_host_takes_sound_requests_and_refuses_others() -> None:
    for flags in (0, 1):
        connection, _, _keep = good_request(flags=flags)
        assert native.take(ctypes.addressof(connection)) == 0
    for code, change in (
        (-1, {"magic": 1}), (-1, {"kind": 2}), (-1, {"flags": 2}), (-2, {"engine_incarnation": 4}),
        (-2, {"host_incarnation": 5}), (-3, {"seq": 2}), (-3, {"seq": 0}), (-4, {"layer": 0}), (-4, {"layer": 2}),
        (-4, {"layer": 2**32 - 1}), (-5, {"rows": 0}), (-5, {"rows": 3}), (-5, {"rows": 5, "pairs": 5}),
        (-6, {"payload_bytes": 71}), (-6, {"rows": 1}), (-6, {"payload_bytes": 2**32 - 1}),
    ):  # fmt: skip
        connection, _, _keep = good_request()
        for name, value in change.items():
            setattr(connection.header, name, value)
        assert native.take(ctypes.addressof(connection)) == code, change
    for slot in (-1, 3, 2**31 - 1):
        connection, area, _keep = good_request()
        area[64:72].view(np.int32)[1] = slot
        assert native.take(ctypes.addressof(connection)) == -7
    for token in (-1, 2):
        connection, area, _keep = good_request(flags=1)
        area[128:136].view(np.int32)[0] = token
        assert native.take(ctypes.addressof(connection)) == -8


@given(st.binary(min_size=64, max_size=64), st.binary(min_size=1024, max_size=1024))
@settings(deadline=None, max_examples=500)
def test_no_bytes_crash_a_host(header: bytes, area: bytes) -> None:
    """Whatever a header says, it is refused, or its indices are within bounds."""
    connection, memory, (_, private) = good_request()
    ctypes.memmove(ctypes.addressof(connection.header), header, 64)
    memory[:] = np.frombuffer(area, np.uint8)
    if native.take(ctypes.addressof(connection)) == 0:
        assert ((private >= 0) & (private < 3)).all()


def waiter(flag: np.ndarray, sleeping: np.ndarray, fd: int, want: int = 1) -> "ctypes.Array[native.Waiter]":
    array = (native.Waiter * 1)()
    array[0].flag, array[0].sleeping = flag.ctypes.data, sleeping.ctypes.data
    array[0].want, array[0].fd = want, fd
    return array


def test_wait_sees_a_flag_a_time_out_and_a_death() -> None:
    flag, sleeping = np.zeros(1, np.uint64), np.zeros(1, np.uint32)
    ours, theirs = socket.socketpair()
    w = waiter(flag, sleeping, ours.fileno())
    began = time.monotonic()
    assert native.wait(w, 1, 40, 50_000) == 0
    assert w[0].state == native.PENDING
    assert time.monotonic() - began >= 0.05
    flag[0] = 1
    assert native.wait(w, 1, 40, 50_000) == 1
    assert w[0].state == native.READY
    w = waiter(flag, sleeping, ours.fileno(), want=2)
    theirs.close()
    assert native.wait(w, 1, 40, 1_000_000) == 1
    assert w[0].state == native.CLOSED
    ours.close()


def test_a_sleeper_is_rung() -> None:
    """Across processes: an engine blocks for its reply, the host's answer wakes it long before the time-out."""
    memory = torch.zeros(512, dtype=torch.int64).share_memory_().numpy()
    page = memory.ctypes.data
    ours, theirs = socket.socketpair()
    if (pid := os.fork()) == 0:
        w = (native.Waiter * 1)()
        w[0].flag, w[0].sleeping = page + wire.OFF_REPLY_FLAG, page + wire.OFF_ENGINE_SLEEPING
        w[0].want, w[0].fd = 1, theirs.fileno()
        os._exit(0 if native.wait(w, 1, 40, 10_000_000) == 1 and w[0].state == native.READY else 1)
    deadline = time.monotonic() + 5
    while not memory[wire.OFF_ENGINE_SLEEPING // 8] and time.monotonic() < deadline:
        time.sleep(0.001)
    assert memory[wire.OFF_ENGINE_SLEEPING // 8] in range(1, 1 + (os.cpu_count() or 1))  # 1 + its core
    began = time.monotonic()
    connection = native.Connection(page=page, seq=1, fd=ours.fileno())
    native.answer(ctypes.addressof(connection), wire.REPLY, 0)
    assert os.waitpid(pid, 0)[1] == 0
    assert time.monotonic() - began < 5
    ours.close()
    theirs.close()


def test_a_library_of_another_version_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """With other structs it would write wherever it likes."""
    assert native._is_of_this_version(native._library)

    class Longer(native.Call):
        _fields_ = (("more", ctypes.c_void_p),)

    monkeypatch.setattr(native, "Call", Longer)
    assert not native._is_of_this_version(native._library)
    assert not native._is_of_this_version(ctypes.CDLL(None)), "one without the question"
