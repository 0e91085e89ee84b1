"""Changes that the cluster is asked for: taken down in the store, carried out by the expert router.

Submitting one is writing its record (once for each id) and then naming it in a stream. The router reads the stream from
its beginning after every start, and goes on with each record that has not ended. So an operation outlives gateways and
routers, and submitting it again after any failure is safe.
"""

import json
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

from folkmoot.gateway.errors import GatewayError, RequestIdTaken
from folkmoot.gateway.store import Store

RETENTION_S = 3600.0
"""An operation that has ended can be read for so long."""
ABANDONED_S = 7 * 24 * 3600.0
"""One that never ends, for so long."""
MAX_STREAM = 1000
READ_WAIT_MS = 2000

ACCEPTED, UNDER_WAY, SUCCEEDED, FAILED = "accepted", "under way", "succeeded", "failed"


class UnknownOperation(GatewayError):
    """No operation of this id is known."""

    def __init__(self, request_id: str) -> None:
        super().__init__(f"unknown operation {request_id!r}: never submitted, or its record has expired")


@dataclass(frozen=True)
class Command:
    """What is asked for. `kind`: "scale" (target "hosts", "engines" or "replicas"; count; not of replicas also count to
    most), "drain" (host, force), "replicate" (expert, count) or "roll" (the engines)."""

    kind: str
    target: str = ""
    count: int = 0
    host: str = ""
    expert: int = 0
    force: bool = False
    most: int = 0


@dataclass(frozen=True)
class Operation:
    """A command, and what has become of it. `code` is a gRPC status code where it failed; times in Unix ms."""

    request_id: str
    command: Command
    state: str = ACCEPTED
    message: str = "waiting for the expert router"
    code: int = 0
    submitted_ms: int = 0
    updated_ms: int = 0

    @property
    def has_ended(self) -> bool:
        """Whether it will not change any more."""
        return self.state in (SUCCEEDED, FAILED)

    def to_json(self) -> str:
        """As JSON; `from_json` makes an equal one of it."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str | bytes) -> "Operation":
        """What `to_json` wrote."""
        raw: dict[str, Any] = json.loads(text)
        return Operation(**{**raw, "command": Command(**raw["command"])})


class Operations:
    """The records of one cluster. Every method may raise StoreError."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def submit(self, request_id: str, command: Command) -> Operation:
        """Take a command down, or find it where it has been before. Raises RequestIdTaken (same id, other command)."""
        now_ms = int(time.time() * 1000)
        operation = Operation(request_id, command, submitted_ms=now_ms, updated_ms=now_ms)
        is_new = await self._write(operation, "NX")
        if not is_new:
            operation = await self.get(request_id)
            if operation.command != command:
                raise RequestIdTaken(request_id)
        if operation.state == ACCEPTED:  # also a second time: the first may have ended between its two steps
            keys = self._store.keys
            await self._store.command("XADD", keys.operations, "MAXLEN", "~", MAX_STREAM, "*", "id", request_id)
        return operation

    async def get(self, request_id: str) -> Operation:
        """Raises UnknownOperation."""
        text = await self._store.command("GET", self._store.keys.operation(request_id))
        if text is None:
            raise UnknownOperation(request_id)
        return Operation.from_json(text)

    async def update(self, operation: Operation, **changes: Any) -> Operation:
        """Write down what has become of an operation."""
        changed = replace(operation, **changes, updated_ms=int(time.time() * 1000))
        await self._write(changed)
        return changed

    async def read(self, after: str) -> tuple[str, list[Operation]]:
        """Operations that were named after this stream entry ("0": ever) and have not ended; waits a while for one.

        The first part of the answer is what to read after next.
        """
        answer = await self._store.command(
            "XREAD", "COUNT", 100, "BLOCK", READ_WAIT_MS, "STREAMS", self._store.keys.operations, after
        )
        entries = answer[0][1] if answer else []
        found: dict[str, Operation] = {}
        for entry, fields in entries:
            after = entry.decode()
            text = await self._store.command("GET", self._store.keys.operation(fields[1].decode()))
            if text is not None and not (operation := Operation.from_json(text)).has_ended:
                found[operation.request_id] = operation
        return after, list(found.values())

    async def _write(self, operation: Operation, *conditions: str) -> bool:
        retention_s = RETENTION_S if operation.has_ended else ABANDONED_S
        key = self._store.keys.operation(operation.request_id)
        answer = await self._store.command("SET", key, operation.to_json(), "PX", int(retention_s * 1000), *conditions)
        return answer is not None
