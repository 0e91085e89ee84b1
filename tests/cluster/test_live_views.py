"""Views that stay: status and heat maps on a terminal, in a pipe, and what they are made of."""

import asyncio
import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console
from rich.text import Text

from folkmoot.cluster import expert_view, heat_view, live, status, status_view
from folkmoot.cluster.cli import main
from folkmoot.cluster.latencies import Latencies
from folkmoot.experts.expert_map import ExpertMap, HostAddress, Replica
from folkmoot.gateway.client_errors import Unavailable
from folkmoot.gateway.embedded import EmbeddedStore
from folkmoot.gateway.pb import gateway_pb2 as pb
from folkmoot.gateway.queue import Lease, RequestQueue
from folkmoot.gateway.store import Store
from tests.gateway.conftest import GatewayProcess
from tests.gateway.echo import MODEL

HOST = {
    "host": "host-0", "phase": "ready", "alive": True, "pid": 7, "actor_pid": 6, "incarnation": 1, "bytes": 5 << 20,
    "experts": [0, 1, 2], "requests": 9, "rows": 1000, "busy_s": 0.5,
}  # fmt: skip
ENGINE = {"engine": "engine-x", "phase": "ready", "pid": 8, "running": 2, "generated_tokens": 500,
          "ttft_p50_s": 0.021, "ttft_p99_s": 0.3}  # fmt: skip
MAP = {"version": 3, "layers": 4, "experts": 8, "replicas_least": 1, "replicas_wanted": 2, "missing": 0}


def document(time_s: float, rows: int, tokens: int, incarnation: int = 1) -> dict[str, Any]:
    """A cluster's own, of one host and one engine."""
    return {
        "cluster": "default", "time_s": time_s, "error": None, "map": MAP, "healing": [],
        "autoscaling": {"least": 1, "most": 1}, "balance": {"on": False},
        "hosts": [{**HOST, "rows": rows, "incarnation": incarnation}],
        "engines": [{**ENGINE, "generated_tokens": tokens}],
    }  # fmt: skip


def drawn(*parts: Any, width: int = 200) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        for part in parts:
            console.print(part)
    return captured.get()


def test_rates_are_of_the_same_processes() -> None:
    before = document(10.0, rows=1000, tokens=500)
    found = status_view.rates(before, document(12.0, rows=1500, tokens=600))
    assert found == status_view.Rates({"host-0": 250.0}, {"engine-x": 50.0})
    restarted = status_view.rates(before, document(12.0, rows=10, tokens=600, incarnation=2))
    assert restarted == status_view.Rates({}, {"engine-x": 50.0})
    assert status_view.rates(before, before) is None
    assert status_view.rates({"error": "not yet"}, before) is None


def test_a_watch_shows_what_it_heard_last_while_the_gateway_is_away() -> None:
    said = iter([document(10.0, 1000, 500), document(12.0, 1500, 600), Unavailable("gone", "UNAVAILABLE")])

    def fetched() -> dict[str, Any]:
        found = next(said)
        if isinstance(found, Exception):
            raise found
        return {**found, "models": []}

    heard, views = live.LastHeard(fetched), status_view.Watch()
    first, second, third = (drawn(heard.drawn(views.draw)) for _ in range(3))
    assert "rows/s" not in first and "21 / 300" in first
    assert "250.0" in second and "50.0" in second
    assert "UNAVAILABLE: gone" in third and "250.0" in third
    with pytest.raises(Unavailable):
        live.LastHeard(lambda: (_ for _ in ()).throw(Unavailable("gone", "UNAVAILABLE"))).drawn(views.draw)


def test_latencies_are_of_interactive_requests_from_submission_on() -> None:
    clock = [100.0]
    found = Latencies()

    def leased(lane: "pb.Lane", offset: int = 0) -> Lease:
        return Lease("r", 1, 1, pb.GenerateRequest(lane=lane), offset, 60.0, waited_s=2.0, cost=1)

    for lane, offset in ((pb.INTERACTIVE, 0), (pb.BATCH, 0), (pb.INTERACTIVE, 5)):
        tell = found.of_request(leased(lane, offset), lambda: clock[0])
        for step_s in (1.0, 0.25, 0.5):
            clock[0] += step_s
            tell()
    assert (list(found.first), list(found.between)) == ([3.0], [0.25, 0.5, 0.25, 0.5])
    assert found.document() == {"ttft_p50_s": 3.0, "ttft_p99_s": 3.0, "itl_p50_s": 0.25, "itl_p99_s": 0.5}
    assert Latencies().document() == {}


