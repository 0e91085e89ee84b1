"""The endpoint for Prometheus: several processes at one address, who takes it over, and what is no scrape."""

import asyncio
import contextlib
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter, generate_latest

from folkmoot.gateway import metrics_server
from folkmoot.gateway.metrics import Histogram, Metric, exposition
from folkmoot.gateway.metrics_server import MAX_REQUEST_BYTES, MetricsAddressTaken, merged, serving
from tests.gateway.conftest import until
from tests.gateway.scrapes import Scrape, get, scrape, text_of


async def offer(stack: AsyncExitStack, listen: str, name: str, folder: Path | None = None) -> str:
    """The URL at which this process is heard."""
    said: list[str] = []

    async def produce() -> bytes:
        return text_of(name)

    await stack.enter_async_context(serving(listen, name, produce, folder, said.append))
    if folder is None:
        return said[0]
    url = f"http://{listen}/metrics"

    async def is_heard() -> bool:
        return name in await heard(url)

    await until(is_heard)
    return url


@pytest.fixture
def address() -> Iterator[str]:
    """One that nobody else is given meanwhile: bound, not listening."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{held.getsockname()[1]}"


PROCESS = """
import asyncio, sys
from pathlib import Path
from folkmoot.gateway.metrics_server import serving
from tests.gateway.scrapes import text_of
name, listen, folder = sys.argv[1:]
async def produce():
    return text_of(name)
async def run():
    async with serving(listen, name, produce, Path(folder), lambda url: print(url, flush=True)):
        await asyncio.Event().wait()
