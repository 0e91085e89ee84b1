"""Where Prometheus asks: one address a node, at which every process of the node is heard.

Each process offers its own text on a unix socket in a folder that they share, and one of them answers at the address
for all: whoever has it. When that one dies another takes the address within RETRY_S, and what is dead is missing from
the text at once. Without a folder a process speaks for itself alone.

HTTP/1.1 as far as GET /metrics needs it, read-only, in plain text and small bounds. No key is asked for, so it listens
on loopback unless told otherwise.
"""

import asyncio
import contextlib
import errno
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path

from folkmoot.gateway import tasks

log = logging.getLogger(__name__)

RETRY_S = 1.0
REQUEST_TIMEOUT_S = 5.0
NEIGHBOUR_TIMEOUT_S = 2.0
"""A process that does not answer for so long (it is stopped, say) is left out of this scrape."""
MAX_REQUEST_BYTES = 8 << 10
MAX_TEXT_BYTES = 64 << 20
MAX_WAITING = 16
OFF = "off"
"""In place of an address: no metrics."""
PATH = "/metrics"
TYPE = "text/plain; version=0.0.4; charset=utf-8"
OURS = b"folkmoot_"

Produce = Callable[[], Awaitable[bytes]]


class MetricsAddressTaken(OSError):
    """Somebody else has the address, or it is none of this machine. The message names it."""


@contextlib.asynccontextmanager
async def serving(
    listen: str, name: str, produce: Produce, folder: Path | None = None, said: Callable[[str], None] = lambda url: None
) -> AsyncIterator[None]:
    """Answers scrapes with what `produce` makes, for as long as the block runs; at "off" nothing happens.

    `name` tells this process from others of the folder. `said` gets the URL each time that the address is taken. Raises
    MetricsAddressTaken where there is no folder, and so nobody to share the address with.
    """
    if listen == OFF:
        yield
        return
    async with contextlib.AsyncExitStack() as stack:
        node = _Node(name, produce, folder)
        if folder is not None:
            await stack.enter_async_context(node.offered())
            task = asyncio.create_task(_contend(listen, node, said))
            stack.push_async_callback(tasks.cancel, [task])
        else:
            try:
                await stack.enter_async_context(await _listen(listen, node, said))
            except (OSError, OverflowError) as e:  # the latter for a port beyond the last one
                raise MetricsAddressTaken(f"cannot listen on {listen}: {getattr(e, 'strerror', None) or e}") from e
        yield


@contextlib.asynccontextmanager
async def offering(name: str, produce: Produce, folder: Path) -> AsyncIterator[None]:
    """Only lets the others of the folder speak for this process, for as long as the block runs. Raises OSError."""
    async with _Node(name, produce, folder).offered():
        yield


async def _contend(listen: str, node: "_Node", said: Callable[[str], None]) -> None:
    said_why: set[int | None] = set()
    while True:
        try:
            async with await _listen(listen, node, said) as server:
                await server.serve_forever()
        except OSError as e:
            if e.errno not in said_why:
                level = logging.INFO if e.errno == errno.EADDRINUSE else logging.WARNING
                log.log(level, "somebody else may answer Prometheus at %s: %s", listen, e)
                said_why.add(e.errno)
        await asyncio.sleep(RETRY_S)


async def _listen(listen: str, node: "_Node", said: Callable[[str], None]) -> asyncio.Server:
    host, _, port = listen.rpartition(":")
    server = await asyncio.start_server(node.answer_for_all, host.strip("[]"), int(port), limit=MAX_REQUEST_BYTES)
    said(f"http://{host}:{server.sockets[0].getsockname()[1]}{PATH}")
    return server