@pytest.mark.parametrize("experts", [4, 8, 60, 128, 256, 1000])
@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("is_coloured", [True, False])
def test_a_heat_map_fits_and_shows_the_hottest(experts: int, width: int, is_coloured: bool) -> None:
    """Whatever is merged: no line is too wide, no cell is empty, and the hottest expert is the lightest cell."""
    layers = list(range(61))
    rows = np.random.default_rng(0).random((61, experts)) * 100
    rows[17, experts // 2] = 10_000
    lines = heat_view.heat_map(layers, rows, width, 30, is_coloured=is_coloured)
    assert max(line.cell_len for line in lines[:-1]) <= width
    axis, *cells, legend = lines
    assert axis.plain.split()[0] == "e0" and "times the mean" in legend.plain
    assert len(cells) == 21 and cells[5].plain.startswith("15-17") and f"e{experts // 2}" in cells[5].plain
    assert len({line.cell_len - len(line.plain.rpartition("  ")[2]) for line in cells}) == 1, (
        "figures stand in a column"
    )
    assert lightest(cells[5], is_coloured) > max(lightest(line, is_coloured) for line in (*cells[:5], *cells[6:]))


def lightest(line: Text, is_coloured: bool) -> float:
    """Of a line's cells."""
    if not is_coloured:
        start = heat_view.LABEL
        return max(heat_view.CHARACTERS.find(c) for c in line.plain[start:].partition("  ")[0] or line.plain[start:-18])
    colours = [c.triplet for span in line.spans for c in (span.style.color, span.style.bgcolor) if c is not None]
    return max(0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in colours)


def test_the_scale_grows_in_lightness_only() -> None:
    levels = [heat_view._colour(level).triplet for level in np.linspace(0, 1, 50)]
    lightness = [0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in levels]
    assert lightness == sorted(lightness) and lightness[-1] - lightness[0] > 180


def test_a_layer_without_rows_is_cold() -> None:
    lines = heat_view.heat_map([0, 3], np.array([[0.0, 0.0], [1.0, 3.0]]), 80, None, is_coloured=False)
    assert lines[1].plain.rstrip().endswith("-") and "  1.50x  e1" in lines[2].plain
    assert not heat_view.heat(np.zeros((2, 3))).any()


@pytest.fixture
def started() -> Iterator[list["subprocess.Popen[Any]"]]:
    """Processes that end with the test, however it ends."""
    processes: list[subprocess.Popen[Any]] = []
    yield processes
    for one in processes:
        one.kill()
        one.wait()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Served"]:
    with EmbeddedStore(tmp_path_factory.mktemp("store")) as server:
        gateway = GatewayProcess(server.tcp_url, "views")
        yield Served(server.url, gateway.address)
        gateway.kill()


class Served:
    """A gateway, and a cluster's status document behind it."""

    def __init__(self, url: str, address: str) -> None:
        self._url, self.address = url, address

    def say(self, said: dict[str, Any], experts: dict[str, Any] | None = None) -> None:
        async def run() -> None:
            store = Store(self._url, "views")
            queue = RequestQueue(store)
            await queue.register("engine-x", MODEL, 60.0)
            await queue.set_cluster_status(json.dumps(said), 60.0)
            if experts is not None:
                await queue.set_expert_rows(json.dumps(experts), 60.0)
            await store.close()

        asyncio.run(run())

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "folkmoot.cluster.cli", *words, "--gateway", self.address]


class Terminal:
    """A command on a pseudo-terminal."""

    def __init__(self, command: list[str], **environment: str) -> None:
        self._ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (40, 150))
        self.before = termios.tcgetattr(theirs)
        self._theirs = theirs
        self.text = ""
        variables = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor", **environment}
        self.process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=variables)
        os.set_blocking(self._ours, False)

    def until(self, words: str, timeout_s: float = 30.0) -> None:
        deadline = time.monotonic() + timeout_s
        while words not in self.text:
            assert time.monotonic() < deadline and self.process.poll() is None, self.text[-3000:]
            self.read()
            time.sleep(0.02)

    def read(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self.text += os.read(self._ours, 1 << 16).decode(errors="replace")

    def press(self, key: str) -> None:
        os.write(self._ours, key.encode())

    def ended(self) -> int:
        code = self.process.wait(20)
        self.read()
        assert termios.tcgetattr(self._theirs) == self.before, "the terminal is as it was"
        os.close(self._ours)
        os.close(self._theirs)
        return code


def test_watching_the_status_on_a_terminal(served: Served, started: list["subprocess.Popen[Any]"]) -> None:
    served.say(document(10.0, rows=1000, tokens=500))
    terminal = Terminal(served.command("status", "--watch", "--every", "0.2"))
    started.append(terminal.process)
    terminal.until("host-0")
    assert "rows/s" not in terminal.text
    served.say(document(20.0, rows=4000, tokens=1500))
    terminal.until("300.0")
    terminal.until("100.0")
    terminal.press("x")  # means nothing
    terminal.press("q")
    assert terminal.ended() == 0
    assert terminal.text.count("\x1b[?1049h") == terminal.text.count("\x1b[?1049l") == 1, "the other screen was left"
    assert "Traceback" not in terminal.text


def test_watching_without_a_terminal_prints_blocks(
    served: Served, started: list["subprocess.Popen[Any]"], tmp_path: Path
) -> None:
    served.say(document(10.0, rows=1000, tokens=500))
    command = served.command("status", "--watch", "--every", "0.2")
    with (tmp_path / "out").open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL)
        started.append(process)
        deadline = time.monotonic() + 30.0
        while (text := (tmp_path / "out").read_text()).count("engine-x") < 3:
            assert time.monotonic() < deadline and process.poll() is None, text
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    assert "\x1b" not in text and "Traceback" not in text


