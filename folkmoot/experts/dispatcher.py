"""The dispatcher: sends each row of a MoE layer to a host that holds its expert, and combines what comes back.

It lives in the process that runs the model. `Dispatcher.forward` is the whole of a layer's routed experts (call.py):

1. choose a replica for each expert with rows, level over hosts; pack each host's rows; post to all (`fm_begin`, hop.c);
2. run the shared experts while the rows are away;
3. wait (`fm_finish`); a host that dies, stalls or answers wrongly is dropped, one that is late is set aside until it
   has answered (deadline.py), and its rows go back to step 1;
4. combine the rows in slot order (`fm_combine`); a row that is not finite is asked for again elsewhere (doubt.py).

Since a host returns one unweighted row for each (token, expert) pair and the sum is always in slot order, the result
does not depend on which replica served which pair. With combine="sum" hosts return weighted sums instead: fewer
bytes come back, and this guarantee is given up.
"""

import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from folkmoot.experts import cores, doubt, links, native, secret, turns
from folkmoot.experts.call import Call
from folkmoot.experts.deadline import SLICE_S, Waited, measured, stalled
from folkmoot.experts.dispatch_config import ENVIRONMENT, DispatchConfig, DispatchError
from folkmoot.experts.dispatch_counts import DispatchCounts, summed
from folkmoot.experts.expert_map import ExpertMap, HostAddress, NoReplicaError
from folkmoot.experts.expert_rows import ExpertRows
from folkmoot.experts.feed import MapFeed, read_map
from folkmoot.experts.links import Link, LinkError
from folkmoot.experts.node import node_id
from folkmoot.experts.routes import Routes, host_tables, routes_of
from folkmoot.experts.wire import Hello

log = logging.getLogger(__name__)

BACKGROUND_EVERY_CALLS = 1000
CONNECT_AT_ONCE = 16
END_REQUESTS_TIMEOUT_S = 10.0
FIRST_MAP_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Shape:
    """What all calls of one dispatcher have in common."""

    hidden: int
    top_k: int
    dtype: torch.dtype

    @property
    def dtype_name(self) -> str:
        """ "bfloat16", "float32" or "float16"."""
        return str(self.dtype).removeprefix("torch.")


@dataclass(slots=True)
class Aside:
    """A link that is asked for nothing, since its host owes an answer that nobody waits for any more."""

    link: Link
    waited_s: float
    """for the answer; time in which nobody looked counts little, since this process may not have run"""
    looked_s: float
    stalled_s: float
    """what is too long"""