asyncio.run(run())
"""


@contextlib.contextmanager
def process(name: str, listen: str, folder: Path) -> "Iterator[subprocess.Popen[str]]":
    command = [sys.executable, "-c", PROCESS, name, listen, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        try:
            yield child
        finally:
            child.kill()


async def heard(url: str) -> set[str]:
    """Which processes a scrape hears; none where nobody answers."""
    try:
        return (await scrape(url)).labels("of")
    except OSError:
        return set()


async def test_one_address_speaks_for_all_and_passes_on_when_its_process_is_killed(
    address: str, tmp_path: Path, stack: AsyncExitStack
) -> None:
    folder, url = tmp_path / "metrics", f"http://{address}/metrics"
    with process("first", address, folder) as first:
        assert first.stdout is not None
        assert await asyncio.to_thread(first.stdout.readline) == f"{url}\n"
        await offer(stack, address, "second", folder)
        await offer(stack, address, "third", folder)
        now = await scrape(url)
        assert now.labels("of") == {"first", "second", "third"}
        assert {now("vllm:x", process=name) for name in now.labels("of")} == {2.0} and now("vllm:x") == 6.0
        os.kill(first.pid, signal.SIGKILL)
        first.wait()

    async def is_passed_on() -> bool:
        return await heard(url) == {"second", "third"}

    await until(is_passed_on)
    assert {path.name for path in folder.iterdir()} == {"second.sock", "third.sock"}, "what is left of it is cleared"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


async def test_a_process_that_hangs_is_left_out_and_comes_back(
    address: str, tmp_path: Path, stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_server, "NEIGHBOUR_TIMEOUT_S", 0.3)
    url = await offer(stack, address, "first", tmp_path)
    with process("second", address, tmp_path) as second:

        async def are_both() -> bool:
            return await heard(url) == {"first", "second"}

        await until(are_both)
        os.kill(second.pid, signal.SIGSTOP)
        assert await heard(url) == {"first"}
        assert (tmp_path / "second.sock").exists(), "it lives"
        os.kill(second.pid, signal.SIGCONT)
        await until(are_both)


async def test_who_leaves_in_order_is_gone_at_once(address: str, tmp_path: Path, stack: AsyncExitStack) -> None:
    url = await offer(stack, address, "first", tmp_path)
    async with AsyncExitStack() as other:
        await offer(other, address, "second", tmp_path)
        assert await heard(url) == {"first", "second"}
    assert await heard(url) == {"first"}


async def test_an_address_that_cannot_be_had_is_named(stack: AsyncExitStack, tmp_path: Path) -> None:
    url = await offer(stack, "127.0.0.1:0", "one")
    taken = url.removeprefix("http://").removesuffix("/metrics")
    with pytest.raises(MetricsAddressTaken, match=taken):
        await offer(stack, taken, "other")
    assert await heard(url) == {"one"}
    for nowhere in ("127.0.0.1:99999", "no.such.host.invalid:9464"):
        with pytest.raises(MetricsAddressTaken, match=nowhere):
            await offer(stack, nowhere, "other")


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", b"404"),
        (b"GET /metricsx HTTP/1.1\r\n\r\n", b"404"),
        (b"POST /metrics HTTP/1.1\r\nContent-Length: 2\r\n\r\nhi", b"404"),
        (b"GET /metrics?name[]=x HTTP/1.1\r\nAccept: application/openmetrics-text\r\n\r\n", b"200"),
        (b"\r\n\r\n", b"404"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"404"),
        (b"GET /metrics HTTP/1.1\r\nX: " + b"x" * MAX_REQUEST_BYTES * 2 + b"\r\n\r\n", b""),
    ],
    ids=["root", "longer", "post", "query", "empty", "tls", "long"],
)
async def test_what_is_no_scrape_gets_no_metrics(stack: AsyncExitStack, request_: bytes, status: bytes) -> None:
    url = await offer(stack, "127.0.0.1:0", "one")
    head = b""
    with contextlib.suppress(ConnectionResetError):
        head, _ = await get(url, request_)
    assert head.split(b" ")[1:2] == ([status] if status else [])
    assert await heard(url) == {"one"}, "and others are answered"


async def test_who_says_nothing_is_cut_off_and_holds_nobody_up(
    stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_server, "REQUEST_TIMEOUT_S", 0.5)
    monkeypatch.setattr(metrics_server, "MAX_WAITING", 4)
    url = await offer(stack, "127.0.0.1:0", "one")
    host, _, port = url.removeprefix("http://").removesuffix("/metrics").partition(":")
    silent = [await asyncio.open_connection(host, int(port)) for _ in range(4)]
    head, body = await get(url)
    assert head.split(b" ")[1] == b"503" and b"too many" in body
    for reader, writer in silent:
        assert await asyncio.wait_for(reader.read(-1), 10.0) == b""
        writer.close()
    assert await heard(url) == {"one"}


async def test_an_error_of_the_producer_is_logged_and_the_next_scrape_answered(
    stack: AsyncExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    said: list[str] = []
    errors = [ValueError("no")]

    async def produce() -> bytes:
        if errors:
            raise errors.pop()
        return text_of("one")

    await stack.enter_async_context(serving("127.0.0.1:0", "one", produce, said=said.append))
    assert await get(said[0]) == (b"", b"")
    assert "metrics could not be made" in caplog.text
    assert await heard(said[0]) == {"one"}


def test_merging_keeps_each_family_once_and_tells_foreign_series_apart() -> None:
    histogram = Histogram((1.0,))
    histogram.observe(0.5)
    seconds = Metric("folkmoot_some_seconds", "histogram", "Some", ("of",))
    registry = CollectorRegistry()
    Counter("vllm:y", "Y", ["model"], registry=registry).labels("a b").inc(3)
    foreign = generate_latest(registry)
    texts = [("a", exposition([seconds.of(histogram, "a")]) + foreign), ("b", b""), ("c", text_of("c") + foreign)]
    now = Scrape(merged(texts).decode())
    assert now("folkmoot_some_seconds_count", of="a") == 1 and now("folkmoot_thing_total", of="c") == 1
    assert now("vllm:y_total", model="a b", process="a") == now("vllm:y_total", process="c") == 3.0
    assert len({*now.series("vllm:y_created")}) == 2
    assert merged([]) == b""
