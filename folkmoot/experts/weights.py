"""The weight segment: prepared experts of one checkpoint, in memory that all expert hosts of a node map read-only.

It is a memory file (memfd) that the warm parent keeps and every host inherits, so it outlives hosts, and is gone with
the last process that holds it, whatever dies. For each MoE layer it has every parameter of the kernel as one array
[num_experts, ...], in which only experts that some host has loaded occupy pages.

    8 bytes length, JSON of the layout | present uint8 [layers, experts] | arrays, each at a multiple of 4096 bytes

The file is sealed against changing its size once its layout is written: sealed means laid out. An expert is marked
present once all its rows are written, under its layer's lock; a loader that dies leaves it absent, and the kernel drops
its lock.
"""

import contextlib
import fcntl
import json
import math
import mmap
import os
import struct
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property

import torch

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
PAGE = 4096
MAX_LAYOUT_BYTES = 1 << 20


class SegmentError(RuntimeError):
    """The segment belongs to other weights than those asked for."""


@dataclass(frozen=True)
class Layout:
    """What a segment holds. Two hosts may share one exactly if their layouts are equal."""

    identity: str
    """names the checkpoint's files as they are"""
    num_experts: int
    layers: Mapping[int, Mapping[str, tuple[str, tuple[int, ...]]]]
    """for each MoE layer, each parameter's dtype ("bfloat16", ...) and the shape of one expert's row"""

    def to_json(self) -> bytes:
        """As it stands at the begin of the segment."""
        return json.dumps(asdict(self), sort_keys=True).encode()

    @cached_property
    def offsets(self) -> dict[int, dict[str, int]]:
        """Where each parameter's array begins, in bytes."""
        at = self.present_at + _up(len(self.layers) * self.num_experts)
        found: dict[int, dict[str, int]] = {}
        for layer, parameters in self.layers.items():
            found[layer] = {}
            for name, (dtype, row) in parameters.items():
                found[layer][name] = at
                at += _up(self.num_experts * _row_bytes(dtype, row))
        return found

    @property
    def present_at(self) -> int:
        """Where the table of present experts begins."""
        return _up(8 + len(self.to_json()))

    @property
    def size(self) -> int:
        """Bytes of the whole segment; the experts that are loaded take less."""
        ends = [
            self.offsets[layer][name] + _up(self.num_experts * _row_bytes(dtype, row))
            for layer, parameters in self.layers.items()
            for name, (dtype, row) in parameters.items()
        ]
        return max(ends, default=self.present_at + PAGE)


class WeightSegment:
    """One host's view of the segment. Of several hosts that load at once, each layer is loaded by one at a time."""

    def __init__(self, fd: int, layout: Layout) -> None:
        """Lay out the memory file `fd` if nobody has. Raises SegmentError if it holds other weights."""
        self.fd = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)  # locks belong to an open file description
        self.layout = layout
        self._index = {layer: i for i, layer in enumerate(layout.layers)}
        with self._locked(0, wait=True):
            if fcntl.fcntl(self.fd, fcntl.F_GET_SEALS) & SEALS != SEALS:
                self._lay_out()
        self._check()
        self._memory = self._map(mmap.PROT_READ)

    @contextmanager
    def locked(self, layer: int, *, wait: bool) -> Iterator[bool]:
        """Hold a layer's lock while open. Without `wait`: whether nobody else had it. A death frees it."""
        with self._locked(1 + self._index[layer], wait=wait) as is_held:
            yield is_held

    def missing(self, layer: int, experts: Sequence[int]) -> list[int]:
        """Those of `experts` that nobody has loaded yet."""
        table = os.pread(self.fd, self.layout.num_experts, self._present_at(layer, 0))
        return [e for e in experts if not table[e]]

    def write(self, layer: int, experts: Sequence[int], rows: Mapping[str, torch.Tensor]) -> None:
        """Store `experts`, whose i-th has row i of every parameter. Needs the layer's lock."""
        if set(rows) != set(self.layout.layers[layer]):
            raise SegmentError(f"layer {layer} has parameters {sorted(self.layout.layers[layer])}, not {sorted(rows)}")
        memory = self._map(mmap.PROT_READ | mmap.PROT_WRITE)
        arrays = self._arrays(memory, layer)
        for name, values in rows.items():
            for i, expert in enumerate(experts):
                arrays[name][expert].copy_(values[i])

    def mark_present(self, layer: int, experts: Sequence[int]) -> None:
        """From now on these experts, which lie there whole, are for everybody. Needs the layer's lock."""
        for expert in experts:
            os.pwrite(self.fd, b"\1", self._present_at(layer, expert))

    def tensors(self, layer: int) -> dict[str, torch.Tensor]:
        """Every parameter of a layer as [num_experts, ...]. Read-only: writing to one is a segmentation fault."""
        return self._arrays(self._memory, layer)

    def close(self) -> None:
        """Done with loading. Tensors stay."""
        os.close(self.fd)

    def _arrays(self, memory: mmap.mmap, layer: int) -> dict[str, torch.Tensor]:
        found = {}
        for name, (dtype, row) in self.layout.layers[layer].items():
            shape = (self.layout.num_experts, *row)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # that the memory is read-only is what we want
                flat = torch.frombuffer(
                    memory, dtype=getattr(torch, dtype), count=math.prod(shape), offset=self.layout.offsets[layer][name]
                )
            found[name] = flat.view(shape)
        return found

    def _map(self, protection: int) -> mmap.mmap:
        """A mapping of the whole file, in huge pages where the kernel has some; unmapped with its last tensor."""
        memory = mmap.mmap(self.fd, self.layout.size, mmap.MAP_SHARED, protection)
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
        return memory

    def _lay_out(self) -> None:
        text = self.layout.to_json()
        if len(text) > MAX_LAYOUT_BYTES:
            raise SegmentError(f"the layout takes {len(text)} bytes, more than {MAX_LAYOUT_BYTES}")
        os.ftruncate(self.fd, self.layout.size)
        os.pwrite(self.fd, len(text).to_bytes(8, "little") + text, 0)
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, SEALS)

    def _check(self) -> None:
        length = int.from_bytes(os.pread(self.fd, 8, 0), "little")
        if os.pread(self.fd, min(length, MAX_LAYOUT_BYTES), 8) != self.layout.to_json():
            raise SegmentError("the segment holds weights of another checkpoint, or of one that has changed since")

    def _present_at(self, layer: int, expert: int) -> int:
        return self.layout.present_at + self._index[layer] * self.layout.num_experts + expert

    @contextmanager
    def _locked(self, byte: int, *, wait: bool) -> Iterator[bool]:
        """An open file description's lock on one byte. A process's own would end with the first mapping's."""
        try:
            fcntl.fcntl(self.fd, fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK, _lock(fcntl.F_WRLCK, byte))
        except (BlockingIOError, PermissionError):
            yield False
            return
        try:
            yield True
        finally:
            fcntl.fcntl(self.fd, fcntl.F_OFD_SETLK, _lock(fcntl.F_UNLCK, byte))


def _lock(kind: int, byte: int) -> bytes:
    """A `struct flock` for one byte of the file."""
    return struct.pack("hhqqi4x", kind, os.SEEK_SET, byte, 1, 0)


def _row_bytes(dtype: str, row: tuple[int, ...]) -> int:
    size: int = getattr(torch, dtype).itemsize
    return math.prod(row) * size


def _up(size: int) -> int:
    return -(-size // PAGE) * PAGE
