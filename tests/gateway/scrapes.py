"""What a scrape says, for tests: one number a series."""

import asyncio
from collections.abc import Iterator

from prometheus_client.parser import text_string_to_metric_families

from folkmoot.gateway.metrics import Metric, exposition

THING = Metric("folkmoot_thing_total", "counter", "Things", ("of",))


def text_of(name: str) -> bytes:
    """What a process called so might say: of its own, and of somebody else's."""
    return exposition([THING.of(1.0, name)]) + b"# HELP vllm:x X\n# TYPE vllm:x gauge\nvllm:x 2.0\n"


class Scrape:
    """One text of an endpoint; each series stands in it once."""

    def __init__(self, text: str) -> None:
        self._values: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        self.names: set[str] = set()
        for family in text_string_to_metric_families(text):
            assert family.name not in self.names, f"{family.name} comes twice"
            self.names.add(family.name)
            for sample in family.samples:
                key = sample.name, frozenset(sample.labels.items())
                assert key not in self._values, f"{key} comes twice"
                self._values[key] = sample.value

    def __call__(self, name: str, **labels: str) -> float:
        """The sum of all series of this name with these labels; 0 where there is none."""
        return sum(self._values[key] for key in self.series(name, **labels))

    def series(self, name: str, **labels: str) -> Iterator[tuple[str, frozenset[tuple[str, str]]]]:
        wanted = labels.items()
        return (key for key in self._values if key[0] == name and wanted <= key[1])

    def has(self, name: str, **labels: str) -> bool:
        return any(self.series(name, **labels))

    def labels(self, label: str) -> set[str]:
        """All values of a label, whatever metric has it."""
        return {value for _, labels in self._values for name, value in labels if name == label}


async def get(url: str, request: bytes = b"") -> tuple[bytes, bytes]:
    """(head, body) of the answer to a GET of this URL, or to the bytes of another request."""
    host, _, rest = url.removeprefix("http://").partition(":")
    port, _, path = rest.partition("/")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(request or f"GET /{path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        await writer.drain()
        head, _, body = (await reader.read(-1)).partition(b"\r\n\r\n")
        return head, body
    finally:
        writer.close()


async def scrape(url: str) -> Scrape:
    head, body = await get(url)
    assert head.startswith(b"HTTP/1.1 200 OK\r\n") and b"text/plain; version=0.0.4" in head
    assert f"Content-Length: {len(body)}".encode() in head
    return Scrape(body.decode())
