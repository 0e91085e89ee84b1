"""What a simulation did, as a table and bars on a terminal, or as a picture."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

from rich.console import Console
from rich.table import Table

from folkmoot.cluster.simulate import Outcome, Sample

BARS = " ▁▂▃▄▅▆▇█"
ROWS = 4
"""Height of a plot on a terminal, in lines."""


class NoPlotting(RuntimeError):
    """matplotlib is not installed. The message says how to get it."""


def bars(values: Sequence[float], width: int, rows: int = ROWS) -> list[str]:
    """A bar chart of `width` columns, the largest value of each column's share; the top line first."""
    if not values:
        return [""] * rows
    columns = min(width, len(values))
    edges = [len(values) * n // columns for n in range(columns + 1)]
    tops = [max(values[a:b]) for a, b in pairwise(edges)]
    most = max(tops) or 1.0
    eighths = [round(8 * rows * max(0.0, top) / most) for top in tops]
    return ["".join(BARS[min(8, max(0, e - 8 * row))] for e in eighths) for row in reversed(range(rows))]


def show(console: Console, outcome: Outcome, rows: Sequence[tuple[str, str]]) -> None:
    """Engines and tokens owed over time, and a summary."""
    series: list[tuple[str, Callable[[Sample], float]]] = [
        ("engines", lambda s: s.target),
        ("batch tokens owed", lambda s: s.batch_owed),
        ("interactive tokens owed", lambda s: s.interactive_owed),
    ]
    hours = outcome.samples[-1].time_s / 3600 if outcome.samples else 0.0
    for name, value in series:
        values = [value(s) for s in outcome.samples]
        console.print(f"{name}, {hours:.0f} h from left to right, up to {_short(max(values, default=0.0))}")
        for line in bars(values, max(20, min(100, console.width - 2))):
            console.print(f"  {line}", markup=False)
    table = Table(show_header=False)
    for name, text in rows:
        table.add_row(name, text)
    console.print(table)


def draw(outcome: Outcome, path: Path) -> None:
    """Write a picture; its kind follows from the name (.png, .svg, .pdf). Raises NoPlotting, ValueError, OSError."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as e:
        raise NoPlotting("a picture needs matplotlib: pip install 'folkmoot[plot]'") from e
    hours = [s.time_s / 3600 for s in outcome.samples]
    figure, (engines, owed) = plt.subplots(2, 1, sharex=True, figsize=(10, 6), layout="constrained")
    engines.step(hours, [s.target for s in outcome.samples], where="post", label="asked for")
    engines.step(hours, [s.ready for s in outcome.samples], where="post", label="serving")
    engines.set_ylabel("engines")
    engines.legend(loc="upper left")
    owed.fill_between(hours, [s.batch_owed for s in outcome.samples], alpha=0.5, label="batch")
    owed.plot(hours, [s.interactive_owed for s in outcome.samples], color="tab:red", label="interactive")
    owed.set_ylabel("tokens owed")
    owed.set_xlabel("hours")
    owed.legend(loc="upper left")
    figure.savefig(path)
    plt.close(figure)


def _short(number: float) -> str:
    """1234567 as 1.2 M."""
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"
