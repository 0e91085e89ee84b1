"""Quantised experts on disk, so that the second start need not make them again.

One file an expert: a line of JSON, then its bytes. A file appears whole or not at all, and says what it holds and its
checksum: one that is cut short or spoilt is made again. Files lie in a folder beside the checkpoint, or, where that
cannot be written, in the user's cache folder; the folder's name follows from the checkpoint's files as they are, and
from how experts are quantised, so what has changed is never taken for what it was.
"""

import hashlib
import json
import logging
import os
import tempfile
import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from folkmoot.experts.expert_choice import Errors
from folkmoot.experts.quantised import KINDS, ExpertShape

log = logging.getLogger(__name__)

FORMAT = 1
"""Of the bytes that `quantised.quantise` makes: to be raised with any change of them."""
FOLDER = ".folkmoot-experts"
MAX_HEAD_BYTES = 4096


class ExpertCache:
    """The cached experts of one checkpoint, as it is now. Nothing here raises OSError: what cannot be kept is said."""

    def __init__(self, checkpoint: Path, identity: str, dtype: str) -> None:
        """`identity` names the checkpoint's files as they are, `dtype` what they are loaded as (an option's value)."""
        key = hashlib.sha256(f"{FORMAT} {dtype} {identity}".encode()).hexdigest()[:24]
        self.folder = _writable(checkpoint) / key
        self._is_full = False

    def shapes(self) -> dict[int, ExpertShape] | None:
        """Of every MoE layer, if they have been kept."""
        try:
            raw = json.loads((self.folder / "shapes.json").read_text())
            return {int(layer): ExpertShape(**shape) for layer, shape in raw.items()}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as e:
            log.warning("%s is read again from the checkpoint: %s", self.folder / "shapes.json", e)
            return None

    def keep_shapes(self, shapes: dict[int, ExpertShape]) -> None:
        """For the next start."""
        self._put(self.folder / "shapes.json", json.dumps({n: asdict(s) for n, s in shapes.items()}).encode())

    def errors(self) -> Errors | None:
        """What each dtype costs each expert, if it has been measured and kept."""
        path = self.folder / "errors.json"
        try:
            raw = json.loads(path.read_text())
            return {int(n): {k: tuple(map(float, by_kind[k])) for k in KINDS} for n, by_kind in raw.items()}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
            log.warning("%s is made again: %s", path, e)
            return None

    def keep_errors(self, errors: Errors) -> None:
        """For the next start."""
        self._put(self.folder / "errors.json", json.dumps(errors).encode())

    def read(self, shape: ExpertShape, kind: str, layer: int, expert: int) -> tuple[torch.Tensor, float] | None:
        """The expert's bytes and its error, as `quantise` gave them; None where they are to be made."""
        path = self.path(kind, layer, expert)
        try:
            data = path.read_bytes()
            head = data[:MAX_HEAD_BYTES].partition(b"\n")[0]
            said = json.loads(head)
            body = memoryview(data)[len(head) + 1 :]
            if said["shape"] != asdict(shape) or said["kind"] != kind or len(body) != shape.bytes(kind):
                raise ValueError(f"it holds {len(body)} bytes of {said['shape']}, {said['kind']}")
            if zlib.crc32(body) != said["crc32"]:
                raise ValueError("its checksum is wrong")
            blob = torch.empty(len(body), dtype=torch.uint8)  # aligned, as the file's own bytes are not
            blob.numpy()[:] = np.frombuffer(body, np.uint8)
            return blob, float(said["error"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError) as e:
            log.warning("%s is made again: %s", path, e)
            return None

    def keep(self, shape: ExpertShape, kind: str, layer: int, expert: int, blob: torch.Tensor, error: float) -> None:
        """Write an expert down, if there is room."""
        body = blob.numpy().tobytes()
        head = {"shape": asdict(shape), "kind": kind, "error": error, "crc32": zlib.crc32(body)}
        self._put(self.path(kind, layer, expert), json.dumps(head).encode() + b"\n" + body)

    def count(self, kind: str) -> int:
        """How many experts of a dtype lie here."""
        return sum(1 for _ in self.folder.glob(f"layer-*/expert-*.{kind}"))

    def path(self, kind: str, layer: int, expert: int) -> Path:
        """The expert's file."""
        return self.folder / f"layer-{layer}" / f"expert-{expert}.{kind}"

    def _put(self, path: Path, data: bytes) -> None:
        if self._is_full:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
                try:
                    file.write(data)
                    file.flush()
                    os.replace(file.name, path)
                except OSError:
                    os.unlink(file.name)
                    raise
        except OSError as e:
            self._is_full = True
            log.warning("quantised experts are not kept for the next start: %s", e)


def _writable(checkpoint: Path) -> Path:
    """Beside the checkpoint's files, or in the user's cache folder."""
    if os.access(checkpoint, os.W_OK):
        return checkpoint / FOLDER
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return caches / "folkmoot" / "experts"
