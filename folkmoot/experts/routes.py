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


def routes_of(expert_map: ExpertMap, generation: int, live: Mapping[str, Link], far_cost: int) -> Routes:
    """The tables of `expert_map` restricted to hosts with a live link. `far_cost`: what a host over TCP costs more."""
    index = {host: i for i, host in enumerate(live)}
    tables = {}
    for n, experts in expert_map.layers.items():
        kept = [[(index[r.host], r.slot) for r in replicas if r.host in index] for replicas in experts]
        table = np.full((len(experts), max(1, *map(len, kept)), 2), -1, np.int32)
        for e, replicas in enumerate(kept):
            for i, (link, slot) in enumerate(replicas):
                table[e, i] = (link, slot)
        tables[n] = table
    pointers = (ctypes.c_void_p * len(live))(*(ctypes.addressof(link.raw) for link in live.values()))
    links = tuple(live.values())
    streams = tuple(i for i, link in enumerate(links) if not link.raw.page)
    starts = np.array([0 if link.raw.page else far_cost for link in links], np.int64)
    return Routes(expert_map, generation, links, tables, pointers, streams, starts)


def without(routes: Routes, layer: int, avoid: Mapping[int, Collection[int]]) -> Routes:
    """Routes in which, in one layer, no expert e has a replica on a link whose number is in avoid[e]."""
    old = routes.tables[layer]
    table = np.full_like(old, -1)
    for e, replicas in enumerate(old.tolist()):
        kept = [r for r in replicas if r[0] >= 0 and routes.links[r[0]].raw.number not in avoid.get(e, ())]
        for i, replica in enumerate(kept):
            table[e, i] = replica
    return replace(routes, tables={**routes.tables, layer: table})
