"""One layer call of the dispatcher: its rows routed, posted, waited for, asked for again, and combined.

Pairs are (token, slot) in row-major order; each ends with the address of its row. Links are told apart by number, since
an index means another link once the routes have changed.
"""

import ctypes
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch

from folkmoot.experts import deadline, native, routes, wire
from folkmoot.experts.deadline import Waited
from folkmoot.experts.dispatch_config import DispatchConfig, DispatchError
from folkmoot.experts.dispatch_counts import DispatchCounts
from folkmoot.experts.expert_map import NoReplicaError
from folkmoot.experts.links import Link, LinkError
from folkmoot.experts.routes import Routes

log = logging.getLogger(__name__)


class Owner(Protocol):
    """What a call needs of its dispatcher."""

    config: DispatchConfig
    fused: bool
    rows_served: dict[str, int]
    counts: DispatchCounts

    def routes(self, newer_than: int, waited: Waited) -> Routes | None:
        """The routes in use, once their generation is above `newer_than`; None where that takes too long."""

    def fail(self, link: Link, reason: str) -> None:
        """Drop a host."""

    def set_aside(self, link: Link, waited_s: float, stalled_s: float) -> None:
        """Ask a late host for nothing until it has answered; it counts as stalled after `stalled_s` in all."""

    def is_asked(self, link: Link) -> bool:
        """Whether it has been neither dropped nor set aside."""

    def no_replica(self, layer: int, expert: int) -> Exception:
        """What to raise when `routes` gave none."""

    def counters(self, layer: int, table: np.ndarray, num_links: int) -> tuple[int, int, int]:
        """Addresses of hop.c's counters."""


