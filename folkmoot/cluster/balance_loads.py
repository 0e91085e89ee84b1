"""How many rows each logical expert has had, in all and lately: what the expert router makes of its engines' counts.

Pure: time enters as an argument. Lately means smoothed: rows count half after `half_life_s`, so that a hot set that
passes is forgotten, and one batch does not look like one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from folkmoot.experts.expert_rows import ExpertRows

MAX_ENGINES = 256
"""Engines whose last counts are remembered; of more, the one that is silent for longest is forgotten."""


@dataclass(frozen=True)
class Counted:
    """What one engine said last: int64 [layers, experts] since its start."""

    counts: np.ndarray
    at_s: float


@dataclass(frozen=True)
class ExpertLoads:
    """float64 [layers, experts] each: `total` rows since this router began, `recent` rows/s at `at_s`."""

    layers: tuple[int, ...]
    total: np.ndarray
    recent: np.ndarray
    half_life_s: float
    at_s: float = 0.0
    engines: Mapping[str, Counted] = field(default_factory=lambda: MappingProxyType({}))

    def document(self) -> dict[str, Any]:
        """As JSON data: arrays [layer][expert]."""
        return {
            "layers": list(self.layers),
            "half_life_s": self.half_life_s,
            "time_s": self.at_s,
            "rows_total": self.total.astype(np.int64).tolist(),
            "rows_recent": np.round(self.recent, 3).tolist(),
        }


def no_loads(layers: Sequence[int], experts: int, half_life_s: float) -> ExpertLoads:
    """Nothing has been counted yet."""
    shape = (len(layers), experts)
    return ExpertLoads(tuple(layers), np.zeros(shape), np.zeros(shape), half_life_s)


def counted(loads: ExpertLoads, engine: str, rows: ExpertRows, now_s: float) -> ExpertLoads:
    """With what an engine says it has counted since its start.

    The first counts of an engine are of unknown age, so they are in the total and not among the recent ones. Raises
    ValueError where they are not of this model's layers and experts.
    """
    counts = _aligned(loads, rows)
    before = loads.engines.get(engine)
    is_known = before is not None and bool((counts >= before.counts).all())
    grown = counts - before.counts if before is not None and is_known else counts
    aged = at(loads, now_s)
    recent = aged.recent + grown * (math.log(2) / loads.half_life_s) if is_known else aged.recent
    engines = {**loads.engines, engine: Counted(counts, now_s)}
    if len(engines) > MAX_ENGINES:
        del engines[min(engines, key=lambda name: engines[name].at_s)]
    return replace(aged, total=loads.total + grown, recent=recent, engines=MappingProxyType(engines))


def at(loads: ExpertLoads, now_s: float) -> ExpertLoads:
    """The loads as of now: what was recent fades."""
    passed_s = max(0.0, now_s - loads.at_s)
    return replace(loads, recent=loads.recent * 0.5 ** (passed_s / loads.half_life_s), at_s=max(now_s, loads.at_s))


def _aligned(loads: ExpertLoads, rows: ExpertRows) -> np.ndarray:
    """int64 [layers, experts], 0 for layers that the engine has not run yet."""
    experts = loads.total.shape[1]
    if not set(rows.layers) <= set(loads.layers) or (rows.layers and rows.counts.shape[1] != experts):
        raise ValueError(f"rows of layers {rows.layers} x {rows.counts.shape[1]} experts are not of this model")
    counts = np.zeros(loads.total.shape, np.int64)
    for layer, row in zip(rows.layers, rows.counts, strict=True):
        counts[loads.layers.index(layer)] = row
    return counts
