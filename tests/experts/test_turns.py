"""Parts that take turns on one thread, and dispatch for two of them over real hosts."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from greenlet import GreenletExit

from folkmoot.experts import turns
from folkmoot.experts.alternating import Alternating
from tests.experts.hosts import Hosts, expected
from tests.experts.test_dispatcher import batch, dispatcher


def in_turns(*parts: Callable[[], torch.Tensor | str]) -> list[torch.Tensor | str]:
    return turns.run(parts, lambda _: nullcontext())


def test_parts_take_turns_each_in_its_own_surroundings() -> None:
    seen: list[str] = []

    def part(name: str, steps: int) -> str:
        for i in range(steps):
            seen.append(f"{name}{i} as {turns.number()}")
            turns.give_way()
        return name

    @contextmanager
    def around(number: int) -> Iterator[None]:
        seen.append(f"in {number}")
        yield
        seen.append(f"out {number}")

    assert turns.run([partial(part, "a", 1), partial(part, "b", 2)], around) == ["a", "b"]
    first = ["in 0", "a0 as 0", "out 0", "in 1", "b0 as 1", "out 1"]
    assert seen == [*first, "in 0", "out 0", "in 1", "b1 as 1", "out 1", "in 1", "out 1"]


def test_outside_of_turns_nothing_gives_way() -> None:
    turns.give_way()
    assert turns.number() == 0


def test_an_error_ends_the_others() -> None:
    seen: list[object] = []

    def patient() -> str:
        try:
            turns.give_way()
        except GreenletExit as e:
            seen.append(e)
            raise
        return "never"

    def wrong() -> str:
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        in_turns(patient, wrong)
    assert len(seen) == 1


def test_two_halves_are_under_way_at_once_and_each_is_exact(hosts: Hosts) -> None:
    """Each call of a slow host takes 0.05 s, and the rows of both halves are posted before either is waited for."""
    hosts.start("a", hosts.all_layers(range(8)), stall_s=0.05)
    first = dispatcher(hosts)
    halves, posted = Alternating(first), list[int]()

    def half(seed: int) -> torch.Tensor:
        for layer in (0, 3):
            x, w, ids = batch(16, 2, seed=seed)
            routed, shared = halves.forward(layer, x, w, ids, lambda: posted.append(turns.number()) or torch.ones(1))
            assert torch.equal(routed, expected(layer, x, w, ids)) and shared is not None
            posted.append(10 + turns.number())
        return routed

    in_turns(partial(half, 1), partial(half, 2))
    assert posted == [0, 1, 10, 0, 11, 1, 10, 11], "shared experts run and rows are posted before the other half waits"
    counts = first._count()
    assert (counts["calls"], counts["rows"], counts["host_rows"]) == (4, 128, {"a": 128})
    assert int(first.expert_rows().counts.sum()) == 128
    first.close()


def test_a_host_that_dies_under_two_halves_is_replaced_for_both(hosts: Hosts) -> None:
    hosts.start("a", hosts.all_layers(range(8)))
    victim = hosts.start("b", hosts.all_layers(range(8)), stall_s=0.3)
    first = dispatcher(hosts)
    halves = Alternating(first)

    def half(seed: int, kill: bool) -> torch.Tensor:
        x, w, ids = batch(16, 2, seed=seed)

        def shared() -> torch.Tensor:
            if kill:
                os.kill(victim.pid, signal.SIGKILL)
            return torch.ones(1)

        routed, _ = halves.forward(0, x, w, ids, shared)
        assert torch.equal(routed, expected(0, x, w, ids))
        return routed

    in_turns(partial(half, 1, False), partial(half, 2, True))
    assert first._count()["dropped_hosts"] == 2, "each has a link of its own"
    third = hosts.start("c", hosts.all_layers(range(8)))
    first.use_map(replace(hosts.map, version=hosts.map.version + 1))
    in_turns(partial(half, 3, False), partial(half, 4, False))
    assert first._count()["host_rows"]["c"] > 0 and third.is_alive()
    assert all("c" in one.rows_served for one in (first, *first._others)), "both have the new map"
    first.close()
