"""Which expert gets how many bits: within the budget, near the best there is, and more for those that are used more."""

import itertools
import math
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from folkmoot.experts.expert_choice import LETTERS, Budget, Choice, Errors, choose, parse

SIZES = {"int4": 30, "int8": 51, "bf16": 100}
FORMS = tuple(LETTERS)


def budget(size: int) -> Budget:
    return Budget(f"auto:{size}", bytes=size)


def cost(choice: Choice, errors: Errors, rows: Mapping[int, Sequence[float]]) -> float:
    return sum(
        (1 + rows[n][e]) * errors[n][choice.kind(n, e)][e] for n in errors for e in range(len(choice.letters[n]))
    )


def chosen_bytes(choice: Choice) -> int:
    return sum(SIZES[choice.kind(n, e)] for n, row in choice.letters.items() for e in range(len(row)))


@given(
    experts=st.lists(
        st.tuples(st.floats(0.005, 0.02), st.floats(1e-5, 4e-4), st.sampled_from([0.0, 1e-6]), st.integers(0, 1000)),
        min_size=1,
        max_size=6,
    ),
    part=st.floats(0.3, 1.0),
)
def test_nothing_within_the_budget_is_better_by_more_than_one_change(
    experts: list[tuple[float, float, float, int]], part: float
) -> None:
    errors = {0: {kind: [e[i] for e in experts] for i, kind in enumerate(FORMS)}}
    rows = {0: [float(e[3]) for e in experts]}
    limit = math.floor(part * SIZES["bf16"] * len(experts))
    choice = choose(errors, {0: SIZES}, budget(limit), rows)
    assert choice.bytes == chosen_bytes(choice) <= limit
    assert choice.error == pytest.approx(cost(choice, errors, rows) / sum(1 + r for r in rows[0]))
    best = min(
        sum((1 + rows[0][e]) * errors[0][kind][e] for e, kind in enumerate(kinds))
        for kinds in itertools.product(FORMS, repeat=len(experts))
        if sum(SIZES[kind] for kind in kinds) <= limit
    )
    largest = max((1 + r) * e[0] for r, e in zip(rows[0], experts, strict=True))
    assert best - 1e-9 <= cost(choice, errors, rows) <= best + largest


def test_experts_that_are_used_more_get_more_bits() -> None:
    errors = {n: {"int4": [0.01] * 4, "int8": [1e-4] * 4, "bf16": [0.0] * 4} for n in (1, 5)}
    sizes = dict.fromkeys(errors, SIZES)
    rows = {1: (0, 10, 1000, 10), 5: (5, 0, 0, 900)}
    seen = [choose(errors, sizes, budget(size), rows).letters for size in (240, 282, 400, 500, 800)]
    assert seen[0] == {1: "4444", 5: "4444"}
    assert seen[1] == {1: "4484", 5: "4448"}
    assert seen[2] == {1: "48b8", 5: "8448"}, "16 bits for the hottest, before 8 for those that nobody asks for"
    assert seen[3] == {1: "88b8", 5: "884b"}
    assert seen[4] == {1: "bbbb", 5: "bbbb"}
    alike = choose(errors, sizes, budget(282))
    assert alike.counts == {"int4": 6, "int8": 2} and alike.error == pytest.approx((6 * 0.01 + 2 * 1e-4) / 8)


def test_the_worse_an_expert_is_in_four_bits_the_sooner_it_gets_eight() -> None:
    errors = {0: {"int4": [0.01, 0.02, 0.01], "int8": [1e-4] * 3, "bf16": [0.0] * 3}}
    assert choose(errors, {0: SIZES}, budget(111)).letters == {0: "484"}


def test_bits_that_save_nothing_are_not_bought() -> None:
    errors = {0: {"int4": [0.0, 0.01], "int8": [0.0, 0.0], "bf16": [0.0, 0.0]}}
    assert choose(errors, {0: SIZES}, budget(10_000)).letters == {0: "48"}


def test_a_column_is_as_large_as_its_experts() -> None:
    errors = {n: {"int4": [0.01, 0.02], "int8": [1e-4] * 2, "bf16": [0.0] * 2} for n in (0, 1)}
    choice = choose(errors, dict.fromkeys(errors, SIZES), budget(4 * 30 + 2 * 21))
    assert choice.letters == {0: "48", 1: "48"} and choice.largest == 2 * 51
    assert str(choice).startswith("2 in int8, 2 in int4: 0.0 MiB, 0.41 of bf16's; expected relative error ")
    assert choice.document() == {
        "int4": 2, "int8": 2, "bytes": 162, "of_bf16": 0.405, "relative_error": round(math.sqrt(0.00505), 6)
    }  # fmt: skip


def test_a_budget_below_four_bits_is_refused_with_what_they_take() -> None:
    errors = {0: {"int4": [0.01] * 2, "int8": [1e-4] * 2, "bf16": [0.0] * 2}}
    sizes = {0: {kind: size << 20 for kind, size in SIZES.items()}}
    found = parse("auto:0.29")
    assert found is not None
    with pytest.raises(ValueError, match=r"auto:0.29: 58.0 MiB are less than .* in int4, 60.0 MiB \(0.300 of bf16's\)"):
        choose(errors, sizes, found)


def test_what_a_budget_may_be() -> None:
    assert [parse(text) for text in ("int4", "checkpoint", "bf16")] == [None] * 3
    part, size = parse("auto:.5"), parse("auto:1.5MiB")
    assert part is not None and part.limit(1001) == 500
    assert size is not None and size.limit(0) == 3 << 19
