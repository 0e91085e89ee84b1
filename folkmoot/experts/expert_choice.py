"""Which dtype each expert has where a memory budget decides, `--expert-dtype auto:BUDGET`. Pure.

What is made small is the sum over all experts of their rows times the error of their weights, under so many bytes: a
multiple-choice knapsack. Every expert begins with the fewest bytes; then, again and again, the change is made that
saves the most error a byte and still fits. Of an expert's dtypes only those on the lower convex hull of (bytes, error)
take part, so that what a byte saves only falls; then the result is as good as the linear relaxation but for less than
one change (Sinha and Zoltners, The multiple-choice knapsack problem, Operations Research 27 (3), 1979).

>>> errors = {0: {"int4": (0.010, 0.010), "int8": (1e-4, 1e-4), "bf16": (0.0, 0.0)}}
>>> choose(errors, {0: {"int4": 30, "int8": 50, "bf16": 100}}, parse("auto:0.4"), {0: (1, 9)}).letters
{0: '48'}
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

PREFIX = "auto:"
UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
LETTERS = {"int4": "4", "int8": "8", "bf16": "b"}
"""How a choice writes what experts may be, from the fewest bytes to the most."""
KINDS = {letter: kind for kind, letter in LETTERS.items()}
LEAST = 4.5 / 16
"""What int4 takes of bf16's memory, at least: its scales are a half bit a weight."""

Errors: TypeAlias = Mapping[int, Mapping[str, Sequence[float]]]
"""Of each layer and dtype: |w - w'|^2 / |w|^2 of each expert's weights."""


@dataclass(frozen=True)
class Budget:
    """What all experts may take in memory, each counted once: a part of what they take in bf16, or bytes."""

    text: str
    part: float | None = None
    bytes: int | None = None

    def limit(self, bf16_bytes: int) -> int:
        """In bytes."""
        return self.bytes if self.bytes is not None else math.floor((self.part or 0.0) * bf16_bytes)

    def check(self, least_bytes: int, bf16_bytes: int) -> None:
        """ValueError where not even int4 fits."""
        if (limit := self.limit(bf16_bytes)) < least_bytes:
            raise ValueError(
                f"--expert-dtype {self.text}: {_size(limit)} are less than the experts take in int4, "
                f"{_size(least_bytes)} ({math.ceil(1000 * least_bytes / bf16_bytes) / 1000:.3f} of bf16's)"
            )


@dataclass(frozen=True)
class Choice:
    """Of each layer a letter an expert (LETTERS). `bytes`: of all experts, `bf16_bytes`: if all were bf16, `largest`:
    of the largest column; `error`: |w - w'|^2 / |w|^2, the mean over rows."""

    letters: Mapping[int, str]
    bytes: int
    bf16_bytes: int
    largest: int
    error: float

    def kind(self, layer: int, expert: int) -> str:
        """An expert's dtype."""
        return KINDS[self.letters[layer][expert]]

    @property
    def counts(self) -> dict[str, int]:
        """How many experts have each dtype."""
        found = Counter("".join(self.letters.values()))
        return {kind: found[letter] for kind, letter in LETTERS.items() if found[letter]}

    @property
    def relative_error(self) -> float:
        """Of the weights, the root mean square over rows."""
        return math.sqrt(self.error)

    def __str__(self) -> str:
        counts = ", ".join(f"{count} in {kind}" for kind, count in reversed(self.counts.items()))
        size = f"{_size(self.bytes)}, {self.bytes / self.bf16_bytes:.2f} of bf16's"
        return f"{counts}: {size}; expected relative error of a row's weights {self.relative_error:.2%}"

    def document(self) -> dict[str, Any]:
        """As JSON data."""
        size = {"bytes": self.bytes, "of_bf16": round(self.bytes / self.bf16_bytes, 4)}
        return {**self.counts, **size, "relative_error": round(self.relative_error, 6)}


def parse(text: str) -> Budget | None:
    """What `--expert-dtype auto:BUDGET` means; None for any other dtype. ValueError says what is wrong with it."""
    if not (text == PREFIX.rstrip(":") or text.startswith(PREFIX)):
        return None
    found = re.fullmatch(r"auto:(\d*\.?\d+)([KMGT]iB)?", text)
    if found is None:
        raise ValueError(
            f"--expert-dtype {text}: auto needs a budget, a part of bf16's memory (auto:0.4) or a size (auto:8GiB)"
        )
    number = float(found[1])
    if found[2]:
        return Budget(text, bytes=int(number * UNITS[found[2]]))
    if number > 1:
        raise ValueError(f"--expert-dtype {text}: a part of bf16's memory is at most 1; a size has a unit (8GiB)")
    if number < LEAST:
        raise ValueError(f"--expert-dtype {text}: int4, the least, takes more than {LEAST:.2f} of bf16's memory")
    return Budget(text, part=number)


def choose(
    errors: Errors,
    sizes: Mapping[int, Mapping[str, int]],
    budget: Budget,
    rows: Mapping[int, Sequence[float]] | None = None,
) -> Choice:
    """The dtype of each expert. `sizes`: bytes of an expert of each layer, by dtype; `rows`: of each layer the rows
    that each expert has had (None: all alike). Each counts as one row more, so that also of experts that nobody has
    asked for those get bits that gain by them. ValueError where not even the fewest bytes fit."""
    weights = {n: [1.0 + r for r in rows[n]] if rows else [1.0] * len(e["int4"]) for n, e in errors.items()}
    totals = {kind: sum(sizes[n][kind] * len(w) for n, w in weights.items()) for kind in LETTERS}
    budget.check(totals["int4"], totals["bf16"])
    left = budget.limit(totals["bf16"]) - totals["int4"]
    chosen = {n: ["int4"] * len(w) for n, w in weights.items()}
    changes = [
        change
        for n, w in weights.items()
        for e in range(len(w))
        for change in _changes(n, e, {k: w[e] * errors[n][k][e] for k in LETTERS}, sizes[n])
    ]
    for _, n, e, before, after in sorted(changes, key=lambda change: change[0], reverse=True):
        if chosen[n][e] == before and (more := sizes[n][after] - sizes[n][before]) <= left:
            chosen[n][e] = after
            left -= more
    return _choice(chosen, errors, sizes, weights, totals["bf16"])


def _changes(
    layer: int, expert: int, error: Mapping[str, float], size: Mapping[str, int]
) -> Iterator[tuple[float, int, int, str, str]]:
    """(error saved a byte, layer, expert, dtype before, dtype after), along the lower convex hull."""
    before, kinds = "int4", list(LETTERS)
    while later := kinds[kinds.index(before) + 1 :]:
        saved = {kind: (error[before] - error[kind]) / (size[kind] - size[before]) for kind in later}
        after = max(later, key=lambda kind: saved[kind])
        if saved[after] <= 0:
            return
        yield saved[after], layer, expert, before, after
        before = after


def _choice(
    chosen: Mapping[int, Sequence[str]],
    errors: Errors,
    sizes: Mapping[int, Mapping[str, int]],
    weights: Mapping[int, Sequence[float]],
    bf16_bytes: int,
) -> Choice:
    columns = [
        sum(sizes[n][kind] for n, kind in zip(chosen, column, strict=True))
        for column in zip(*chosen.values(), strict=True)
    ]
    error = sum(w * errors[n][chosen[n][e]][e] for n, ws in weights.items() for e, w in enumerate(ws))
    letters = {n: "".join(LETTERS[kind] for kind in kinds) for n, kinds in chosen.items()}
    rows = sum(map(sum, weights.values()))
    return Choice(letters, sum(columns), bf16_bytes, max(columns), error / rows)


def _size(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
