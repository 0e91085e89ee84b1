"""The connection to Redis or Valkey: scripts by hash, errors translated in one place, subscriptions that come back."""

import asyncio
import hashlib
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import redis.asyncio as aioredis
from redis import exceptions as rex
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from folkmoot.gateway import errors, scripts, tasks
from folkmoot.gateway.keys import Keys
from folkmoot.gateway.metrics import STORE_BOUNDS_S, Histogram

log = logging.getLogger(__name__)

OnMessage = Callable[[str, bytes], None]  # channel, payload
OnConnect = Callable[[], Awaitable[None]]

CONNECT_TIMEOUT_S = 2.0
ANSWER_TIMEOUT_S = 5.0
MAX_CONNECTIONS = 64  # commands at once, each on a connection of its own: a server takes 10,000 clients in all
BACKOFF_FIRST_S, BACKOFF_MAX_S = 0.05, 1.0


@contextmanager
def translated() -> Iterator[None]:
    """Turns redis-py's errors into ours; every one of them, so that callers need to know only errors.py."""
    try:
        yield
    except rex.BusyLoadingError as e:
        raise errors.StoreLoading("the request store is loading its data from disk") from e
    except (rex.AuthenticationError, rex.AuthorizationError, rex.NoPermissionError) as e:
        raise errors.StoreRefused(f"the request store refused access: {e}") from e
    except (rex.ReadOnlyError, rex.ClusterDownError) as e:
        raise errors.StoreReadOnly(f"the request store takes no writes now: {e}") from e
    except rex.OutOfMemoryError as e:
        raise errors.StoreFull("the request store is out of memory") from e
    except (rex.ConnectionError, rex.TimeoutError, OSError) as e:
        if "Authentication required" in str(e):  # what redis-py makes of it while it connects
            raise errors.StoreRefused(f"the request store refused access: {e}") from e
        raise errors.StoreAway(f"the request store does not answer: {e}") from e
    except rex.ResponseError as e:
        raise _from_reply(str(e)) from e
    except rex.RedisError as e:
        raise errors.StoreRefused(f"the request store failed: {e}") from e


def _from_reply(message: str) -> errors.StoreError:
    # Errors inside a script arrive as plain replies, whose first word may stand behind a prefix.
    if "OOM" in message or "out of memory" in message:
        return errors.StoreFull("the request store is out of memory")
    if "MISCONF" in message:
        return errors.StoreDiskFull(f"the request store cannot write to its disk: {message}")
    if "READONLY" in message or "MASTERDOWN" in message or "NOREPLICAS" in message:
        return errors.StoreReadOnly(f"the request store takes no writes now: {message}")
    if "LOADING" in message:
        return errors.StoreLoading("the request store is loading its data from disk")
    if "BUSY" in message:
        return errors.StoreAway(f"the request store is busy: {message}")
    return errors.StoreRefused(f"the request store refused a command: {message}")


class StoreUrlError(ValueError):
    """This is no URL of a store. The message does not show it, since it may hold a password."""

    def __init__(self) -> None:
        super().__init__(
            "the request store's URL cannot be read: redis://, rediss:// or unix://, with special characters of a "
            "password percent-encoded"
        )


@dataclass
class StoreCounts:
    """Round trips of one connection: how long each script took, and what went wrong."""

    took_s: dict[str, Histogram] = field(default_factory=dict)
    failures: Counter[type[errors.StoreError]] = field(default_factory=Counter)

    def took(self, script: str, seconds: float) -> None:
        """One that went well."""
        if (found := self.took_s.get(script)) is None:
            found = self.took_s[script] = Histogram(STORE_BOUNDS_S)
        found.observe(seconds)


