"""The simulator: the cluster's policy on traces, against an oracle and a fixed fleet; bad traces; its command."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from folkmoot.cluster import simulate_oracle as oracle
from folkmoot.cluster import simulate_plot
from folkmoot.cluster.autoscale import Limits
from folkmoot.cluster.cli import main
from folkmoot.cluster.simulate import Autoscaled, World, fixed, run, smallest_fixed
from folkmoot.cluster.simulate_trace import Arrival, BadTrace, day, read, write

EXACT = World(tokens_per_s=100.0, start_s=50.0, drain_s=0.0, noise=0.0, first_token_s=0.5)


def test_work_takes_as_long_as_it_takes() -> None:
    outcome = run([Arrival(0.0, "batch", 6000.0, 3600.0)], fixed(1), EXACT)
    assert outcome.misses == 0 and outcome.unfinished_tokens == 0
    done_s = next(s.time_s for s in outcome.samples if s.time_s and not s.batch_owed)
    assert done_s == 50 + 60
    assert outcome.engine_hours == pytest.approx(1.0)


def test_a_deadline_is_missed_where_engines_are_too_few() -> None:
    trace = [Arrival(0.0, "batch", 100 * 600.0, 300.0), Arrival(0.0, "batch", 10.0, 100.0)]
    assert run(trace, fixed(1), EXACT).misses == 1
    assert run(trace, fixed(3), EXACT).misses == 0
    assert run(trace, fixed(0), EXACT).misses == 2


def test_interactive_requests_wait_for_those_before_them_and_for_no_batch() -> None:
    trace = [
        Arrival(0.0, "batch", 1e5, math.inf),
        Arrival(100.0, "interactive", 1000.0, requests=1),
        Arrival(100.0, "interactive", 1000.0, requests=3),
    ]
    outcome = run(trace, fixed(1), EXACT)
    assert outcome.waits_s == ((0.5, 1), (10.5, 3))
    assert outcome.ttft_s(0.25) == 0.5 and outcome.ttft_s(0.5) == 10.5


def test_requests_wait_while_nothing_is_up() -> None:
    outcome = run([Arrival(1000.0, "interactive", 10.0)], Autoscaled(Limits(0, 4)), EXACT)
    ((wait_s, _),) = outcome.waits_s
    assert 50 < wait_s < 50 + 3 * EXACT.step_s
    assert outcome.peak == 1 and outcome.starts == 1


def test_it_goes_down_to_nothing_and_up_again() -> None:
    trace = [Arrival(0.0, "interactive", 10.0), Arrival(3600.0, "batch", 5000.0, 3600.0)]
    samples = run(trace, Autoscaled(Limits(0, 4)), EXACT).samples
    targets = [s.target for s in samples]
    assert targets[1] == 1 and targets[int(3000 / 5)] == 0 and targets[int(3650 / 5)] == 1 and targets[-1] == 0


@pytest.mark.parametrize("seed", range(2))
def test_a_day_meets_every_deadline_at_nearly_the_least_engine_hours(seed: int) -> None:
    trace, world = day(seed, requests_per_s=1.0, batches=8), World(tokens_per_s=400.0, step_s=10.0, seed=seed)
    planner = Autoscaled(Limits(0, 16))
    outcome = run(trace, planner, world)
    least = oracle.engine_hours(trace, world, outcome.tokens_per_s, planner.policy.head_room)
    _, fleet = smallest_fixed(trace, world, 16, max(1.0, outcome.ttft_s(0.99)))
    assert outcome.misses == 0 and outcome.deadlines == 8 and outcome.unfinished_tokens < 1
    assert 1.0 <= outcome.engine_hours / least < 1.2
    doubled = run(trace, Autoscaled(Limits(0, 16)), replace(world, estimate=2.0))
    assert doubled.misses == 0 and doubled.engine_hours / least < 1.2, "estimates that are too high are found out"
    assert outcome.engine_hours < 0.7 * fleet.engine_hours


def test_the_same_seed_is_the_same_day() -> None:
    assert day(3, 1.0, 2) == day(3, 1.0, 2) != day(4, 1.0, 2)


# ------------------------------------------------------------------------------------------------ the oracle


def test_the_oracle_fills_gaps_that_are_shorter_than_a_start() -> None:
    assert oracle.held_s([1, 1, 0, 1], 120.0) == 4 * 60 + 120
    assert oracle.held_s([1, 0, 0, 0, 0, 1], 120.0) == 2 * 60 + 2 * 120
    assert oracle.held_s([2, 1], 30.0) == 2 * 60 + 30 + 60 + 30
    assert oracle.held_s([], 30.0) == 0


def test_the_oracle_counts_what_spare_room_cannot_hold_in_time() -> None:
    trace = [Arrival(0.0, "batch", 100.0, 120.0), Arrival(0.0, "batch", 100.0, 600.0)]
    assert oracle.left_over(trace, [50.0] * 10) == 0
    assert oracle.left_over(trace, [20.0] * 10) == 60 + 0
    assert oracle.left_over(trace, [0.0] * 10) == 200
    assert oracle.left_over(trace, [-5.0] * 10) == 200


@pytest.mark.parametrize("engines", [1, 2, 5])
def test_no_fleet_beats_the_oracle(engines: int) -> None:
    trace, world = day(1, requests_per_s=1.0, batches=3), World(tokens_per_s=1000.0, seed=1, noise=0.0)
    outcome = run(trace, fixed(engines), world)
    if not outcome.misses:
        assert outcome.engine_hours >= oracle.engine_hours(trace, world, outcome.tokens_per_s, 0.0)


# ------------------------------------------------------------------------------------------------- traces


def test_a_trace_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    trace = day(1, 0.02, 3)
    write(tmp_path / "day.csv", trace)
    assert read(tmp_path / "day.csv") == trace


@pytest.mark.parametrize(
    "text",
    [
        "lane,tokens,time_s\nbatch,5,2\ninteractive,3,1\n",
        '[{"lane": "batch", "tokens": 5, "time_s": 2}, {"lane": "interactive", "tokens": 3, "time_s": 1}]',
        '{"lane": "batch", "tokens": 5, "time_s": 2}\n\n{"lane": "interactive", "tokens": "3", "time_s": 1}\n',
    ],
)
def test_csv_and_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "t").write_text(text)
    assert read(tmp_path / "t") == [Arrival(1.0, "interactive", 3.0), Arrival(2.0, "batch", 5.0)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("time_s,lane,tokens\n1,batch,5\n2,bulk,5\n", "line 3, lane: must be one of interactive, batch, is 'bulk'"),
        ("time_s,lane,tokens\n-1,batch,5\n", "line 2, time_s: must be a finite number >= 0, is '-1'"),
        ("time_s,lane,tokens\n1,batch,many\n", "line 2, tokens: must be a finite number >= 1, is 'many'"),
        ("time_s,lane,tokens\n1,batch,nan\n", "line 2, tokens: must be a finite number >= 1, is 'nan'"),
        ("time_s,lane,tokens\n1,batch\n", "line 2, tokens: must be given"),
        ("time_s,lane,tokens,requests\n1,batch,5,1.5\n", "line 2, requests: must be a whole number, is 1.5"),
        ("time_s,lane,tokens\n1,batch,5,7\n", "line 2: has more fields than the header"),
        ("time,lane,tokens\n1,batch,5\n", "line 1: unknown field 'time'; there are time_s, lane"),
        ("time_s,lane,tokens\n", "no arrivals"),
        ("", "no arrivals"),
        ('[{"time_s": 1, "lane": "batch", "tokens": true}]', "entry 1, tokens: must be a finite number"),
        ('[{"time_s": 1, "lane": "batch", "tokens": 1, "x": 2}]', "entry 1: unknown field 'x'"),
        ("[1]", "entry 1: must be an object"),
        ("[" * 100_000, "is not JSON"),
        ('{"time_s": 1', "is not JSON"),
    ],
)
def test_a_bad_trace_names_line_and_field(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(BadTrace, match=r"bad\.csv") as bad:
        read(path)
    assert message in str(bad.value)
    done = CliRunner().invoke(main, ["simulate", "autoscale", str(path)])
    assert done.exit_code == 1 and "Traceback" not in done.output


def test_what_is_no_text_is_no_trace(tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadTrace, match="is not text in UTF-8"):
        read(tmp_path / "bad")


# ------------------------------------------------------------------------------------------------ the command


@pytest.fixture
def short(tmp_path: Path) -> Path:
    path = tmp_path / "short.csv"
    write(path, [Arrival(0.0, "interactive", 500.0), Arrival(60.0, "batch", 2e6, 3600.0, 1000)])
    return path


def test_the_command_shows_a_plot_and_a_table(short: Path, tmp_path: Path) -> None:
    picture = tmp_path / "short.svg"
    done = CliRunner().invoke(main, ["simulate", "autoscale", str(short), "--plot", str(picture)])
    assert done.exit_code == 0, done.output
    assert "deadlines missed" in done.output and "0 of 1" in done.output and "█" in done.output
    assert picture.read_text().lstrip().startswith("<?xml")


def test_the_command_in_json(short: Path) -> None:
    done = CliRunner().invoke(main, ["simulate", "autoscale", str(short), "--json", "--max-engines", "4"])
    figures = json.loads(done.output)
    assert figures["deadline_misses"] == 0 and figures["engines_most"] == 1
    assert figures["engine_hours"] > 0 and figures["engine_hours_oracle"] > 0


def test_limits_that_cannot_be(short: Path) -> None:
    done = CliRunner().invoke(main, ["simulate", "autoscale", str(short), "--min-engines", "4", "--max-engines", "2"])
    assert done.exit_code == 2 and "--min-engines must not be more than --max-engines" in done.output


def test_bars() -> None:
    assert simulate_plot.bars([0, 1, 2], 3, rows=1) == [" ▄█"]
    assert simulate_plot.bars([0, 4, 8], 3, rows=2) == ["  █", " ██"]
    assert simulate_plot.bars([1, 5, 0, 0], 2, rows=1) == ["█ "]
    assert simulate_plot.bars([], 10, rows=1) == [""]
