"""A heat map of the experts on a terminal: a line a layer, a cell an expert, lighter where more rows went.

A cell's heat is its rows over the mean of its layer, since each layer gets the same number in all. Where there are more
experts than columns, or more layers than lines, neighbours share a cell, which shows the hottest of them. The scale
runs from dark blue over grey to yellow, in lightness that only grows (after cividis, doi:10.1371/journal.pone.0199239),
so that it reads alike to those who do not tell red from green; without colour it is made of characters.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.color import Color
from rich.style import Style
from rich.text import Text

DARK, MIDDLE, LIGHT = (0, 32, 77), (124, 123, 120), (255, 234, 70)
CHARACTERS = " .:-=+*#%@"
LABEL, FIGURES = 10, 18
"""Columns left and right of a line's cells."""
AXIS_STEP = 8
LEAST_SPAN = 2.0
"""The scale ends at the hottest cell, but not below this: even loads shall look even."""


@dataclass(frozen=True)
class Fit:
    """How cells are laid out: experts a cell, layers a line, and cells a column of the terminal."""

    experts: int
    layers: int
    cells_a_column: float


def fit(layers: int, experts: int, width: int, lines: int | None, *, is_coloured: bool) -> Fit:
    """For a terminal of `width` columns, and of `lines` for the map (None: as many as it takes). With colour a column
    can hold two cells, as its left and right half."""
    columns = max(8, width - LABEL - FIGURES)
    cells = next((c for c in (0.5, 1.0) if experts <= columns * c), 2.0 if is_coloured else 1.0)
    merged = -(-experts // int(columns * cells))
    return Fit(max(1, merged), max(1, -(-layers // lines)) if lines else 1, cells)


def heat(rows: np.ndarray) -> np.ndarray:
    """float [layers, experts] over the mean of each layer; 0 where a layer has had none."""
    mean = rows.mean(axis=1, keepdims=True)
    found: np.ndarray = np.divide(rows, mean, out=np.zeros(rows.shape), where=mean > 0)
    return found


def merged(values: np.ndarray, how: Fit) -> np.ndarray:
    """The hottest of each cell's experts: [lines, cells]."""
    layers, experts = values.shape
    lines, cells = -(-layers // how.layers), -(-experts // how.experts)
    padded = np.full((lines * how.layers, cells * how.experts), -np.inf)
    padded[:layers, :experts] = values
    found: np.ndarray = padded.reshape(lines, how.layers, cells, how.experts).max(axis=(1, 3))
    return found


def heat_map(
    layers: Sequence[int], rows: np.ndarray, width: int, lines: int | None, *, is_coloured: bool
) -> list[Text]:
    """The map under its axis, and its legend. `rows` [layers, experts] of any unit."""
    how = fit(len(layers), rows.shape[1], width, lines, is_coloured=is_coloured)
    hot = heat(rows)
    cells = merged(hot, how)
    span = max(LEAST_SPAN, float(hot.max(initial=0.0)))
    drawn = [_axis(rows.shape[1], how)]
    for number, line in enumerate(cells):
        first = number * how.layers
        part = hot[first : first + how.layers]
        hottest = int(part.max(axis=0).argmax())
        text = Text(_layers(layers[first : first + how.layers]).ljust(LABEL))
        text.append_text(_line(line / span, how.cells_a_column, is_coloured=is_coloured))
        text.append(f"  {part.max():6.2f}x  e{hottest}" if part.any() else "  -")
        drawn.append(text)
    return [*drawn, _legend(how, span, is_coloured=is_coloured)]


def _axis(experts: int, how: Fit) -> Text:
    """Numbers of experts over the columns that they are in."""
    text, a_column = "", how.experts * how.cells_a_column
    for column in range(0, int(experts / a_column), AXIS_STEP):
        text = text.ljust(column) + f"e{int(column * a_column)}"
    return Text(" " * LABEL + text)


def _line(levels: np.ndarray, cells_a_column: float, *, is_coloured: bool) -> Text:
    """One line of cells, of levels 0 to 1."""
    text = Text()
    if not is_coloured:
        for level in levels:
            text.append(_character(level) * round(1 / cells_a_column))
    elif cells_a_column == 2.0:
        for left, right in zip(levels[::2], [*levels[1::2], None] if len(levels) % 2 else levels[1::2], strict=True):
            text.append("▌", Style(color=_colour(left), bgcolor=None if right is None else _colour(right)))
    else:
        for level in levels:
            text.append(" " * round(1 / cells_a_column), Style(bgcolor=_colour(level)))
    return text


def _legend(how: Fit, span: float, *, is_coloured: bool) -> Text:
    text = Text("".ljust(LABEL))
    text.append("0 ")
    text.append_text(_line(np.linspace(0, 1, 20), 1.0, is_coloured=is_coloured))
    text.append(f" {span:.1f} times the mean of the layer")
    if how.experts * how.layers > 1:
        text.append(f"; a cell is the hottest of {how.experts} experts x {how.layers} layers")
    return text


def _character(level: float) -> str:
    return CHARACTERS[min(len(CHARACTERS) - 1, int(level * len(CHARACTERS)))]


def _colour(level: float) -> Color:
    low, high, at = (DARK, MIDDLE, 2 * level) if level < 0.5 else (MIDDLE, LIGHT, 2 * level - 1)
    return Color.from_rgb(*(round(a + (b - a) * min(1.0, at)) for a, b in zip(low, high, strict=True)))


def _layers(numbers: Sequence[int]) -> str:
    return f"layer {numbers[0]}" if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