class Store:
    """One store, by URL (redis://, rediss://, unix://; any Redis 7+ or Valkey). Belongs to one event loop."""

    def __init__(self, url: str, namespace: str = "folkmoot") -> None:
        """Raises StoreUrlError."""
        self.keys = Keys(namespace)
        self.counts = StoreCounts()
        self._client: Any = _client(url, ANSWER_TIMEOUT_S)
        self._listener = _client(url, None)  # a subscription may be silent for long
        self._room = asyncio.Semaphore(MAX_CONNECTIONS)
        self._reached_since_s: float | None = None
        self._hashes = {name: hashlib.sha1(text.encode()).hexdigest() for name, text in scripts.ALL.items()}

    @property
    def steady_for_s(self) -> float:
        """How long the store has been within reach without a break, as far as this connection knows."""
        return 0.0 if self._reached_since_s is None else time.monotonic() - self._reached_since_s

    async def run(self, script: str, *args: bytes | str | int) -> Any:
        """Run one of scripts.ALL in one round trip. Raises StoreError."""
        rest = (1, self.keys.root, *args)

        async def evaluate() -> Any:
            try:
                return await self._client.execute_command("EVALSHA", self._hashes[script], *rest)
            except rex.NoScriptError:  # first use, or the store was restarted
                return await self._client.execute_command("EVAL", scripts.ALL[script], *rest)

        return await self._ask(script, evaluate)

    async def command(self, *args: bytes | str | int) -> Any:
        """Run one plain command, with the reply as it comes (bytes, int, lists). Raises StoreError."""
        return await self._ask("command", lambda: self._client.execute_command(*args))

    async def _ask(self, name: str, ask: Callable[[], Awaitable[Any]]) -> Any:
        """When there is room: its reply, with errors translated, all counted and breaks noted."""
        began_s = time.perf_counter()
        try:
            async with self._room:
                with translated():
                    reply = await ask()
        except errors.StoreError as e:
            self.counts.failures[type(e)] += 1
            if isinstance(e, errors.StoreUnavailable):
                await self._broke(e)
            raise
        self.counts.took(name, time.perf_counter() - began_s)
        self._reached_since_s = self._reached_since_s or time.monotonic()
        return reply

    async def _broke(self, error: errors.StoreUnavailable) -> None:
        """Note a break, and leave a server that has become a replica: the primary may have its address now."""
        self._reached_since_s = None
        if isinstance(error, errors.StoreReadOnly):
            for client in (self._client, self._listener):
                with suppress(rex.RedisError, OSError):
                    await client.connection_pool.disconnect()

    @asynccontextmanager
    async def subscribed(
        self, channels: Sequence[str], on_message: OnMessage, on_connect: OnConnect
    ) -> AsyncIterator[None]:
        """Calls `on_message(channel, payload)` for what is published, for as long as the block runs.

        `on_connect` runs each time the subscription stands (again): what was published in between is lost, so
        it must look for itself. Entering does not wait for the store.
        """
        task = asyncio.create_task(self._listen(channels, on_message, on_connect))
        try:
            yield
        finally:
            await tasks.cancel([task])

    async def _listen(self, channels: Sequence[str], on_message: OnMessage, on_connect: OnConnect) -> None:
        backoff_s = BACKOFF_FIRST_S
        while True:
            try:
                async with self._listener.pubsub() as pubsub:
                    await pubsub.subscribe(*channels)
                    standing = 0
                    async for message in pubsub.listen():
                        if message["type"] == "message":
                            on_message(message["channel"].decode(), message["data"])
                        elif message["type"] == "subscribe":
                            standing += 1
                            if standing == len(channels):
                                backoff_s = BACKOFF_FIRST_S
                                await on_connect()
            except (rex.RedisError, OSError, errors.StoreError) as e:
                self._reached_since_s = None
                log.warning("subscription lost (%s), again in %.2f s", e, backoff_s)
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, BACKOFF_MAX_S)

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()
        await self._listener.aclose()

    def __repr__(self) -> str:  # without the password
        return f"Store(namespace={self.keys.namespace!r})"


def _client(url: str, answer_timeout_s: float | None) -> "aioredis.Redis":
    try:
        parse_url(url)
    except ValueError:
        raise StoreUrlError from None  # the message of what was raised has parts of the URL
    keepalive = {} if url.startswith("unix:") else {"socket_keepalive": True}
    client = aioredis.Redis.from_url(
        url,
        protocol=2,
        socket_connect_timeout=CONNECT_TIMEOUT_S,
        socket_timeout=answer_timeout_s,
        retry=Retry(NoBackoff(), 0),  # whoever calls knows better whether to try again
        **keepalive,
    )
    client.response_callbacks.clear()  # replies as the store sends them, whatever shape the library would give them
    return client
