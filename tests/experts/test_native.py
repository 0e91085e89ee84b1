"""Routing, packing and combining in hop.c, against plain statements of what they must do."""

import ctypes
import os
import socket
import time

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from folkmoot.experts import native


def route(ids: np.ndarray, table: np.ndarray, hosts: int, done: np.ndarray, expert_cost: int = 4) -> tuple:
    pairs, (experts, replicas, _) = ids.size, table.shape
    columns = np.full((3, pairs), -9, np.int32)
    rows, cost = np.zeros(hosts, np.int32), np.zeros(hosts, np.int64)
    served, scratch = np.zeros(experts, np.int64), np.zeros(2 * experts, np.int32)
    status = native.route(
        ids.ctypes.data, pairs, experts, table.ctypes.data, replicas, hosts, done.ctypes.data, expert_cost,
        *(c.ctypes.data for c in columns), rows.ctypes.data, cost.ctypes.data, served.ctypes.data, scratch.ctypes.data,
    )  # fmt: skip
    return status, columns, rows, served


@st.composite
def routing(draw: st.DrawFn) -> tuple:
    experts, hosts = draw(st.integers(1, 12)), draw(st.integers(1, 5))
    replicas = draw(st.integers(1, hosts))
    table = np.full((experts, replicas, 2), -1, np.int32)
    for e in range(experts):
        chosen = draw(st.lists(st.integers(0, hosts - 1), unique=True, min_size=1, max_size=replicas))
        for i, host in enumerate(chosen):
            table[e, i] = (host, e)
    k, tokens = draw(st.integers(1, min(4, experts))), draw(st.integers(1, 20))
    ids = np.array([draw(st.permutations(range(experts)))[:k] for _ in range(tokens)], np.int32)
    done = np.array(draw(st.lists(st.integers(0, 1), min_size=tokens * k, max_size=tokens * k)), np.uint8)
    return ids, table, hosts, done, k


@settings(deadline=None)
@given(routing())
def test_every_pair_goes_to_one_replica_of_its_expert_and_comes_back(case: tuple) -> None:
    """Route, pack, a 'host' that tags rows, collect, combine: every pair's row is its own, in order."""
    ids, table, hosts, done, k = case
    tokens, pairs, hidden = ids.shape[0], ids.size, 3
    status, (host, row, slot), host_rows, served = route(ids, table, hosts, done)
    assert status == 0
    todo = [p for p in range(pairs) if not done[p]]
    for h in range(hosts):  # rows of a host are 0..n-1, each once
        assert sorted(row[p] for p in todo if host[p] == h) == list(range(host_rows[h]))
    for p in todo:  # a live replica of its expert
        assert [host[p], slot[p]] in table[ids.flat[p]].tolist()
    for e in range(len(table)):
        assert served[e] == sum(ids.flat[p] == e for p in todo)

    x = np.arange(tokens * hidden, dtype=np.float32).reshape(tokens, hidden)
    pointers, finished = np.zeros(pairs, np.uint64), np.where(done, 1, 0).astype(np.uint8)
    spare = np.zeros((pairs, hidden), np.float32)  # rows that were done before
    for p in range(pairs):
        spare[p] = x[p // k] * 100 + ids.flat[p]
        pointers[p] = spare[p].ctypes.data
    replies = []
    for h in range(hosts):
        rows, slots = np.zeros((host_rows[h], hidden), np.float32), np.zeros(host_rows[h], np.int32)
        native.pack(
            x.ctypes.data, hidden * 4, pairs, k, done.ctypes.data, host.ctypes.data, row.ctypes.data, slot.ctypes.data,
            h, rows.ctypes.data, slots.ctypes.data,
        )  # fmt: skip
        replies.append((rows * 100 + slots[:, None]).astype(np.float32))  # slot == expert in these tables
        native.collect(
            pairs, finished.ctypes.data, host.ctypes.data, row.ctypes.data, h, replies[-1].ctypes.data, hidden * 4,
            pointers.ctypes.data,
        )  # fmt: skip
    assert finished.all()
    weights, out = np.ones((tokens, k), np.float32), np.zeros((tokens, hidden), np.float32)
    native.combine(out.ctypes.data, 0, tokens, k, hidden, pointers.ctypes.data, weights.ctypes.data)
    np.testing.assert_array_equal(out, k * x * 100 + ids.sum(1, keepdims=True))


def test_an_expert_without_replica_and_an_unknown_one() -> None:
    table = np.array([[[0, 0]], [[-1, -1]]], np.int32)
    done = np.zeros(2, np.uint8)
    assert route(np.array([0, 1], np.int32), table, 1, done)[0] == -2
    for bad in (-1, 2):
        assert route(np.array([0, bad], np.int32), table, 1, done)[0] == native.OUT_OF_RANGE


def test_rows_are_levelled_over_replicas() -> None:
    table = np.array([[[0, e], [1, e]] for e in range(8)], np.int32)
    ids = np.array([0] * 8 + [1] * 4 + [2] * 2 + [3] * 2, np.int32)
    _, _, rows, _ = route(ids, table, 2, np.zeros(16, np.uint8), expert_cost=0)
    assert rows.tolist() == [8, 8]


@given(st.integers(1, 600), st.integers(1, 5), st.integers(0, 1 << 30))
@settings(deadline=None, max_examples=50)
def test_combine_rounds_once(hidden: int, k: int, seed: int) -> None:
    """bf16 and fp16: float32 accumulation in slot order, one rounding to nearest even at the end."""
    g = torch.Generator().manual_seed(seed)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        rows = torch.randn((k, hidden), generator=g).to(dtype)
        w = torch.rand(k, generator=g)
        total = w[0] * rows[0].float()
        for s in range(1, k):
            total = (w[s].double() * rows[s].double() + total.double()).float()
        pointers = np.array([rows[s].data_ptr() for s in range(k)], np.uint64)
        out = torch.empty(hidden, dtype=dtype)
        code = native.DTYPES[str(dtype).removeprefix("torch.")]
        native.combine(out.data_ptr(), code, 1, k, hidden, pointers.ctypes.data, w.data_ptr())
        assert torch.equal(out, total.to(dtype))


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
    post = native.Post(flag.ctypes.data, sleeping.ctypes.data, 1, theirs.fileno(), 0)
    native.post(ctypes.byref(post), 1)
    assert native.wait(w, 1, 40, 50_000) == 1
    assert w[0].state == native.READY
    w = waiter(flag, sleeping, ours.fileno(), want=2)
    theirs.close()
    assert native.wait(w, 1, 40, 1_000_000) == 1
    assert w[0].state == native.CLOSED
    ours.close()


def test_a_sleeper_is_rung() -> None:
    """Across processes: the child blocks, the parent's post wakes it long before the time-out."""
    memory = torch.zeros(16, dtype=torch.int64).share_memory_().numpy()
    ours, theirs = socket.socketpair()
    flag, sleeping = memory[:1].view(np.uint64), memory[8:9].view(np.uint32)
    if (pid := os.fork()) == 0:
        w = waiter(flag, sleeping, theirs.fileno())
        os._exit(0 if native.wait(w, 1, 40, 10_000_000) == 1 and w[0].state == native.READY else 1)
    deadline = time.monotonic() + 5
    while not sleeping[0] and time.monotonic() < deadline:
        time.sleep(0.001)
    assert sleeping[0] == 1
    began = time.monotonic()
    post = native.Post(flag.ctypes.data, sleeping.ctypes.data, 1, ours.fileno(), 0)
    native.post(ctypes.byref(post), 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert time.monotonic() - began < 5
    ours.close()
    theirs.close()
