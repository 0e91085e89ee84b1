"""The queue's guarantees under any order of events, on both servers, against a model of a few lines.

Engines here are the worst kind: they keep every lease they ever had, write with any of them at any time, say things
twice, and vanish. Whatever they do, a journal grows only by the holder of the newest epoch, at its next offset.
How much one tenant can be ahead of another, and what is left of tenants that are gone: test_shares.py.
"""

import asyncio
import secrets
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from folkmoot.gateway.embedded import EmbeddedStore
from folkmoot.gateway.errors import RequestIdTaken
from folkmoot.gateway.journal import Stream
from folkmoot.gateway.keys import Keys
from folkmoot.gateway.pb import gateway_pb2 as pb
from folkmoot.gateway.queue import Append, Held, Lease, QueueSettings, RequestQueue, Room, Submission
from folkmoot.gateway.store import Store
from tests.gateway.conftest import token_request
from tests.gateway.echo import MODEL

T = TypeVar("T")
SETTINGS = QueueSettings(lease_s=3600.0, max_attempts=4)
TENANTS = st.sampled_from(["", "a:batch"])
ENGINES = st.sampled_from(["engine-1", "engine-2"])


@dataclass(eq=False)
class Truth:
    """What one request must look like."""

    lane: int
    tenant: str
    state: str = "queued"
    epoch: int = 0
    attempts: int = 0
    tries: int = 0  # of them, those since the last token
    tokens: list[int] = field(default_factory=list)
    expired: bool = False  # its lease, or handed back

    @property
    def is_given_up(self) -> bool:
        return self.tries == SETTINGS.max_attempts or self.attempts == 2 * SETTINGS.max_attempts

    @property
    def is_last_attempt(self) -> bool:
        return self.tries >= SETTINGS.max_attempts - 2 or self.attempts == 2 * SETTINGS.max_attempts - 1

    def may_join(self, here: "Sequence[Truth]") -> bool:
        """Whether it may be leased by an engine that runs those."""
        if not self.attempts:
            return True
        lost = [self.attempts, *(r.attempts - 1 for r in here if r.attempts > 1)]
        if len(lost) > min(4 ** (2 * SETTINGS.max_attempts - 1 - one) for one in lost):
            return False
        silent_or_many = any(r.tries or r.attempts > SETTINGS.max_attempts for r in here)
        return not (self.is_last_attempt and silent_or_many)

    def handed_back(self, failed: bool) -> None:
        if failed and self.is_given_up:
            self.state = "done"
        else:
            self.state = "queued"
            if not failed:
                self.attempts, self.tries = self.attempts - 1, max(0, self.tries - 1)


