"""Rows that each logical expert has had: as counted by a dispatcher, and as they travel to the expert router. Pure."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

MAX_COUNTS = 1 << 20


@dataclass(frozen=True)
class ExpertRows:
    """Rows of logical experts since some beginning: int64 [layers, experts]; row i is of layer `layers[i]`."""

    layers: tuple[int, ...]
    counts: np.ndarray

    @staticmethod
    def of(served: Mapping[int, np.ndarray]) -> "ExpertRows":
        """What hop.c has counted: int64 [experts] by layer. A copy, that counts no further."""
        layers = tuple(sorted(served))
        counts = np.array([served[n] for n in layers], np.int64)
        return ExpertRows(layers, counts if layers else counts.reshape(0, 0))

    def to_json(self) -> dict[str, Any]:
        """As JSON data of little-endian bytes: quick to make, since the thread that makes it delays a layer."""
        packed = base64.b64encode(self.counts.astype("<i8").tobytes()).decode()
        return {"layers": list(self.layers), "experts": self.counts.shape[1], "counts": packed}

    @staticmethod
    def from_json(raw: Mapping[str, Any]) -> "ExpertRows":
        """What `to_json` made. Raises KeyError, TypeError or ValueError for anything else."""
        layers, experts = tuple(int(n) for n in raw["layers"]), int(raw["experts"])
        if not 0 <= len(layers) * experts <= MAX_COUNTS or experts < 0:
            raise ValueError(f"rows of {len(layers)} layers x {experts} experts exceed {MAX_COUNTS} counts")
        counts = np.frombuffer(base64.b64decode(raw["counts"], validate=True), "<i8").reshape(len(layers), experts)
        if counts.size and counts.min() < 0:
            raise ValueError("an expert cannot have had fewer than 0 rows")
        return ExpertRows(layers, counts.astype(np.int64))
