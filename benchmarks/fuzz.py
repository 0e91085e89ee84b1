"""Strangers at the front door: requests that nobody means well, over real connections, against a real gateway that asks
for keys, its store and an engine. Nothing may crash, hang or leak, and every answer is a status of docs/gateway.md.

    python -m benchmarks.fuzz [--requests 100000] [--seed 0] [--quick] [--json FILE]

Request i of a seed is always the same one: `--only i` sends it alone, and shows it.
"""

import asyncio
import gc
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc

from benchmarks.fuzz_cases import Case, case
from benchmarks.gateway import instant_engine, process
from benchmarks.report import finish, parser, table
from folkmoot.gateway.api_keys import ROLES, KeyStore
from folkmoot.gateway.client import AsyncClient
from folkmoot.gateway.embedded import EmbeddedStore
from folkmoot.gateway.limits import Limits
from folkmoot.gateway.queue import QueueSettings
from folkmoot.gateway.server import serve
from folkmoot.gateway.settings import GatewaySettings
from folkmoot.gateway.store import Store

DOCUMENTED = frozenset(
    {
        *("OK", "INVALID_ARGUMENT", "NOT_FOUND", "ALREADY_EXISTS", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION"),
        *("UNAUTHENTICATED", "PERMISSION_DENIED", "CANCELLED", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "CLOSED", "ENDED"),
    }
)
"""CLOSED: what becomes of a connection that does not speak HTTP/2. ENDED: refused while the client still sent, which
keeps its library from reading the status. UNAVAILABLE is documented as well, but not where
store and engine are up."""
ENDED_WHILE_WRITING = "Internal error from Core"  # the client's own library says so, no server
WORKERS, CHANNELS = 48, 6
HANG_S = 30.0
PATIENCE_S = 90.0  # until what a request left is forgotten: its retention, a tenant's minute
RETENTION_S = 2.0
KEPT = (
    *("layout", "api-keys", "models", "engines", "engine-models", "load:", "ready:", "dead:", "cluster"),
    *("operation", "batch", "counts"),
)
"""What may be in the store when all requests are over: operations that no router takes are kept for a week, batches for
their own retention, counters of what became of them for ever."""


@dataclass
class Seen:
    """What has been seen so far."""

    statuses: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    hung: list[str] = field(default_factory=list)
    served: int = 0
    """sound requests of a bystander, all answered as they should be"""
    not_served: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Held:
    """What the gateway's process has at a moment. Its connections to the store are a pool that never shrinks."""

    tasks: int
    fds: int
    store_connections: int
    threads: int
    mib: float


def gateway_main(url: str, pipe: Connection) -> None:
    """The gateway's process: tells its address, and what it holds whenever it is asked."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    settings = GatewaySettings(
        listen="127.0.0.1:0",
        redis=url,
        require_keys=True,
        shutdown_s=0.0,
        grace_s=1.0,
        max_message_bytes=512 << 10,
        queue=QueueSettings(retention_s=RETENTION_S),
    )

    async def run() -> None:
        stop = asyncio.Event()

        def answer() -> None:
            try:
                pipe.recv()
                pipe.send(_held())
            except EOFError:
                asyncio.get_running_loop().remove_reader(pipe.fileno())
                stop.set()

        asyncio.get_running_loop().add_reader(pipe.fileno(), answer)
        await serve(settings, stop, pipe.send)

    asyncio.run(run())


def _held() -> Held:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    mib = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    files = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_open(fd)]
    unix = {f"socket:[{line.split()[6]}]" for line in Path("/proc/net/unix").read_text().splitlines()[1:]}
    to_store = sum(file in unix for file in files)
    threads = len(os.listdir("/proc/self/task"))
    return Held(len(asyncio.all_tasks()), len(files) - to_store, to_store, threads, mib)


def _is_open(fd: str) -> bool:
    """Whether it still is: the one that lists them is closed by now."""
    return os.path.lexists(f"/proc/self/fd/{fd}")


@contextmanager
def gateway(url: str) -> Iterator[tuple[str, Connection, Any]]:
    """Address, pipe and process of a gateway."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=gateway_main, args=(url, theirs), daemon=True)
    child.start()
    theirs.close()
    try:
        yield str(ours.recv()), ours, child
    finally:
        ours.close()
        child.join(10)
        child.kill()


async def send(channel: grpc.aio.Channel, address: str, one: Case) -> tuple[str, str]:
    """Send one request; how it ended, and in what words."""
    if one.kind == "raw HTTP/2":
        return await _send_raw(address, one.raw), ""
    compression = grpc.Compression.Gzip if one.is_compressed else grpc.Compression.NoCompression
    options: dict[str, Any] = {"timeout": one.timeout_s, "metadata": one.metadata, "compression": compression}

    async def messages() -> AsyncIterator[bytes]:
        for data in one.messages:
            yield data

    is_one = len(one.messages) == 1
    begin: Any = channel.unary_stream(one.method) if is_one else channel.stream_stream(one.method)
    call = begin(one.messages[0] if is_one else messages(), **options)
    try:
        if one.leave_s is not None:
            await asyncio.sleep(one.leave_s)
            call.cancel()
        async for _ in call:
            pass
        return (await call.code()).name, ""
    except grpc.aio.AioRpcError as e:
        if e.details() == ENDED_WHILE_WRITING and len(one.messages) != 1:
            return "ENDED", ""
        return e.code().name, e.details() or ""
    except asyncio.CancelledError:
        if not call.cancelled():
            raise
        return "CANCELLED", ""


async def _send_raw(address: str, data: bytes) -> str:
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(data)
        writer.write_eof()
        while await reader.read(1 << 16):
            pass
    except OSError:
        pass  # cut off while we spoke
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
    return "CLOSED"


async def bystander(address: str, key: str, seen: Seen) -> None:
    """A client that means well is served all the while."""
    async with AsyncClient(address, api_key=key, reconnect_s=0.0) as client:
        while True:
            try:
                async with asyncio.timeout(HANG_S):
                    tokens = [t async for c in client.generate("Hello", max_tokens=8) for t in c.token_ids]
                assert tokens == list(range(8)), tokens
                seen.served += 1
            except Exception as e:
                seen.not_served.append(repr(e))
            await asyncio.sleep(0.05)


async def fuzz(address: str, keys: list[str], requests: int, seed: int) -> Seen:
    """Send them all."""
    seen, numbers = Seen(), iter(range(requests))
    channels = [
        grpc.aio.insecure_channel(address, options=(("grpc.use_local_subchannel_pool", 1),)) for _ in range(CHANNELS)
    ]

    async def work(channel: grpc.aio.Channel) -> None:
        for i in numbers:
            one = case(random.Random(f"{seed}:{i}"), keys)
            try:
                async with asyncio.timeout(HANG_S):
                    status, words = await send(channel, address, one)
            except TimeoutError:
                seen.hung.append(f"request {i} ({one.kind}, {one.method})")
                continue
            except Exception as e:  # the client's own library refuses to send it
                status, words = "NOT_SENT" if isinstance(e, (ValueError, TypeError)) else "ERROR", repr(e)
            seen.statuses[status] += 1
            seen.kinds[one.kind] += 1
            if status not in DOCUMENTED | {"NOT_SENT"}:
                seen.wrong.append(f"request {i} ({one.kind}, {one.method}): {status}: {words[:200]}")

    watching = asyncio.create_task(bystander(address, keys[0], seen))
    await asyncio.gather(*(work(channels[i % CHANNELS]) for i in range(WORKERS)))
    watching.cancel()
    await asyncio.wait([watching])
    for channel in channels:
        await channel.close()
    return seen


async def left_in(store: Store) -> list[str]:
    """Names of what is in the store and should not be, as soon as that is nothing, or after a while."""
    ends_s = time.monotonic() + PATIENCE_S
    while True:
        prefix = f"{store.keys.root}:"
        names = [name.decode().removeprefix(prefix) for name in await store.command("KEYS", prefix + "*")]
        left = [name for name in names if not name.startswith(KEPT) and not await _is_empty(store, name)]
        if not left or time.monotonic() > ends_s:
            return left
        await asyncio.sleep(0.5)


async def _is_empty(store: Store, name: str) -> bool:
    """Whether this is a queue without entries."""
    return name.startswith("queue:") and not await store.command("XLEN", f"{store.keys.root}:{name}")


def held_after(pipe: Connection, before: Held) -> Held:
    """What the gateway holds once it holds no more than before, or after a while."""
    ends_s = time.monotonic() + HANG_S
    while True:
        pipe.send(None)
        now: Held = pipe.recv()
        if (now.tasks <= before.tasks and now.fds <= before.fds) or time.monotonic() > ends_s:
            return now
        time.sleep(0.5)


async def make_keys(store: Store) -> list[str]:
    """Two tenants with all roles, one with limits, one that may only generate."""
    keys = KeyStore(store)
    limits = Limits(requests_per_minute=6000, tokens_per_minute=10**7, concurrent_requests=20, queue_share=0.5)
    wanted = (("one", ROLES, None), ("two", ROLES, None), ("limited", ROLES, limits), ("plain", ("generate",), None))
    return [(await keys.create(tenant, roles, limits))[1] for tenant, roles, limits in wanted]


def main() -> None:
    """Command line."""
    p = parser(__doc__)
    p.add_argument("--requests", type=int, help="how many (default: 100000; 3000 with --quick)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--only", type=int, metavar="I", help="send request I of the seed alone")
    options = p.parse_args()
    requests = options.requests or (3000 if options.quick else 100_000)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fm-")))
        store = stack.enter_context(EmbeddedStore(folder))
        stack.enter_context(process(instant_engine, store.url))
        address, pipe, child = stack.enter_context(gateway(store.url))
        figures = asyncio.run(_run(store.url, address, pipe, child, requests, options.seed, options.only))
    finish(figures, options.json)
    faults = ("undocumented", "hangs", "crashes", "leaked_tasks", "leaked_fds", "leaked_keys", "bystander_failures")
    sys.exit(1 if any(figures.get(name) for name in faults) else 0)


async def _run(
    url: str, address: str, pipe: Connection, child: Any, requests: int, seed: int, only: int | None
) -> dict[str, object]:
    connection = Store(url)
    keys = await make_keys(connection)
    if only is not None:
        one = case(random.Random(f"{seed}:{only}"), keys)
        async with grpc.aio.insecure_channel(address) as channel:
            return {"request": repr(one), "status": " ".join(await send(channel, address, one))}
    await fuzz(address, keys, min(500, requests), seed + 1)  # what is made once
    before = await asyncio.to_thread(_settled, pipe)
    began_s = time.monotonic()
    seen = await fuzz(address, keys, requests, seed)
    took_s = time.monotonic() - began_s
    is_dead = not child.is_alive()
    after = before if is_dead else await asyncio.to_thread(held_after, pipe, before)
    left = await left_in(connection)
    await connection.close()
    for name, found in (
        ("undocumented", seen.wrong),
        ("hang", seen.hung),
        ("bystander", seen.not_served),
        ("key", left),
    ):
        for text in found[:20]:
            print(f"{name}: {text}", file=sys.stderr)
    print(table("how they ended", ("status", "requests"), seen.statuses.most_common()))
    print(table("what they were", ("kind", "requests"), seen.kinds.most_common()))
    return {
        "requests": sum(seen.statuses.values()) + len(seen.hung),
        "undocumented": len(seen.wrong),
        "hangs": len(seen.hung),
        "crashes": int(is_dead),
        "leaked_tasks": max(0, after.tasks - before.tasks),
        "leaked_fds": max(0, after.fds - before.fds),
        "leaked_keys": len(left),
        "store_connections_before": before.store_connections,
        "store_connections_after": after.store_connections,
        "bystander_served": seen.served,
        "bystander_failures": len(seen.not_served),
        "not_sent": seen.statuses["NOT_SENT"],
        "rss_mib_before": before.mib,
        "rss_mib_after": after.mib,
        "requests_s": sum(seen.statuses.values()) / took_s,
    }


def _settled(pipe: Connection) -> Held:
    """What the gateway holds once that does not change any more."""
    last, same = Held(-1, -1, -1, -1, 0.0), 0
    while same < 4:
        time.sleep(0.5)
        pipe.send(None)
        now: Held = pipe.recv()
        same = same + 1 if (now.tasks, now.fds) == (last.tasks, last.fds) else 0
        last = now
    return last


if __name__ == "__main__":
    main()