class QueueMachine(RuleBasedStateMachine):
    """Random events on one model's queue."""

    url: ClassVar[str]

    @initialize()
    def start(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.keys = Keys(f"p{secrets.token_hex(6)}")
        self.queue = RequestQueue(Store(self.url, self.keys.namespace), SETTINGS)
        self.truth: dict[str, Truth] = {}
        self.trials: dict[str, Truth] = {}
        self.engines = {"engine-1": "engine-1", "engine-2": "engine-2"}
        self.leases: list[tuple[str, Lease]] = []
        self.written: list[tuple[Append, Held]] = []

    def holder_of(self, request_id: str) -> str | None:
        """The engine that holds a request now."""
        known = self.truth[request_id]
        owners = {(lease.request_id, lease.epoch): engine for engine, lease in self.leases}
        return owners[request_id, known.epoch] if known.state == "running" else None

    def teardown(self) -> None:
        self.run(self.queue.store.close())
        self.loop.close()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    @rule(number=st.integers(0, 3), batch=st.booleans(), tenant=TENANTS)
    def submit(self, number: int, batch: bool, tenant: str) -> None:
        request_id = f"r{number}"
        lane = pb.BATCH if batch else pb.INTERACTIVE
        request = token_request(number, request_id=request_id, lane=lane, tenant=tenant)
        submission = Submission(request_id, MODEL.name, request, 8, remaining_s=3600.0, grace_s=0.0)
        known = self.truth.get(request_id)
        if known is not None and (known.lane, known.tenant) != (lane, tenant):
            with pytest.raises(RequestIdTaken):
                self.run(self.queue.submit(submission))
        else:
            assert self.run(self.queue.submit(submission)) == (known is None)
            self.truth.setdefault(request_id, Truth(lane, tenant))

    @rule(engine=ENGINES, room=st.integers(1, 3), batch_room=st.sampled_from([0, 1, 9]))
    def lease(self, engine: str, room: int, batch_room: int) -> None:
        free = [r for r in self.truth.values() if r.state == "queued" or (r.state == "running" and r.expired)]
        engine = self.engines[engine]
        buried = [r for r in free if r.is_given_up]
        here = [r for i, r in self.truth.items() if self.holder_of(i) == engine and not r.expired]
        open_to = [r for r in free if r not in buried and (batch_room or r.lane != pb.BATCH)]
        plain = [r for r in free if r not in buried and not r.is_last_attempt and r.may_join(here)]
        batch = sum(r.lane == pb.BATCH for r in plain)
        got = self.run(self.queue.lease(MODEL.name, engine, room, batch=Room(batch_room)))
        assert len(got) <= room
        assert sum(lease.is_batch for lease in got) <= batch_room
        taken = [self.truth[lease.request_id] for lease in got]
        for i, one in enumerate(taken):
            assert one.may_join([*here, *(replace(r, attempts=r.attempts + 1, tries=1) for r in taken[:i])])
        if (trial := self.trials.get(engine)) in here and trial is not None and trial.tries:
            assert got == [], "a trial is alone with what has moved on"
        elif any(r.is_last_attempt for r in taken):
            assert len(got) == 1, "nothing joins a trial"
        elif not here:
            assert got or not open_to, "an idle engine takes something"
        elif set(plain) == set(free):
            assert len(got) >= min(room, len(plain) - batch + min(batch, batch_room))
        for lease in got:
            known = self.truth[lease.request_id]
            assert known in free
            assert (lease.epoch, list(lease.token_ids)) == (known.epoch + 1, known.tokens)
            known.state, known.expired = "running", False
            if known.is_last_attempt:
                self.trials[engine] = known
            known.epoch, known.attempts, known.tries = lease.epoch, known.attempts + 1, known.tries + 1
            assert lease.attempt == known.attempts <= 2 * SETTINGS.max_attempts
            assert known.tries <= SETTINGS.max_attempts
            self.leases.append((engine, lease))
        for known, request_id in [(r, i) for i, r in self.truth.items() if r in buried]:
            if self.run(self.queue.status(request_id)).state == pb.DONE:
                known.state = "done"
        lanes = [self.truth[lease.request_id].lane for lease in got]
        assert lanes == sorted(lanes)  # interactive first

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), size=st.integers(0, 3), last=st.booleans(), off=st.sampled_from([0, 0, 0, 0, 1, -1]))
    def append(self, data: st.DataObject, size: int, last: bool, off: int) -> None:
        _, lease = data.draw(st.sampled_from(self.leases))
        known = self.truth[lease.request_id]
        offset = max(0, len(known.tokens) + off)
        if not size and not last:
            return
        # The epoch is part of the token, so that a token of the wrong holder shows.
        tokens = [lease.epoch * 100 + offset + i for i in range(size)]
        response = pb.GenerateResponse(offset=offset, token_ids=tokens)
        if last:
            response.finish.reason = pb.LENGTH
        one = Append(lease.request_id, lease.epoch, response)
        (answer,) = self.run(self.queue.append_many([one]))
        current = known.epoch == lease.epoch
        if current and known.state == "running" and offset == len(known.tokens):
            assert answer == Held.OK
            known.tokens += tokens
            known.state = "done" if last else known.state
            known.tries = 0
            self.written.append((one, answer))
        else:
            assert answer != Held.OK or (current and offset + size <= len(known.tokens)), "a late write was taken"

    @precondition(lambda self: self.written)
    @rule(data=st.data())
    def say_it_again(self, data: st.DataObject) -> None:
        """A reply was lost: the same append is sent a second time. The journal does not change (see the invariant)."""
        one, _ = data.draw(st.sampled_from(self.written))
        self.run(self.queue.append_many([one]))

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), failed=st.booleans())
    def release(self, data: st.DataObject, failed: bool) -> None:
        _, lease = data.draw(st.sampled_from(self.leases))
        known = self.truth[lease.request_id]
        (answer,) = self.run(self.queue.release([lease], "boom" if failed else ""))
        if known.state == "running" and known.epoch == lease.epoch:
            known.handed_back(failed)
            assert answer == ("buried" if known.state == "done" else "requeued")
        else:
            assert answer in ("lost", "done")

    @precondition(lambda self: any(r.state == "running" for r in self.truth.values()))
    @rule(data=st.data())
    def lease_expires(self, data: st.DataObject) -> None:
        """The engine was silent for too long: its entry's idle time passes the lease."""
        running = sorted(i for i, r in self.truth.items() if r.state == "running")
        request_id = data.draw(st.sampled_from(running))
        lane = "batch" if self.truth[request_id].lane == pb.BATCH else "interactive"
        entry = self.run(self.queue.store.command("HGET", self.keys.request(request_id), "entry"))
        leases = self.keys.leases(MODEL.name, lane)  # type: ignore[arg-type]
        self.run(self.queue.store.command("ZADD", leases, "XX", 1, entry))
        self.truth[request_id].expired = True

    @rule(engine=ENGINES, failed=st.booleans())
    def engine_dies(self, engine: str, failed: bool) -> None:
        """Who saw it die gives its leases back: all of its current ones, and none that others hold now."""
        name = self.engines[engine]
        mine = [known for request_id, known in self.truth.items() if self.holder_of(request_id) == name]
        assert self.run(self.queue.abandon(name, "it died" if failed else "")) == len(mine)
        for known in mine:
            known.handed_back(failed)
        assert self.run(self.queue.lease(MODEL.name, name, 9)) == [], "a dead engine gets nothing"
        self.engines[engine] = name + "'"  # its successor has another name

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def renew(self, data: st.DataObject) -> None:
        _, lease = data.draw(st.sampled_from(self.leases))
        known = self.truth[lease.request_id]
        (answer,) = self.run(self.queue.renew([lease]))
        if known.epoch == lease.epoch and known.state == "running":
            assert answer == Held.HELD
            known.expired = False
        else:
            assert answer in (Held.LOST, Held.DONE)

    @precondition(lambda self: self.truth)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        known = self.truth[request_id := data.draw(st.sampled_from(sorted(self.truth)))]
        assert self.run(self.queue.cancel(request_id)) == (known.state != "done")
        known.state = "done"

    @invariant()
    def journals_hold_exactly_the_truth(self) -> None:
        if not hasattr(self, "truth"):
            return
        for request_id, known in self.truth.items():
            rows = self.run(self.queue.store.command("XRANGE", self.keys.journal(request_id), "-", "+"))
            pieces = [pb.GenerateResponse.FromString(row[1][1]) for row in rows]
            assert [token for piece in pieces for token in piece.token_ids] == known.tokens
            position = 0
            for piece in pieces:
                if piece.token_ids:
                    assert piece.offset == position
                position += len(piece.token_ids)
            finishes = [piece.HasField("finish") for piece in pieces]
            assert sum(finishes) == (known.state == "done")
            assert not any(finishes[:-1])

    @invariant()
    def counters_are_right(self) -> None:
        if not hasattr(self, "truth"):
            return
        load = self.run(self.queue.load(MODEL.name))
        states = [known.state for known in self.truth.values()]
        assert (load.waiting_requests, load.running_requests) == (states.count("queued"), states.count("running"))
        assert (load.waiting_tokens, load.running_tokens) == (8 * states.count("queued"), 8 * states.count("running"))
        for lane, name in ((pb.INTERACTIVE, "interactive"), (pb.BATCH, "batch")):
            owed: dict[str, list[str]] = {}
            for one in self.truth.values():
                if one.lane == lane and one.state != "done":
                    owed.setdefault(one.tenant, []).append(one.state)
            found = self.run(self.queue.tenant_loads(MODEL.name, name))  # type: ignore[arg-type]
            assert {tenant: (load.waiting_requests, load.running_requests) for tenant, load in found.items()} == {
                tenant: (states.count("queued"), states.count("running")) for tenant, states in owed.items()
            }


