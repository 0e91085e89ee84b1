"""An expert map made ready for use: tables that hop.c reads, over the links that are alive. Pure, no I/O."""

import ctypes
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np

from folkmoot.experts.expert_map import ExpertMap
from folkmoot.experts.links import Link


@dataclass(frozen=True, slots=True)
class Routes:
    """Links by index, and for each layer an int32 table [experts, replicas, 2] of (link index, slot), where link index
    -1 means none. `generation` grows with every change, also where the map stays the same."""

    expert_map: ExpertMap
    generation: int
    links: tuple[Link, ...]
    tables: Mapping[int, np.ndarray]
    pointers: ctypes.Array[ctypes.c_void_p]
    """of the links' native structs, by index"""
    streams: tuple[int, ...]
    """indices of the links over TCP, whose requests have to be sent"""
    starts: np.ndarray
    """int64 [links]: what asking a host costs before it has any row"""


def host_tables(expert_map: ExpertMap) -> Mapping[int, np.ndarray]:
    """For each layer an int32 table [experts, replicas, 2] of (index in expert_map.hosts, slot), -1 for none.

    One step a replica of Python, once a map: what `routes_of` makes of it is quick whenever links come and go.
    """
    index = {host: i for i, host in enumerate(expert_map.hosts)}
    tables = {}
    for n, experts in expert_map.layers.items():
        table = np.full((len(experts), max(1, *map(len, experts)), 2), -1, np.int32)
        entries = [(e, i, index[r.host], r.slot) for e, rs in enumerate(experts) for i, r in enumerate(rs)]
        if entries:
            expert, number, host, slot = np.array(entries, np.int32).T
            table[expert, number, 0], table[expert, number, 1] = host, slot
        tables[n] = table
    return tables


def routes_of(
    expert_map: ExpertMap, by_host: Mapping[int, np.ndarray], generation: int, live: Mapping[str, Link], far_cost: int
) -> Routes:
    """The tables of `expert_map` restricted to hosts with a live link, in the order of `live`; `by_host`: its
    `host_tables`. `far_cost`: what a host over TCP costs more."""
    links = tuple(live.values())
    link_of = np.full(len(expert_map.hosts) + 1, -1, np.int32)  # the last one, which is also [-1], for none
    number = {host: i for i, host in enumerate(live)}
    for i, host in enumerate(expert_map.hosts):
        link_of[i] = number.get(host, -1)
    pointers = (ctypes.c_void_p * len(live))(*(ctypes.addressof(link.raw) for link in links))
    streams = tuple(i for i, link in enumerate(links) if not link.raw.page)
    starts = np.array([0 if link.raw.page else far_cost for link in links], np.int64)
    tables = {n: _restricted(table, link_of) for n, table in by_host.items()}
    return Routes(expert_map, generation, links, tables, pointers, streams, starts)


def _restricted(by_host: np.ndarray, link_of: np.ndarray) -> np.ndarray:
    """One layer's table of (link index, slot), those with a link first."""
    link = link_of[by_host[:, :, 0]]
    order = np.argsort(link < 0, axis=1, kind="stable")[:, : max(1, int((link >= 0).sum(axis=1).max()))]
    table = np.take_along_axis(np.stack([link, by_host[:, :, 1]], axis=2), order[:, :, None], axis=1)
    table[table[:, :, 0] < 0] = -1
    return np.ascontiguousarray(table)


def without(routes: Routes, layer: int, avoid: Mapping[int, Collection[int]]) -> Routes:
    """Routes in which, in one layer, no expert e has a replica on a link whose number is in avoid[e]."""
    old = routes.tables[layer]
    table = np.full_like(old, -1)
    for e, replicas in enumerate(old.tolist()):
        kept = [r for r in replicas if r[0] >= 0 and routes.links[r[0]].raw.number not in avoid.get(e, ())]
        for i, replica in enumerate(kept):
            table[e, i] = replica
    return replace(routes, tables={**routes.tables, layer: table})