def test_watching_as_json_is_a_document_a_line(served: Served) -> None:
    served.say(document(10.0, rows=1000, tokens=500))
    command = served.command("status", "--watch", "--every", "0.2", "--json")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [json.loads(process.stdout.readline()) for _ in range(2)]
        process.stdout.close()  # as `head` does
        assert process.wait(20) == 0
    assert [line["hosts"][0]["rows"] for line in lines] == [1000, 1000]


EXPERTS = {
    "layers": [1, 3], "half_life_s": 60.0, "time_s": 10.0, "hosts": ["host-0", "host-1"],
    "rows_total": [[100, 0, 0, 300], [50, 50, 0, 0]], "rows_recent": [[4.0, 0.0, 0.0, 0.0], [0.0, 0.0, 2.0, 2.0]],
    "replicas": [[[0], [0], [1], [0, 1]], [[0], [0], [1], [1]]],
}  # fmt: skip


def test_a_view_of_experts_says_what_is_hot_and_where_it_is() -> None:
    console = Console(width=100, color_system=None)
    recent = drawn(expert_view.view(console, EXPERTS, None, False, fits=False))
    assert "rows/s lately (half after 60 s)" in recent and "4.00x  e0" in recent and "2.00x  e2" in recent
    total = drawn(expert_view.view(console, EXPERTS, None, True, fits=False))
    assert "rows since the beginning" in total and "3.00x  e3" in total
    assert "replicas of the 8 logical experts: 1 with 2, 7 with 1" in recent
    assert "host-0: experts 0-1, and 1 of single layers" in recent and "host-1: experts 2-3\n" in recent


def test_a_view_of_one_layer_names_each_experts_hosts() -> None:
    console = Console(width=100, color_system=None)
    text = drawn(expert_view.view(console, EXPERTS, 1, True, fits=False))
    line = next(line for line in text.splitlines() if line.startswith("│ 3 "))
    assert line.replace("│", " ").split() == ["3", "0.0", "300", "3.00", "█" * 30, "host-0,", "host-1"]
    with pytest.raises(expert_view.UnknownLayer, match="layer 2 has no experts; those that have: 1, 3"):
        expert_view.view(console, EXPERTS, 2, False, fits=False)


def test_watching_experts_on_a_terminal(served: Served, started: list["subprocess.Popen[Any]"]) -> None:
    """In colour; Ctrl-C leaves."""
    served.say(document(10.0, rows=1000, tokens=500), EXPERTS)
    terminal = Terminal(served.command("experts", "--watch", "--every", "0.2"))
    started.append(terminal.process)
    terminal.until("host-1: experts")
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.ended() == 0
    assert "\x1b[48;2;" in terminal.text, "a background in true colour"
    assert "Traceback" not in terminal.text


def test_no_color_makes_it_characters() -> None:
    for environment, is_coloured in (({}, True), ({"NO_COLOR": "1"}, False)):
        console = Console(width=100, force_terminal=True, color_system="truecolor", _environ=environment)
        with console.capture() as captured:
            console.print(expert_view.view(console, EXPERTS, None, False, fits=False))
        assert ("48;2;" in captured.get()) == is_coloured
        assert ("@@" in captured.get()) != is_coloured


def test_experts_as_json_is_the_documented_shape(served: Served) -> None:
    served.say(document(10.0, rows=1000, tokens=500), EXPERTS)
    done = CliRunner().invoke(main, ["experts", "--json", "--gateway", served.address])
    assert done.exit_code == 0 and json.loads(done.output) == EXPERTS
    done = CliRunner().invoke(main, ["experts", "--layer", "2", "--gateway", served.address])
    assert done.exit_code == 1 and "layer 2 has no experts; those that have: 1, 3" in done.output


def test_replicas_are_indices_of_hosts() -> None:
    addresses = {name: HostAddress(name, 1, "n") for name in ("host-0", "host-1")}
    layers = {3: ((Replica("host-1", 0),),), 1: ((Replica("host-0", 0), Replica("host-1", 1)),)}
    found = status.replicas(ExpertMap(7, addresses, layers))
    assert found == {"map_version": 7, "hosts": ["host-0", "host-1"], "replicas": [[[0, 1]], [[1]]]}