class Call:
    """One layer's rows on their way: x [tokens, hidden], topk_weights and topk_ids [tokens, k]."""

    def __init__(
        self, owner: Owner, layer: int, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
    ) -> None:
        self.owner, self.layer, self.device = owner, layer, x.device
        self.x = x.to("cpu").contiguous()
        self.weights = topk_weights.to("cpu", torch.float32).contiguous()
        self.ids = topk_ids.to("cpu", torch.int32).contiguous()
        self.tokens, self.k = self.ids.shape
        self.pairs = self.tokens * self.k
        self.row_bytes = self.x.shape[1] * self.x.element_size()
        self.dtype = native.DTYPES[str(self.x.dtype).removeprefix("torch.")]
        # One block for the columns that hop.c fills, since each array of its own would cost a microsecond or two:
        # 8 bytes a pair for `rows`, 4 each for `host`, `row` and `factors`, 1 for `done`.
        self.block = np.zeros(self.pairs * 21, np.uint8)
        self.used: list[Routes] = []
        self.avoid: Mapping[int, Collection[int]] = {}
        self.kept: list[object] = []  # what rows of earlier rounds lie in
        at, n = self.block.ctypes.data, self.pairs
        self.call = native.Call(
            x=self.x.data_ptr(),
            ids=self.ids.data_ptr(),
            weights=self.weights.data_ptr(),
            rows=at,
            host=at + 8 * n,
            row=at + 12 * n,
            factors=at + 16 * n,
            done=at + 20 * n,
            row_bytes=self.row_bytes,
            pairs=n,
            k=self.k,
            expert_cost=owner.config.expert_cost,
            layer=layer,
            flags=wire.FLAG_SUM if owner.config.combine == "sum" else 0,
        )

    @property
    def done(self) -> np.ndarray:
        """bool [pairs]: which have their rows."""
        return self.block[20 * self.pairs :].view(np.bool_)

    @property
    def experts(self) -> np.ndarray:
        """int32 [pairs]: the logical expert of each."""
        flat: np.ndarray = self.ids.numpy().ravel()
        return flat

    @property
    def tokens_of_pairs(self) -> np.ndarray:
        """int64 [pairs]: the token of each."""
        return np.arange(self.pairs) // self.k

    @property
    def host(self) -> np.ndarray:
        """int32 [pairs]: the number of the link that was asked."""
        return self.block[8 * self.pairs : 12 * self.pairs].view(np.int32)

    @property
    def rows(self) -> np.ndarray:
        """uint64 [pairs]: where each row lies; 0 where its sum came with another pair's."""
        return self.block[: 8 * self.pairs].view(np.uint64)

    def post(self) -> bool:
        """Route the pairs that have no row yet, and post them; whether there were any.

        Raises NoReplicaError when an expert had no live replica for too long; where `avoid` leaves none, at once.
        """
        if not self.pairs or (self.used and self.done.all()):
            return False
        if self.used:
            self._keep_rows()
            self.owner.counts.rows_again += int((~self.done).sum())
        self.used.append(self._route())
        new = self.used[-1]
        for index in new.streams:
            if new.links[index].raw.state == native.WAITING:
                self._send(index, new.links[index])
        return True

    def wait(self) -> None:
        """Wait for all replies. A host that fails is dropped, and its pairs stay without rows."""
        used, waited, late = self.used[-1], Waited(), set[int]()
        call, yield_us, slice_s = ctypes.addressof(self.call), self.owner.config.yield_us, deadline.SLICE_S
        while True:
            began = time.monotonic()
            if native.finish(call, used.pointers, yield_us, int(slice_s * 1e6)) == native.ALL_DONE:
                break
            self._attend(used)
            waited.add(time.monotonic() - began)
            late = self._give_up_on(used, waited, late)
            slice_s = self._next_look_s(used, waited)
        served = self.owner.rows_served
        for link in used.links:
            raw = link.raw
            if raw.state == native.DONE:
                served[link.address.host] = served.get(link.address.host, 0) + raw.header.pairs
                self.owner.counts.answered(link.address.host, raw.took_us / 1e6)
                link.pace = deadline.measured(link.pace, raw.header.pairs, raw.took_us / 1e6)

    def sum_into(self, out: torch.Tensor) -> bool:
        """Sum over a token's pairs in slot order, weighted, in float32, rounded once; whether all sums are finite."""
        return not native.combine(ctypes.addressof(self.call), out.data_ptr(), self.dtype, self.owner.fused)

    def doubtful(self) -> np.ndarray:
        """bool [pairs]: whose row is not finite although its token's x is."""
        marks = np.zeros(self.pairs, np.bool_)
        native.doubt(ctypes.addressof(self.call), marks.ctypes.data, self.dtype)
        return marks

    def whole_sums(self, marks: np.ndarray) -> np.ndarray:
        """bool [pairs]: `marks`, and in sum mode also the pairs whose rows came in one sum with a marked one's."""
        if self.owner.config.combine != "sum":
            return marks
        key = self.tokens_of_pairs << 32 | self.host
        return np.isin(key, key[marks])

    def has_replica(self, avoid: Mapping[int, Collection[int]]) -> np.ndarray:
        """bool [pairs]: whether the pair's expert e has a live replica on a link whose number is not in avoid[e]."""
        now = self.owner.routes(-1, Waited())
        if now is None:
            return np.zeros(self.pairs, np.bool_)
        found: np.ndarray = routes.without(now, self.layer, avoid).tables[self.layer][self.experts, 0, 0] >= 0
        return found

    def ask_again(self, pairs: np.ndarray, avoid: Mapping[int, Collection[int]]) -> bool:
        """Get the rows of these pairs (bool [pairs]) once more, expert e's from none of the links avoid[e].

        Returns whether that went well; if a replica was lost meanwhile and there is no other, all is as it was.
        """
        self._keep_rows()
        before = self.block.copy()
        self.done[pairs] = False
        self.avoid = avoid
        try:
            self.complete()
        except NoReplicaError:
            self.block[:] = before
            return False
        finally:
            self.avoid = {}
        return True

    def distrust(self, number: int, reason: str) -> None:
        """Drop the host of the link with this number, and get all rows that came from it anew."""
        link = next(link for used in self.used for link in used.links if link.raw.number == number)
        self.owner.fail(link, reason)
        self.done[self.host == number] = False
        self.complete()

    def complete(self) -> None:
        """Post and wait until every pair has its row."""
        while self.post():
            self.wait()

    def _route(self) -> Routes:
        """Choose replicas, pack and publish; waits for new routes while an expert has no live replica."""
        waited, generation, expert = Waited(), -1, -1
        while (new := self.owner.routes(generation, waited)) is not None:
            table = new.tables.get(self.layer)
            if table is None:
                raise DispatchError(f"layer {self.layer} is not in expert map version {new.expert_map.version}")
            if self.avoid:
                new = routes.without(new, self.layer, self.avoid)
            status = self._begin(new)
            if status == 0:
                self.owner.counts.waited_s += waited.total_s
                return new
            if status == native.OUT_OF_RANGE:
                raise DispatchError(f"layer {self.layer}: topk_ids outside 0..{len(table) - 1}")
            generation, expert = new.generation, -1 - status
            if self.avoid:
                raise NoReplicaError(self.layer, expert, new.expert_map.version)
            log.warning("layer %d, expert %d has no live replica; waiting for a new map", self.layer, expert)
            self.owner.counts.waits += 1
        raise self.owner.no_replica(self.layer, expert)

    def _begin(self, new: Routes) -> int:
        call, table = self.call, new.tables[self.layer]
        experts, replicas, _ = table.shape
        call.table, call.experts, call.replicas = table.ctypes.data, experts, replicas
        call.map_version, call.links = new.expert_map.version, len(new.links)
        call.start = new.starts.ctypes.data
        call.served, call.scratch, call.cost = self.owner.counters(self.layer, table, len(new.links))
        return int(native.begin(ctypes.addressof(call), new.pointers))

    def _send(self, index: int, link: Link) -> None:
        """Over TCP: hand the request to the kernel. A host that takes no bytes is late as one that sends none."""
        config = self.owner.config
        late_s, stalled_s = self._allowed_s(link, config.late_s), self._allowed_s(link, config.stall_s)
        try:
            if link.send(late_s):
                return
            if self._replaceable(index, {index}):
                self._set_aside(link, late_s, stalled_s)
            elif not link.send(config.call_timeout_s - late_s):
                self._fail(link, "it takes no rows")
        except LinkError as e:
            self._fail(link, str(e))

    def _attend(self, used: Routes) -> None:
        """See to what the wait ended for."""
        for link in used.links:
            state = link.raw.state
            if state == native.READABLE:
                self._receive(link)
            elif state == native.GONE:
                self._fail(link, "connection closed")
            elif state == native.WRONG:
                self._fail(link, link.why())

    def _receive(self, link: Link) -> None:
        """Read what has come of a reply over TCP; check it once it is whole."""
        try:
            header = link.receive()
        except LinkError as e:
            self._fail(link, str(e))
            return
        if header is None:
            link.raw.state = native.WAITING
            return
        native.collect(ctypes.addressof(self.call), ctypes.addressof(link.raw), ctypes.addressof(header))
        if link.raw.state == native.WRONG:
            self._fail(link, link.why())

    def _give_up_on(self, used: Routes, waited: Waited, late: set[int]) -> set[int]:
        """Set late hosts aside and drop stalled ones, by the rules in deadline.py. Returns those that are late and
        still waited for."""
        config, links = self.owner.config, used.links
        if any(links[i].raw.state == native.DONE for i in late):
            waited.late_answer()
        waiting = {i for i, link in enumerate(links) if link.raw.state == native.WAITING}
        if waited.total_s > config.call_timeout_s:
            for i in waiting:
                self._fail(links[i], deadline.stalled(links[i].raw.header.pairs, config.call_timeout_s))
            return set()
        late = self._overdue(links, waiting, waited, config.late_s)
        for i in [i for i in late if self._replaceable(i, late)]:
            self._set_aside(links[i], waited.recent_s, self._allowed_s(links[i], config.stall_s))
            waiting.discard(i)
        overdue = self._overdue(links, waiting, waited, config.stall_s)
        for i in [i for i in overdue if self._replaceable(i, overdue)]:
            self._fail(links[i], deadline.stalled(links[i].raw.header.pairs, self._allowed_s(links[i], config.stall_s)))
            waiting.discard(i)
        return late & waiting

    def _overdue(self, links: Sequence[Link], waiting: Collection[int], waited: Waited, grace_s: float) -> set[int]:
        return {i for i in waiting if waited.recent_s > self._allowed_s(links[i], grace_s)}

    def _next_look_s(self, used: Routes, waited: Waited) -> float:
        states = [link.raw.state for link in used.links]
        waiting = (link for link, state in zip(used.links, states, strict=True) if state == native.WAITING)
        config = self.owner.config
        graces_s = (config.late_s, config.stall_s)
        left_s = (self._allowed_s(link, grace_s) - waited.recent_s for link in waiting for grace_s in graces_s)
        return deadline.next_look_s(left_s, is_one_done=native.DONE in states)

    def _allowed_s(self, link: Link, grace_s: float) -> float:
        return deadline.allowed_s(link.pace, link.raw.header.pairs, grace_s, self.owner.config.call_timeout_s)

    def _replaceable(self, index: int, late: Collection[int]) -> bool:
        used = self.used[-1]
        gone = {i for i, link in enumerate(used.links) if not self.owner.is_asked(link)}
        asked = ~self.done & (self.host == used.links[index].raw.number)
        experts = np.unique(self.experts[asked]).tolist()
        return deadline.replaceable(index, experts, used.tables[self.layer], {*late, *gone})

    def _set_aside(self, link: Link, waited_s: float, stalled_s: float) -> None:
        link.raw.state = native.IDLE
        self.owner.set_aside(link, waited_s, stalled_s)

    def _fail(self, link: Link, reason: str) -> None:
        link.raw.state = native.IDLE
        self.owner.fail(link, reason)

    def _keep_rows(self) -> None:
        """Before another round overwrites the links: copy the rows that have arrived, and point to the copies."""
        kept = np.empty((self.pairs, self.row_bytes), np.uint8)
        rows = self.rows
        for p in np.flatnonzero(self.done & (rows != 0)).tolist():
            ctypes.memmove(kept.ctypes.data + p * self.row_bytes, int(rows[p]), self.row_bytes)
            rows[p] = kept.ctypes.data + p * self.row_bytes
        self.kept.append(kept)