def test_queue_guarantees(store_server: EmbeddedStore, tmp_path: Path) -> None:
    machine = type("Machine", (QueueMachine,), {"url": store_server.url})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=60,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
        ),
    )


class NoReader:
    """A stream's owner, for a stream alone."""

    def drop(self, stream: Stream) -> None:
        raise AssertionError("not here")


@given(st.data())
@settings(max_examples=300, deadline=None, database=None)
def test_a_stream_delivers_each_piece_once_and_in_order(data: st.DataObject) -> None:
    """Pushes may be lost, doubled, and mixed with reads of the journal, as long as one read comes at the end."""
    sizes = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=8))
    journal, offset = [], 0
    for size in sizes:
        journal.append(pb.GenerateResponse(offset=offset, token_ids=range(offset, offset + size)))
        offset += size
    if data.draw(st.booleans()):
        journal[-1].finish.reason = pb.STOP
    else:
        journal.append(pb.GenerateResponse(finish=pb.Finish(reason=pb.STOP), offset=offset))
    stream = Stream(NoReader(), "x", 0)  # type: ignore[arg-type]
    pushes = data.draw(st.lists(st.integers(0, len(journal) - 1), max_size=20))
    for index in pushes:
        in_reach = journal[index].offset <= stream.position
        assert stream.feed(_copy(journal[index])) == in_reach
    for piece in journal:
        stream.feed(_copy(piece))
    got = list(stream._pieces)
    assert [token for piece in got for token in piece.token_ids] == list(range(offset))
    assert [piece.HasField("finish") for piece in got] == [False] * (len(got) - 1) + [True]
    assert got[-1].usage.completion_tokens == offset


def _copy(piece: pb.GenerateResponse) -> pb.GenerateResponse:
    copy = pb.GenerateResponse()
    copy.CopyFrom(piece)
    return copy