class _Node:
    """One process, and through it the others of its folder."""

    def __init__(self, name: str, produce: Produce, folder: Path | None) -> None:
        self._name, self._produce, self._folder = name, produce, folder
        self._one_by_one = asyncio.Lock()
        self._waiting = 0

    @contextlib.asynccontextmanager
    async def offered(self) -> AsyncIterator[None]:
        """This process's own text, on its socket in the folder."""
        assert self._folder is not None
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self._folder / f"{self._name}.sock"
        unready = path.with_suffix(".new")  # nobody is to find a socket that does not listen yet, and clear it away
        unready.unlink(missing_ok=True)
        server = await asyncio.start_unix_server(self.answer_for_itself, unready, limit=MAX_REQUEST_BYTES)
        unready.chmod(0o600)
        unready.rename(path)
        try:
            async with server:
                yield
        finally:
            path.unlink(missing_ok=True)

    async def answer_for_itself(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """To a neighbour."""
        await self._answer(reader, writer, self._produce)

    async def answer_for_all(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """To Prometheus."""
        await self._answer(reader, writer, self._all)

    async def _all(self) -> bytes:
        if self._folder is None:
            return await self._produce()
        others = [path for path in self._folder.glob("*.sock") if path.stem != self._name]
        found = await asyncio.gather(self._produce(), *map(_ask, others))
        return merged(zip((self._name, *(path.stem for path in others)), found, strict=True))

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, produce: Produce) -> None:
        self._waiting += 1
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                request = (await reader.readuntil(b"\r\n\r\n")).split(b" ", 2)
                if self._waiting > MAX_WAITING:
                    status, text = "503 Service Unavailable", b"too many scrapes at once\n"
                elif request[0] != b"GET" or request[1].partition(b"?")[0] != PATH.encode():
                    status, text = "404 Not Found", f"there is only GET {PATH}\n".encode()
                else:
                    async with self._one_by_one:
                        status, text = "200 OK", await produce()
                writer.write(_head(status, len(text)) + text)
                await writer.drain()
        except (OSError, EOFError, TimeoutError, IndexError, asyncio.LimitOverrunError) as e:
            log.debug("a scrape came to nothing: %r", e)
        except Exception:
            log.exception("the metrics could not be made")
        finally:
            self._waiting -= 1
            writer.close()


def _head(status: str, size: int) -> bytes:
    lines = (f"HTTP/1.1 {status}", f"Content-Type: {TYPE}", f"Content-Length: {size}", "Connection: close", "", "")
    return "\r\n".join(lines).encode()


async def _ask(path: Path) -> bytes:
    """A neighbour's text; nothing where it is gone, or does not answer in time."""
    try:
        async with asyncio.timeout(NEIGHBOUR_TIMEOUT_S):
            reader, writer = await asyncio.open_unix_connection(path, limit=MAX_TEXT_BYTES)
            try:
                writer.write(f"GET {PATH} HTTP/1.1\r\n\r\n".encode())
                head = await reader.readuntil(b"\r\n\r\n")
                text = await reader.read(-1)
            finally:
                writer.close()
        return text if b" 200 " in head.partition(b"\r\n")[0] else b""
    except (ConnectionRefusedError, FileNotFoundError):
        path.unlink(missing_ok=True)
    except (OSError, EOFError, TimeoutError, asyncio.LimitOverrunError) as e:
        log.warning("no metrics of %s: %r", path.stem, e)
    return b""


def merged(texts: Iterable[tuple[str, bytes]]) -> bytes:
    """One text of many, (process, its text): each family once, as Prometheus wants it.

    Samples that are not Folkmoot's own (vllm:*, process_*) get the process as a label, since they may be the same in
    several; its own have labels that tell them apart.
    """
    heads: dict[bytes, list[bytes]] = {}
    samples: dict[bytes, list[bytes]] = {}
    for process, text in texts:
        family = b""
        for line in text.splitlines():
            if line.startswith(b"# HELP "):
                family = line.split(b" ", 3)[2]
                heads.setdefault(family, [])
            if line.startswith(b"# "):
                if len(heads[family]) < 2:
                    heads[family].append(line)
            elif line:
                own = line if line.startswith(OURS) else _labelled(line, process.encode())
                samples.setdefault(family, []).append(own)
    lines = [line for family, head in heads.items() for line in (*head, *samples.get(family, ()))]
    return b"\n".join(lines) + b"\n" if lines else b""


def _labelled(sample: bytes, process: bytes) -> bytes:
    name, brace, rest = sample.partition(b"{")
    if brace:
        return b'%s{process="%s",%s' % (name, process, rest)
    name, _, value = sample.partition(b" ")
    return b'%s{process="%s"} %s' % (name, process, value)
