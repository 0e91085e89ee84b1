"""The host's end of a connection to one engine, over shared memory or TCP, behind one small interface.

Both lay tensors over the memory that requests arrive in and replies leave from. A peer may write there whatever and
whenever it likes: what counts is copied before it is checked (`fm_take` in hop.c), and rows are only ever numbers.
"""

import fcntl
import logging
import mmap
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch

from folkmoot.experts import links, native, wire
from folkmoot.experts.wire import Hello, WireError

log = logging.getLogger(__name__)

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
"""A segment that could shrink would kill the host with SIGBUS."""

ByteArray: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]
IntArray: TypeAlias = np.ndarray[Any, np.dtype[np.int32]]


class Areas:
    """The host's end of a connection: request and reply as tensors over the areas themselves, so no row is copied."""

    def __init__(self, hello: Hello, num_slots: IntArray, memory: ByteArray, sock: socket.socket) -> None:
        """`memory` is the request area followed by the reply area."""
        self.hello, self._sock = hello, sock
        self.came_s: float | None = None
        """over TCP: when the request at hand was whole"""
        dtype: torch.dtype = getattr(torch, hello.dtype)
        self.row_bytes = hello.hidden * dtype.itemsize
        size = wire.sizes(hello.hidden, dtype.itemsize, hello.max_rows)
        self.request, self.reply = memory[: size.request], memory[size.request : size.request + size.reply]
        length = hello.max_rows * self.row_bytes
        self.x = torch.from_numpy(self.request[:length]).view(dtype).view(hello.max_rows, hello.hidden)
        self.out = torch.from_numpy(self.reply[:length]).view(dtype).view(hello.max_rows, hello.hidden)
        self.slots, self.tokens = torch.zeros((2, hello.max_rows), dtype=torch.int32)
        self.raw = native.Connection(
            request=self.request.ctypes.data,
            reply=self.reply.ctypes.data,
            num_slots=num_slots.ctypes.data,
            slots=self.slots.data_ptr(),
            tokens=self.tokens.data_ptr(),
            engine_incarnation=hello.engine_incarnation,
            host_incarnation=hello.host_incarnation,
            row_bytes=self.row_bytes,
            fd=sock.fileno(),
            max_rows=hello.max_rows,
            num_layers=len(num_slots),
        )

    def weights(self, pairs: int) -> torch.Tensor:
        """float32 [pairs], of a request in sum mode."""
        at = wire.align(pairs * self.row_bytes) + 2 * wire.align(pairs * 4)
        return torch.from_numpy(self.request[at : at + 4 * pairs].view(np.float32).copy())

    def write_text(self, text: str) -> int:
        """Put a text into the reply; its length in bytes."""
        data = text.encode()[: wire.MAX_ERROR_BYTES]
        self.reply[: len(data)] = np.frombuffer(data, np.uint8)
        return len(data)


class ShmConnection(Areas):
    """The host's end of a ShmLink."""

    def __init__(self, sock: socket.socket, hello: Hello, num_slots: IntArray, fd: int | None) -> None:
        if fd is None:
            raise WireError("no memfd came with the hello")
        dtype: torch.dtype = getattr(torch, hello.dtype)
        segment = wire.sizes(hello.hidden, dtype.itemsize, hello.max_rows).segment
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SEALS != SEALS or os.fstat(fd).st_size != segment:
            raise WireError("the memfd has another size or is not sealed against changing it")
        memory = np.frombuffer(mmap.mmap(fd, segment), np.uint8)
        super().__init__(hello, num_slots, memory[wire.OFF_PAYLOAD :], sock)
        self.raw.page = memory.ctypes.data
        self.closed = False

    def close(self) -> None:
        """Close the socket; the mapping goes with this object."""
        self._sock.close()
        self.closed = True


class TcpConnection(Areas):
    """The host's end of a TcpLink: a thread that reads a request, hands it on, and sends what comes of it."""

    def __init__(
        self, sock: socket.socket, hello: Hello, num_slots: IntArray, bring: Callable[["TcpConnection"], None]
    ) -> None:
        links.set_tcp_options(sock)
        dtype: torch.dtype = getattr(torch, hello.dtype)
        size = wire.sizes(hello.hidden, dtype.itemsize, hello.max_rows)
        super().__init__(hello, num_slots, np.empty(size.request + size.reply, np.uint8), sock)
        self._bring = bring
        self._finished = threading.Event()
        self._good = True

    def run(self) -> None:
        """Serve until the peer is gone or breaks the protocol."""
        self._sock.settimeout(None)
        header = self.raw.header
        head = memoryview(header).cast("B")
        request, reply = self.request.data, self.reply.data
        try:
            while self._good:
                wire.receive_exactly(self._sock, head)
                if header.magic != wire.MAGIC or header.payload_bytes > len(request):
                    raise WireError(f"not a request that fits: {header}")
                wire.receive_exactly(self._sock, request[: header.payload_bytes])
                self._finished.clear()
                self.came_s = time.monotonic()
                self._bring(self)
                self._finished.wait()
                self._sock.sendall(bytes(header))
                self._sock.sendall(reply[: header.payload_bytes])
        except (OSError, WireError) as e:
            log.info("connection of engine %s ends: %s", self.hello.engine, e)
        finally:
            self._sock.close()

    def finished(self, good: bool) -> None:
        """From the computing thread: header and reply are filled; after a bad request they are the last."""
        self._good = good
        self._finished.set()
