"""Made-up loads: rows of each logical expert in each of some steps, [steps][layers, experts]."""

from collections.abc import Callable, Iterator

import numpy as np

ROWS_A_LAYER = 2e6
Trace = Iterator[np.ndarray]


def zipf(exponent: float) -> Callable[[np.random.Generator, int, int, int], Trace]:
    """Popularity by rank, another order in each layer; the same in each step but for chance."""

    def make(rng: np.random.Generator, steps: int, layers: int, experts: int) -> Trace:
        shares = _shares(rng, layers, experts, exponent)
        for _ in range(steps):
            yield _counted(rng, shares)

    return make


def drift(rng: np.random.Generator, steps: int, layers: int, experts: int) -> Trace:
    """Zipf 1.0; from step to step each expert's popularity goes up or down by about a tenth."""
    shares = _shares(rng, layers, experts, 1.0)
    for _ in range(steps):
        yield _counted(rng, shares)
        shares = shares * np.exp(rng.normal(0, 0.1, shares.shape))


def bursts(rng: np.random.Generator, steps: int, layers: int, experts: int) -> Trace:
    """Zipf 0.5; in every second step a fiftieth of the experts, others each time, has ten times its rows."""
    shares = _shares(rng, layers, experts, 0.5)
    for step in range(steps):
        hot = rng.random(shares.shape) < (0.02 if step % 2 else 0.0)
        yield _counted(rng, shares * np.where(hot, 10.0, 1.0))


def correlated(rng: np.random.Generator, steps: int, layers: int, experts: int) -> Trace:
    """Eight topics, each with experts of its own in every layer, whose parts of the traffic wander."""
    topics = np.stack([_shares(rng, layers, experts, 1.0) for _ in range(8)])
    mixture = rng.dirichlet(np.full(8, 0.5))
    for _ in range(steps):
        yield _counted(rng, np.tensordot(mixture, topics, 1))
        mixture = 0.9 * mixture + 0.1 * rng.dirichlet(np.full(8, 0.5))


TRACES = {
    "zipf 0.5": zipf(0.5),
    "zipf 1.0": zipf(1.0),
    "zipf 1.5": zipf(1.5),
    "bursts": bursts,
    "drift": drift,
    "correlated": correlated,
}
DRIFTING = ("drift", "correlated")


def _shares(rng: np.random.Generator, layers: int, experts: int, exponent: float) -> np.ndarray:
    ranked = 1.0 / np.arange(1, experts + 1) ** exponent
    return np.stack([rng.permutation(ranked) for _ in range(layers)])


def _counted(rng: np.random.Generator, shares: np.ndarray) -> np.ndarray:
    expected = shares / shares.sum(axis=1, keepdims=True) * ROWS_A_LAYER
    counted: np.ndarray = rng.poisson(expected).astype(float)
    return counted
