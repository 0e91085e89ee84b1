"""Traces for the simulator: read from CSV or JSON, or a made-up day of interactive work with batches in the evening."""

import csv
import io
import json
import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LANES = ("interactive", "batch")
FIELDS = ("time_s", "lane", "tokens", "deadline_s", "requests")
DAY_S = 86_400.0


class BadTrace(ValueError):
    """The trace cannot be read. The message names line and field."""


@dataclass(frozen=True)
class Arrival:
    """Requests that arrive together. `tokens`: of all of them, prompt and answer; `deadline_s`: after `time_s`."""

    time_s: float
    lane: str
    tokens: float
    deadline_s: float = math.inf
    requests: int = 1


def read(path: Path) -> list[Arrival]:
    """A trace file: CSV with a header line, or JSON (a list of objects, or one a line). Raises BadTrace, OSError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise BadTrace(f"{path.name}: is not text in UTF-8: {e.reason} at byte {e.start}") from e
    rows = _json_rows(path.name, text) if text.lstrip()[:1] in ("[", "{") else _csv_rows(path.name, text)
    arrivals = sorted((_arrival(place, row) for place, row in rows), key=lambda a: a.time_s)
    if not arrivals:
        raise BadTrace(f"{path.name}: no arrivals in it")
    return arrivals


def write(path: Path, trace: Iterable[Arrival]) -> None:
    """As CSV; `read` gives the same back."""
    with path.open("w", newline="", encoding="utf-8") as out:
        rows = csv.writer(out)
        rows.writerow(FIELDS)
        for a in trace:
            deadline = "" if math.isinf(a.deadline_s) else repr(a.deadline_s)
            rows.writerow((repr(a.time_s), a.lane, repr(a.tokens), deadline, a.requests))


def day(
    seed: int = 0,
    requests_per_s: float = 6.0,
    batches: int = 8,
    hours: float = 24.0,
    due_h: tuple[float, float] = (8.0, 12.0),
) -> list[Arrival]:
    """A day from midnight on, drawn with `seed`. Interactive requests come as a Poisson process whose rate follows the
    sun (a twentieth of the peak at 4 h, `requests_per_s` at 16 h), with bursts of some minutes; batches come from 17 h
    to 23 h and are due `due_h` later, but for one that is due within two hours. Both have log-normal sizes."""
    draw = random.Random(seed)
    arrivals = (*_interactive(draw, requests_per_s, hours), *_batches(draw, batches, hours, due_h))
    return sorted(arrivals, key=lambda a: a.time_s)


def _interactive(draw: random.Random, peak: float, hours: float) -> Iterable[Arrival]:
    bursts = [(draw.uniform(0, hours), draw.uniform(3, 10) / 60) for _ in range(round(hours / 4))]
    most, time_s = 1.6 * peak, 0.0
    while (time_s := time_s + draw.expovariate(most)) < hours * 3600:
        hour = time_s / 3600
        sun = 0.05 + 0.95 * (0.5 - 0.5 * math.cos((hour - 4) / 24 * 2 * math.pi)) ** 1.5
        burst = 1.6 if any(begin <= hour < begin + length for begin, length in bursts) else 1.0
        if draw.random() * most < peak * sun * burst:  # thinning (Lewis, Shedler 1979)
            yield Arrival(time_s, "interactive", round(draw.lognormvariate(6.0, 0.8)) + 1)


def _batches(draw: random.Random, count: int, hours: float, due_h: tuple[float, float]) -> Iterable[Arrival]:
    for number in range(count):
        requests = round(draw.lognormvariate(9.5, 0.6))
        tokens = requests * draw.uniform(300, 1200)
        if number == 0:
            time_s, deadline_s = hours * 3600 * draw.uniform(0.4, 0.6), 2 * 3600.0
            tokens, requests = tokens / 4, max(1, requests // 4)
        else:
            time_s, deadline_s = hours * 3600 * draw.uniform(17 / 24, 23 / 24), draw.uniform(*due_h) * 3600
        yield Arrival(time_s, "batch", round(tokens), deadline_s, requests)


def _csv_rows(name: str, text: str) -> Iterable[tuple[str, Mapping[str, Any]]]:
    rows = csv.DictReader(io.StringIO(text))
    header = rows.fieldnames or []
    for field in header:
        if field not in FIELDS:
            raise BadTrace(f"{name}, line 1: unknown field {field!r}; there are {', '.join(FIELDS)}")
    for row in rows:
        place = f"{name}, line {rows.line_num}"
        if None in row:
            raise BadTrace(f"{place}: has more fields than the header")
        yield place, row


def _json_rows(name: str, text: str) -> Iterable[tuple[str, Mapping[str, Any]]]:
    try:
        if text.lstrip().startswith("["):
            rows = [(f"{name}, entry {n}", row) for n, row in enumerate(json.loads(text), 1)]
        else:
            lines = enumerate(text.splitlines(), 1)
            rows = [(f"{name}, line {n}", json.loads(line)) for n, line in lines if line.strip()]
    except (ValueError, RecursionError) as e:
        raise BadTrace(f"{name}: is not JSON: {e}") from e
    for place, row in rows:
        if not isinstance(row, dict):
            raise BadTrace(f"{place}: must be an object with {', '.join(FIELDS)}, is {json.dumps(row)[:40]}")
        for field in row:
            if field not in FIELDS:
                raise BadTrace(f"{place}: unknown field {field!r}; there are {', '.join(FIELDS)}")
        yield place, row


def _arrival(place: str, row: Mapping[str, Any]) -> Arrival:
    lane = row.get("lane")
    if lane not in LANES:
        raise BadTrace(f"{place}, lane: must be one of {', '.join(LANES)}, is {lane!r}")
    requests = _number(place, row, "requests", 1, default=1.0)
    if requests != int(requests):
        raise BadTrace(f"{place}, requests: must be a whole number, is {requests:g}")
    time_s, tokens = _number(place, row, "time_s", 0), _number(place, row, "tokens", 1)
    return Arrival(time_s, lane, tokens, _number(place, row, "deadline_s", 0, default=math.inf), int(requests))


def _number(place: str, row: Mapping[str, Any], field: str, least: float, default: float | None = None) -> float:
    value = row.get(field)
    if value in (None, ""):
        if default is None:
            raise BadTrace(f"{place}, {field}: must be given")
        return default
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not least <= number < math.inf:
        raise BadTrace(f"{place}, {field}: must be a finite number >= {least:g}, is {value!r}")
    return number
