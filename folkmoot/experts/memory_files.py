"""Memory files (memfds) that a warm parent keeps for its children, and that its successor finds again.

A file lives as long as any process has it. So when a warm parent dies, the next one at the same socket takes the files
over from the children that live on: what lies there is neither loaded nor kept twice.
"""

import contextlib
import hashlib
import os
from pathlib import Path


class MemoryFiles:
    """Descriptors by name, for the warm parent at one socket."""

    def __init__(self, socket_path: Path) -> None:
        self._owner = str(socket_path)
        self._held: dict[str, int] = {}

    def descriptor(self, name: str) -> int:
        """Of the file of this name: this process's own, else a predecessor's, else a new one."""
        if name not in self._held:
            digest = hashlib.sha256(f"{self._owner}\0{name}".encode()).hexdigest()[:16]
            title = f"folkmoot-weights-{digest}"
            found = _found(title)
            self._held[name] = os.memfd_create(title, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING) if found is None else found
        return self._held[name]

    def keep_only(self, name: str | None) -> None:
        """In a child: close all others."""
        for other in set(self._held) - {name}:
            os.close(self._held.pop(other))


def _found(title: str) -> int | None:
    """A descriptor of the memory file of this title that another process of this user has open."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile, or is none of ours
            for link in (process / "fd").iterdir():
                if os.readlink(link).startswith(f"/memfd:{title} "):
                    fd = os.open(link, os.O_RDWR | os.O_CLOEXEC)
                    if os.fstat(fd).st_uid == os.geteuid():  # anybody may give a file of his own this title
                        return fd
                    os.close(fd)
    return None