class Dispatcher:
    """Serves one forward pass at a time; maps may arrive meanwhile from the feed's thread."""

    def __init__(self, config: DispatchConfig, *, fused: bool = True, beside: "Dispatcher | None" = None) -> None:
        """`fused`: whether rows are added by fused multiply-adds; else each product is rounded first. `beside`: another
        one of the same engine, which shares its maps and its feed with this one and counts what it does."""
        self.config = config
        self.fused = fused
        self.incarnation = time.time_ns()
        self._secret = secret.read(config.secret_file)
        self.rows_served: dict[str, int] = {}
        self.counts = DispatchCounts()
        self.not_finite = doubt.Tally()
        self._shape: Shape | None = None
        self._itemsize = 0
        self._changed = threading.Condition()
        self._dead: set[tuple[str, int]] = set()
        self._retired: list[Link] = []
        self._aside: list[Aside] = []
        self._latest: ExpertMap | None = None
        self._by_host: Mapping[int, np.ndarray] = {}
        self._routes: Routes | None = None
        self._generation = 0
        self._served: dict[int, np.ndarray] = {}
        self._counters: dict[tuple[int, int, int], tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        self._calls, self._background = 0, set[int]()
        self._layer, self._is_abandoned = -1, False
        self._in_call = False  # whether a forward pass may wait on a link; set under the lock
        self._feed: MapFeed | None = None
        self._others: list[Dispatcher] = []
        if beside is not None:
            self._feed = beside._feed
            beside._join(self)
        elif config.map_path is not None:
            self.use_map(read_map(config.map_path))
        elif config.feed is not None:
            answers = {"rows": lambda: self.expert_rows().to_json(), "counts": self._count}
            self._feed = MapFeed(config.feed, self.use_map, answers)

    def _join(self, other: "Dispatcher") -> None:
        with self._changed:
            self._others.append(other)
            latest = self._latest
        if latest is not None:
            other.use_map(latest)

    @staticmethod
    def from_env(*, fused: bool = True) -> "Dispatcher":
        """Build from the environment variable FOLKMOOT_DISPATCH. Raises DispatchError."""
        if ENVIRONMENT not in os.environ:
            raise DispatchError(f"{ENVIRONMENT} is not set")
        return Dispatcher(DispatchConfig.from_json(os.environ[ENVIRONMENT]), fused=fused)

    def use_map(self, expert_map: ExpertMap) -> None:
        """Adopt a newer map: connect to its new hosts, drop the links of those that left. Any thread may call.

        A layer that waits for an expert goes on as soon as the link to its host stands, whatever other hosts do.
        """
        by_host = host_tables(expert_map)
        with self._changed:
            if self._latest is not None and expert_map.version < self._latest.version:
                return
            self._latest, self._by_host = expert_map, by_host
            self._dead &= {(a.host, a.incarnation) for a in expert_map.hosts.values()}
            shape = self._shape
            missing = self._keep_links(expert_map) if shape is not None else []
            if not self._in_call:
                self._close_retired()
            others = tuple(self._others)
        for other in others:
            other.use_map(expert_map)
        if shape is not None:
            self._connect_all(missing, shape)

    def expert_rows(self) -> ExpertRows:
        """Rows that each logical expert has had so far. Any thread may call."""
        served = dict(self._served)
        for other in self._others:
            for layer, rows in dict(other._served).items():
                served[layer] = served[layer] + rows if layer in served else rows
        return ExpertRows.of(served)

    def _count(self) -> dict[str, Any]:
        """For metrics, in JSON data. Any thread may call."""
        tally = self.not_finite
        verdicts = {"confirmed": tally.confirmed, "refuted": tally.refuted, "alone": tally.alone}
        own = {**self.counts.to_json(), "host_rows": dict(self.rows_served), "not_finite": verdicts}
        return functools.reduce(summed, (other._count() for other in self._others), own)

    def close(self) -> None:
        """Close all links and the feed."""
        for other in self._others:
            other.close()
        if self._feed is not None:
            self._feed.close()
        with self._changed:
            aside = (one.link for one in self._aside)
            for link in (*self._retired, *aside, *(self._routes.links if self._routes else ())):
                link.close()
            self._routes = self._shape = None
            self._aside = []

    def forward(
        self,
        layer: int,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared: Callable[[], torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Routed experts of one layer: x [tokens, hidden], topk_weights and topk_ids [tokens, k].

        Returns (routed [tokens, hidden] in x's dtype and device, shared() or None). `shared` runs once, while rows
        are away (after them in a call of more than config.max_tokens).

        When an expert has had no live replica for config.no_replica_timeout_s, the engine's requests are ended through
        the feed, and this forward pass, in which nobody is interested any more, goes on with zeros. Raises
        NoReplicaError where that is not possible.
        """
        is_same_pass, self._layer = layer > self._layer, layer  # layers come in order
        shared = None if shared is None else functools.cache(shared)
        if not (self._is_abandoned and is_same_pass):
            self._is_abandoned = False
            try:
                return self._forward(layer, x, topk_weights, topk_ids, shared)
            except NoReplicaError as e:
                self._abandon(e)
        return torch.zeros_like(x), shared() if shared is not None else None

    def _abandon(self, error: NoReplicaError) -> None:
        reason = f"{error}; waited {self.config.no_replica_timeout_s:g} s for a replacement"
        log.error("giving up the running requests: %s", reason)
        if self._feed is None or not self._feed.end_requests(reason, END_REQUESTS_TIMEOUT_S):
            raise error
        self._is_abandoned = True
        self.counts.given_up += 1

    def _forward(
        self,
        layer: int,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared: Callable[[], torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if x.shape[0] > self.config.max_tokens:
            return self._forward_split(layer, x, topk_weights, topk_ids, shared)
        shape = Shape(x.shape[1], topk_ids.shape[1], x.dtype)
        if shape != self._shape:
            self._set_shape(shape)
        if self.config.background_workers and self._calls % BACKGROUND_EVERY_CALLS == 0:
            cores.to_background(self._background)
        self._calls += 1
        call = Call(self, layer, x, topk_weights, topk_ids)
        self.counts.calls += 1
        self.counts.rows += call.pairs
        try:
            left = call.post()
            shared_out = shared() if shared is not None else None
            if left:
                turns.give_way()
            while left:
                call.wait()
                left = call.post()
            return self._combine(call), shared_out
        finally:
            self._in_call = False

    def _forward_split(
        self,
        layer: int,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared: Callable[[], torch.Tensor] | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        size = self.config.max_tokens
        parts = zip(*(torch.split(t, size) for t in (x, topk_weights, topk_ids)), strict=True)
        routed = torch.cat([self._forward(layer, *part)[0] for part in parts])
        return routed, shared() if shared is not None else None

    def _combine(self, call: Call) -> torch.Tensor:
        """[tokens, hidden], on the device that x came from."""
        out = torch.empty_like(call.x)
        if call.pairs and not call.sum_into(out) and doubt.settle(call, self.not_finite):
            call.sum_into(out)
        return out.to(call.device)

    def routes(self, newer_than: int, waited: Waited) -> Routes | None:
        """The routes in use, once their generation is above `newer_than`; None where that takes too long."""
        with self._changed:
            self._look_aside()
            while self._routes is None or self._routes.generation <= newer_than:
                if waited.total_s >= self._patience_s:
                    return None
                began = time.monotonic()
                self._changed.wait(SLICE_S)
                waited.add(time.monotonic() - began)
                self._look_aside()
            self._close_retired()
            self._in_call = True
            return self._routes

    def _close_retired(self) -> None:
        """Under the lock, by the thread of the forward pass or while there is none: it might be waiting on a link."""
        while self._retired:
            self._retired.pop().close()

    @property
    def _patience_s(self) -> float:
        """Before the first map hosts may still load their weights."""
        return FIRST_MAP_TIMEOUT_S if self._latest is None else self.config.no_replica_timeout_s

    def is_asked(self, link: Link) -> bool:
        """Whether its host has been neither dropped nor set aside."""
        return not self._is_dead(link) and all(one.link is not link for one in self._aside)

    def _is_dead(self, link: Link) -> bool:
        return (link.address.host, link.address.incarnation) in self._dead

    def set_aside(self, link: Link, waited_s: float, stalled_s: float) -> None:
        """Route without a host that is late, until it has answered or counts as stalled."""
        with self._changed:
            if not self.is_asked(link) or self._routes is None or link not in self._routes.links:
                return
            self._aside.append(Aside(link, waited_s, time.monotonic(), stalled_s))
            self.counts.late_hosts += 1
            self._use_links([k for k in self._routes.links if k is not link])
        log.info("expert host %s is late: no answer within %.3f s", link.address.host, waited_s)

    def _look_aside(self) -> None:
        """Under the lock, by the thread of the forward pass: have hosts back that have answered, drop stalled ones."""
        for one in tuple(self._aside):
            now_s, link = time.monotonic(), one.link
            one.waited_s += min(now_s - one.looked_s, 2 * SLICE_S)
            one.looked_s = now_s
            try:
                has_answered = link.has_answered()
            except LinkError as e:
                self.fail(link, str(e))
                continue
            rows = link.raw.header.pairs
            if has_answered:
                self._aside.remove(one)
                link.pace = measured(link.pace, rows, one.waited_s)
                if self._routes is not None:
                    self._use_links((*self._routes.links, link))
            elif one.waited_s > one.stalled_s:
                self.fail(link, stalled(rows, one.stalled_s))

    def fail(self, link: Link, reason: str) -> None:
        """Drop a host: close its link, route without it, and tell the router. Nothing if it has been dropped before."""
        address = link.address
        link.close()
        with self._changed:
            if self._is_dead(link):
                return
            self._aside = [one for one in self._aside if one.link is not link]
            self._dead.add((address.host, address.incarnation))
            self.counts.dropped_hosts += 1
            if self._routes is not None:
                self._use_links([k for k in self._routes.links if k is not link])
        log.warning("expert host %s (incarnation %d) dropped: %s", address.host, address.incarnation, reason)
        self._send_dead(address, reason)

    def no_replica(self, layer: int, expert: int) -> Exception:
        """What to raise when `routes` gave none; `expert` is -1 where there never was a map."""
        if expert < 0 or self._latest is None:
            return DispatchError(f"layer {layer}: no expert map within {FIRST_MAP_TIMEOUT_S:g} s")
        return NoReplicaError(layer, expert, self._latest.version)

    def counters(self, layer: int, table: np.ndarray, num_links: int) -> tuple[int, int, int]:
        """Addresses of hop.c's served int64 [experts] (of this layer), scratch and cost, for this table of routes."""
        experts, replicas, _ = table.shape
        if (found := self._counters.get((layer, replicas, num_links))) is None:
            served = self._served.setdefault(layer, np.zeros(experts, np.int64))
            scratch, cost = np.zeros(experts * (1 + replicas), np.int32), np.zeros(num_links, np.int64)
            self._counters[(layer, replicas, num_links)] = found = (served, scratch, cost)
        return found[0].ctypes.data, found[1].ctypes.data, found[2].ctypes.data

    def _set_shape(self, shape: Shape) -> None:
        """The first call, or a change of dtype or width: links are made for one shape."""
        if shape.dtype_name not in native.DTYPES:
            raise DispatchError(f"dtype {shape.dtype_name} is not one of {sorted(native.DTYPES)}")
        with self._changed:
            if self._routes is not None:
                self._retired += (*self._routes.links, *(one.link for one in self._aside))
                self._routes, self._aside = None, []
            self._shape, self._itemsize = shape, shape.dtype.itemsize
            missing = self._keep_links(self._latest) if self._latest is not None else []
        self._connect_all(missing, shape)

    def _keep_links(self, expert_map: ExpertMap) -> list[HostAddress]:
        """Under the lock: routes by this map over the links that there are. Returns the hosts that lack one."""
        wanted = {(a.host, a.incarnation): a for a in expert_map.hosts.values()}
        kept, have = [], set()
        aside = {one.link.raw.number for one in self._aside}
        for link in (*(self._routes.links if self._routes else ()), *(one.link for one in self._aside)):
            key = (link.address.host, link.address.incarnation)
            if key not in wanted:
                self._retired.append(link)  # closed by the thread that may be waiting on it
                continue
            have.add(key)
            if link.raw.number not in aside:
                kept.append(link)
        self._aside = [one for one in self._aside if one.link not in self._retired]
        self._use_links(kept)
        return [a for key, a in wanted.items() if key not in have | self._dead]

    def _use_links(self, live: Iterable[Link]) -> None:
        """Under the lock: new routes by the latest map."""
        assert self._latest is not None
        by_host = {link.address.host: link for link in live}
        self._generation += 1
        ordered = {host: by_host[host] for host in self._latest.hosts if host in by_host}
        self._routes = routes_of(self._latest, self._by_host, self._generation, ordered, self.config.far_cost)
        self._changed.notify_all()

    def _connect_all(self, addresses: list[HostAddress], shape: Shape) -> None:
        """Without the lock, since one that does not answer takes seconds, and all at once."""
        if addresses:
            with ThreadPoolExecutor(min(CONNECT_AT_ONCE, len(addresses)), "connect") as pool:
                list(pool.map(lambda address: self._connect(address, shape), addresses))

    def _connect(self, address: HostAddress, shape: Shape) -> None:
        """Make a link and route over it, unless the map or the shape has changed meanwhile."""
        try:
            hello, timeout_s = self._hello(address, shape), self.config.connect_timeout_s
            link = links.connect(address, hello, self._itemsize, timeout_s, self._secret)
        except LinkError as e:
            log.warning("%s", e)
            with self._changed:
                self._dead.add((address.host, address.incarnation))
            self._send_dead(address, str(e))
            return
        with self._changed:
            have = {k.address.host for k in self._routes.links} if self._routes is not None else set()
            current = self._latest is not None and self._latest.hosts.get(address.host) == address
            if not current or shape != self._shape or self._routes is None or address.host in have:
                link.close()
                return
            self._use_links((*self._routes.links, link))

    def _hello(self, address: HostAddress, shape: Shape) -> Hello:
        return Hello(
            self.config.engine,
            self.incarnation,
            address.host,
            address.incarnation,
            links.choose_transport(address, node_id(), self.config.transport),
            shape.hidden,
            shape.dtype_name,
            self.config.max_tokens * shape.top_k,
            shape.top_k,
        )

    def _send_dead(self, address: HostAddress, reason: str) -> None:
        if self._feed is not None:
            self._feed.send(
                {"event": "host_dead", "host": address.host, "incarnation": address.incarnation, "reason": reason}
            )
