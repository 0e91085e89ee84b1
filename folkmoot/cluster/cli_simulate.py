"""`folkmoot simulate`: what the cluster would do, without one."""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
from rich.progress import Progress

from folkmoot.cluster import simulate as simulator
from folkmoot.cluster import simulate_oracle, simulate_plot
from folkmoot.cluster.autoscale import Limits, Policy
from folkmoot.cluster.cli_common import Failure, console
from folkmoot.cluster.simulate import Outcome, World
from folkmoot.cluster.simulate_trace import Arrival, BadTrace, day, read, write

Figures = dict[str, float]


@click.group()
def simulate() -> None:
    """Try out how a cluster would behave, without starting one."""


@simulate.command()
@click.argument("trace", required=False, type=click.Path(path_type=Path, dir_okay=False, exists=True))
@click.option("--min-engines", type=click.IntRange(0), default=0, show_default=True, help="fewest engines")
@click.option("--max-engines", type=click.IntRange(1), default=16, show_default=True, help="most engines")
@click.option(
    "--tokens-per-s",
    type=click.FloatRange(0, min_open=True),
    default=World.tokens_per_s,
    show_default=True,
    help="what one engine does under full load, prompt and answer; `folkmoot status` shows what was measured",
)
@click.option(
    "--start-s",
    type=click.FloatRange(0),
    default=World.start_s,
    show_default=True,
    help="from asking for an engine to its first token, with the start of its node",
)
@click.option(
    "--head-room",
    type=click.FloatRange(0),
    default=Policy.head_room,
    show_default=True,
    help="interactive work that fills R engines gets R + head room * sqrt(R)",
)
@click.option(
    "--margin",
    type=click.FloatRange(0, 0.9),
    default=Policy.margin,
    show_default=True,
    help="part of the time until a deadline that is kept in reserve",
)
@click.option(
    "--idle-s",
    type=click.FloatRange(0),
    default=Policy.idle_s,
    show_default=True,
    help="the last engine stays for so long after the last interactive request",
)
@click.option("--seed", type=int, default=0, show_default=True, help="of the noise, and of a made-up day")
@click.option(
    "--requests-per-s",
    type=click.FloatRange(0, min_open=True),
    default=6.0,
    show_default=True,
    help="of a made-up day: interactive requests at its peak",
)
@click.option("--batches", type=click.IntRange(0), default=8, show_default=True, help="of a made-up day")
@click.option("--save-trace", type=click.Path(path_type=Path, dir_okay=False), help="write the trace there as CSV")
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    help="draw a picture: .png, .svg or .pdf (needs matplotlib)",
)
@click.option("--json", "as_json", is_flag=True, help="flat JSON, for programs")
def autoscale(trace: Path | None, plot: Path | None, save_trace: Path | None, as_json: bool, **options: Any) -> None:
    """Run the autoscaling policy on TRACE, or on a made-up day of interactive work and evening batches.

    The same policy that a cluster uses decides every few seconds, on what it measures itself. Shown are engines and
    work over time, missed deadlines, time to first token, and engine-hours against two others: an oracle that knows the
    trace beforehand (a lower bound), and the smallest fixed fleet that meets the same deadlines.

    \b
    A trace is CSV with a header line, or JSON (a list of objects, or an object a line):
      time_s      seconds from the beginning
      lane        interactive or batch
      tokens      prompt and answer, of all the requests together
      deadline_s  seconds after time_s; may be empty
      requests    how many requests arrive together; 1 if not given

    \b
    Examples:
      folkmoot simulate autoscale
      folkmoot simulate autoscale --save-trace day.csv --batches 12 --seed 3
      folkmoot simulate autoscale day.csv --max-engines 8 --start-s 300 --plot day.png
    """
    if options["min_engines"] > options["max_engines"]:
        raise click.UsageError("--min-engines must not be more than --max-engines")
    arrivals = _trace(trace, options)
    world = World(options["tokens_per_s"], options["start_s"], seed=options["seed"])
    limits = Limits(options["min_engines"], options["max_engines"])
    policy = Policy(options["head_room"], options["margin"], options["idle_s"])
    with _progress("simulating", quiet=as_json) as on_time:
        outcome = simulator.run(arrivals, simulator.Autoscaled(limits, policy), world, on_time)
    with _progress("looking for the smallest fixed fleet", quiet=as_json) as on_time:
        fixed, fleet = simulator.smallest_fixed(arrivals, world, limits.most, max(1.0, outcome.ttft_s(0.99)), on_time)
    figures = _figures(arrivals, outcome, world, policy, fixed, fleet)
    try:
        if save_trace is not None:
            write(save_trace, arrivals)
        if plot is not None:
            simulate_plot.draw(outcome, plot)
    except (simulate_plot.NoPlotting, ValueError, OSError) as e:
        raise Failure(str(e)) from e
    if as_json:
        click.echo(json.dumps(figures, indent=2))
    else:
        simulate_plot.show(console, outcome, _rows(figures, outcome, limits))


