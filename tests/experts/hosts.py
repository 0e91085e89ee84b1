"""Real expert host processes around a small, exactly known kernel: expert e of layer n maps a row x to (e + 1) * x + n.

They are forked by a real warm parent, as in production; only the weights are simpler. `stall_s` makes every call that
much slower; with `half_replies` a host sends half of each reply over TCP and then nothing; with `liar` its row for x is
NaN where bit `liar` of the whole number x[0] is set.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from folkmoot.experts import expert_map as em
from folkmoot.experts import host as host_module
from folkmoot.experts import secret, warm, wire
from folkmoot.experts.connections import TcpConnection
from folkmoot.experts.expert_map import ExpertMap, HostAddress
from folkmoot.experts.host import ExpertServer, HostSpec
from folkmoot.experts.warm import Control, exit_with_owner


def expected(
    layer: int, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, *, fused: bool = True
) -> torch.Tensor:
    """The routed output: slot order, float32 fused multiply-adds emulated in float64, rounded once; or without them."""
    total = torch.zeros(x.shape, dtype=torch.float32)
    for s in range(ids.shape[1]):
        row = expert_row(layer, x, ids[:, s]).float()
        product = row.double() * weights[:, s, None].double()
        total = (product + total.double()).float() if fused and s > 0 else product.float() + total
    return total.to(x.dtype)


def expert_row(layer: int, x: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """What expert experts[p] of a layer makes of x[p]."""
    return ((experts + 1)[:, None].to(torch.float32) * x.float() + layer).to(x.dtype)


def main(spec: dict[str, Any], control: Control) -> None:
    """Entry point in the forked process."""
    torch.set_num_threads(1)
    stall_s, liar = float(spec.pop("stall_s")), spec.pop("liar")
    host_module.REPORT_EVERY_S = spec.pop("report_every_s")
    if spec.pop("half_replies"):
        TcpConnection.run = _run_half
    host = HostSpec.from_dict(spec)

    def kernel_of(layer: int, experts: Sequence[int]) -> Any:
        logical = torch.tensor(list(experts))

        def run(x: torch.Tensor, slots: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
            time.sleep(stall_s)
            rows = expert_row(layer, x, logical[slots.long()])
            if liar is not None:
                rows[x[:, 0].long() >> liar & 1 == 1] = math.nan
            return rows if out is None else out.copy_(rows)

        return run

    kernels = {n: kernel_of(n, es) for n, es in host.experts.items()}
    slots = {n: len(es) for n, es in host.experts.items()}
    server = ExpertServer(host, kernels, slots, lambda load: host_module.offer_load(control, load))
    address = server.listen()
    exit_with_owner(control)
    control.send({"event": "ready", "address": asdict(address)})
    server.serve()


def _run_half(connection: Any) -> None:
    """In place of a connection's own `run`: half of one reply, and silence."""
    sock, raw = connection._sock, connection.raw
    wire.receive_exactly(sock, memoryview(raw.header).cast("B"))
    wire.receive_exactly(sock, connection.request.data[: raw.header.payload_bytes])
    connection._bring(connection)
    connection._finished.wait()
    sock.sendall(bytes(raw.header))
    sock.sendall(connection.reply.data[: raw.header.payload_bytes // 2])
    time.sleep(600)


@dataclass
class Hosts:
    """Starts hosts through one warm parent and keeps the map of what they hold."""

    directory: Path
    parent: warm.WarmParent
    layers: Sequence[int] = (0, 3)
    num_experts: int = 8
    children: dict[str, warm.Child] = field(default_factory=dict)
    map: ExpertMap = field(init=False)

    def __post_init__(self) -> None:
        self.map = em.empty(self.layers, self.num_experts)

    def start(
        self,
        name: str,
        experts: Mapping[int, Sequence[int]],
        *,
        stall_s: float = 0.0,
        half_replies: bool = False,
        liar: int | None = None,
        report_every_s: float = host_module.REPORT_EVERY_S,
    ) -> warm.Child:
        """Start one host and add it to the map."""
        spec = {
            "host": name,
            "incarnation": time.time_ns(),
            "checkpoint": "",
            "experts": {str(n): list(es) for n, es in experts.items()},
            "unix_path": str(self.directory / f"{name}.sock"),
            "secret_file": self.secret_file,
            "tcp": "127.0.0.1:0",
            "stall_s": stall_s,
            "half_replies": half_replies,
            "liar": liar,
            "report_every_s": report_every_s,
        }
        child = self.parent.spawn("tests.experts.hosts:main", spec, self.directory / f"{name}.log")
        ready = child.receive(20.0)
        assert ready is not None and ready["event"] == "ready", ready
        self.children[name] = child
        self.map = em.add_host(self.map, HostAddress(**ready["address"]), experts)
        return child

    def all_layers(self, experts: Sequence[int]) -> dict[int, list[int]]:
        """The same experts in every layer."""
        return {n: list(experts) for n in self.layers}

    @property
    def secret_file(self) -> str:
        """What these hosts and their engines share."""
        return str(secret.keep(self.directory / "secret"))

    def write_map(self) -> str:
        """The map in a file."""
        path = self.directory / "map.json"
        path.write_text(self.map.to_json())
        return str(path)

    def close(self) -> None:
        """End all hosts."""
        for child in self.children.values():
            child.kill()
            assert child.wait(5.0)
            child.control.close()
