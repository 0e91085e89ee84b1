"""A blocking client of `folkmoot.v1.Admin`. Every call may be made again: it carries an id of its own."""

import secrets
import time
from types import TracebackType
from typing import Any

import grpc

from folkmoot.gateway.client_channel import Access
from folkmoot.gateway.client_errors import FolkmootError, Unavailable, error_of
from folkmoot.gateway.pb import admin_pb2 as pb
from folkmoot.gateway.pb import admin_pb2_grpc

CALL_TIMEOUT_S = 10.0
RETRY_S = 0.2
POLL_S = 0.25


class AdminClient:
    """Changes a running cluster through one gateway. While that is away, calls are tried again for `reconnect_s`.

    All methods raise FolkmootError (client_errors.py).
    """

    def __init__(self, address: str = "127.0.0.1:50051", reconnect_s: float = 30.0, **access: Any) -> None:
        """`access`: api_key, tls_ca, tls_cert, tls_key (client_channel.Access)."""
        self._access, self._address = Access(**access), address
        self._channel = self._access.channel(address)
        self._stub = admin_pb2_grpc.AdminStub(self._channel)  # type: ignore[no-untyped-call]
        self._reconnect_s = reconnect_s

    def __enter__(self) -> "AdminClient":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def scale(self, target: str, count: int, request_id: str = "") -> pb.Operation:
        """`target` is "hosts", "engines" or "replicas"."""
        request = pb.ScaleRequest(target=target.upper(), count=count)
        return self._submit(self._stub.Scale, request, request_id)

    def drain(self, host: str, *, force: bool = False, request_id: str = "") -> pb.Operation:
        """Take a host out of service for good."""
        return self._submit(self._stub.Drain, pb.DrainRequest(host=host, force=force), request_id)

    def replicate(self, expert: int, replicas: int, request_id: str = "") -> pb.Operation:
        """Set the number of replicas of one expert."""
        return self._submit(self._stub.Replicate, pb.ReplicateRequest(expert=expert, replicas=replicas), request_id)

    def roll_engines(self, request_id: str = "") -> pb.Operation:
        """Replace the engines one by one."""
        return self._submit(self._stub.RollEngines, pb.RollEnginesRequest(), request_id)

    def operation(self, request_id: str) -> pb.Operation:
        """What has become of an operation."""
        return self._call(self._stub.GetOperation, pb.GetOperationRequest(request_id=request_id))

    def wait(self, request_id: str, timeout_s: float, on_progress: Any = lambda message: None) -> pb.Operation:
        """The operation once it has ended, or as it is after `timeout_s`; `on_progress` is told each new message."""
        ends_s, told = time.monotonic() + timeout_s, ""
        while True:
            operation = self.operation(request_id)
            if operation.state in (pb.SUCCEEDED, pb.FAILED) or time.monotonic() > ends_s:
                return operation
            if operation.message != told:
                told = operation.message
                on_progress(told)
            time.sleep(POLL_S)

    def _submit(self, method: Any, request: Any, request_id: str) -> pb.Operation:
        request.request_id = request_id or secrets.token_hex(12)
        return self._call(method, request)

    def _call(self, method: Any, request: Any) -> pb.Operation:
        ends_s = time.monotonic() + self._reconnect_s
        while True:
            try:
                operation: pb.Operation = method(request, timeout=CALL_TIMEOUT_S, metadata=self._access.metadata)
                return operation
            except grpc.RpcError as e:
                error: FolkmootError = error_of(e, request.request_id)  # type: ignore[arg-type]
                if not isinstance(error, Unavailable):
                    raise error from e
                if time.monotonic() > ends_s:
                    error.args = (f"{error}{self._access.hint(self._address)}",)
                    raise error from e
                time.sleep(RETRY_S)