def _trace(path: Path | None, options: dict[str, Any]) -> list[Arrival]:
    if path is None:
        return day(options["seed"], options["requests_per_s"], options["batches"])
    try:
        return read(path)
    except (BadTrace, OSError) as e:
        raise Failure(str(e)) from e


def _figures(
    trace: Sequence[Arrival], outcome: Outcome, world: World, policy: Policy, fixed: int, fleet: Outcome
) -> Figures:
    oracle = simulate_oracle.engine_hours(trace, world, outcome.tokens_per_s, policy.head_room)
    bound = simulate_oracle.engine_hours(trace, world, outcome.tokens_per_s, 0.0)
    return {
        "deadlines": outcome.deadlines,
        "deadline_misses": outcome.misses,
        "engine_hours": outcome.engine_hours,
        "engine_hours_oracle": oracle,
        "engine_hours_bound": bound,
        "engine_hours_fixed_fleet": fleet.engine_hours,
        "engine_hours_over_oracle": outcome.engine_hours / oracle if oracle else 1.0,
        "engine_hours_over_bound": outcome.engine_hours / bound if bound else 1.0,
        "engine_hours_over_fixed_fleet": outcome.engine_hours / fleet.engine_hours,
        "fixed_fleet": fixed,
        "fixed_fleet_misses": fleet.misses,
        "engines_most": outcome.peak,
        "engine_starts": outcome.starts,
        "unfinished_tokens": outcome.unfinished_tokens,
        **{f"ttft_p{name}_s": outcome.ttft_s(q) for name, q in (("50", 0.5), ("99", 0.99), ("999", 0.999))},
    }


def _rows(figures: Figures, outcome: Outcome, limits: Limits) -> list[tuple[str, str]]:
    f = figures
    others = (("an oracle that knows the future", "oracle"), ("one that gives no head room", "bound"))
    rows = [
        ("deadlines missed", f"{f['deadline_misses']:.0f} of {f['deadlines']:.0f}"),
        ("engine-hours", f"{f['engine_hours']:.1f}"),
        *((f"  over {name}", _ratio(f, other)) for name, other in others),
        (f"  over a fixed fleet of {f['fixed_fleet']:.0f}", _ratio(f, "fixed_fleet")),
        ("engines, most at once; starts", f"{f['engines_most']:.0f} of {limits.most}; {f['engine_starts']:.0f}"),
    ]
    if f["fixed_fleet_misses"]:
        rows.append(("  deadlines that this fleet misses", f"{f['fixed_fleet_misses']:.0f}"))
    if outcome.waits_s:
        quantiles = (f["ttft_p50_s"], f["ttft_p99_s"], f["ttft_p999_s"])
        rows.append(("time to first token, p50 / p99 / p99.9", " / ".join(f"{t:.1f} s" for t in quantiles)))
    if f["unfinished_tokens"] > 1:
        rows.append(("tokens not done by the end", f"{f['unfinished_tokens']:.0f}"))
    return rows


def _ratio(figures: Figures, other: str) -> str:
    return f"{figures[f'engine_hours_over_{other}']:.2f} ({figures[f'engine_hours_{other}']:.1f})"


@contextlib.contextmanager
def _progress(what: str, *, quiet: bool) -> Iterator[Callable[[float], None]]:
    """A progress bar on a terminal, nothing elsewhere."""
    if quiet or not console.is_terminal:
        yield lambda part: None
        return
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(what, total=1.0)
        yield lambda part: progress.update(task, completed=part)
