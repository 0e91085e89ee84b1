"""Rows of each expert, in all and lately."""

import numpy as np
import pytest

from folkmoot.cluster.balance_loads import MAX_ENGINES, at, counted, no_loads
from folkmoot.experts.expert_rows import ExpertRows


def rows(*layers: int, counts: list[list[int]]) -> ExpertRows:
    return ExpertRows(layers, np.array(counts, np.int64))


def test_counts_survive_the_wire() -> None:
    sent = ExpertRows.of({3: np.array([1, 2**40]), 1: np.array([0, 7])})
    came = ExpertRows.from_json(sent.to_json())
    assert came.layers == (1, 3) and came.counts.tolist() == [[0, 7], [1, 2**40]]
    assert ExpertRows.from_json(ExpertRows.of({}).to_json()).layers == ()


@pytest.mark.parametrize(
    "raw",
    [
        {},
        {"layers": [0], "experts": 2, "counts": "AAAA"},
        {"layers": [0], "experts": 1, "counts": "//////////8="},
        {"layers": [0], "experts": -1, "counts": ""},
        {"layers": [0], "experts": 1 << 40, "counts": ""},
        {"layers": 7, "experts": 1, "counts": ""},
    ],
)
def test_nonsense_is_refused(raw: dict[str, object]) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        ExpertRows.from_json(raw)


def test_totals_are_of_all_engines_and_of_their_former_lives() -> None:
    loads = no_loads((1, 3), 2, half_life_s=10.0)
    loads = counted(loads, "a", rows(1, counts=[[5, 0]]), 0.0)
    loads = counted(loads, "b", rows(1, 3, counts=[[1, 1], [2, 0]]), 1.0)
    loads = counted(loads, "a", rows(1, 3, counts=[[6, 2], [0, 9]]), 2.0)
    assert loads.total.tolist() == [[7, 3], [2, 9]]
    loads = counted(loads, "a", rows(1, counts=[[1, 0]]), 3.0)
    assert loads.total.tolist() == [[8, 3], [2, 9]], "an engine that counts from the beginning again adds what it says"


def test_recent_rows_are_a_rate_that_halves() -> None:
    loads = counted(no_loads((0,), 2, half_life_s=10.0), "a", rows(0, counts=[[10**6, 0]]), 0.0)
    assert not loads.recent.any(), "the first counts may be of long ago"
    for second in range(1, 101):
        loads = counted(loads, "a", rows(0, counts=[[10**6, 30 * second]]), float(second))
    assert loads.recent[0, 1] == pytest.approx(30, rel=0.05)
    assert at(loads, 110.0).recent[0, 1] == pytest.approx(loads.recent[0, 1] / 2)
    assert at(loads, 110.0).document()["rows_total"] == [[10**6, 3000]]


def test_rows_of_another_model_are_refused() -> None:
    loads = no_loads((0,), 2, half_life_s=10.0)
    with pytest.raises(ValueError, match="not of this model"):
        counted(loads, "a", rows(0, counts=[[1, 2, 3]]), 0.0)
    with pytest.raises(ValueError, match="not of this model"):
        counted(loads, "a", rows(5, counts=[[1, 2]]), 0.0)


def test_engines_that_are_long_silent_are_forgotten() -> None:
    loads = no_loads((0,), 1, half_life_s=10.0)
    for number in range(MAX_ENGINES + 5):
        loads = counted(loads, f"e{number}", rows(0, counts=[[1]]), float(number))
    assert len(loads.engines) == MAX_ENGINES and "e0" not in loads.engines
    assert loads.total.tolist() == [[MAX_ENGINES + 5]]
