"""A gateway's own text for Prometheus: its calls, the queue, its connection to the store, its process."""

from collections.abc import Iterator

from prometheus_client import ProcessCollector
from prometheus_client.metrics_core import Metric as Family

from folkmoot.gateway import metrics
from folkmoot.gateway.metrics import GatewayCounts, exposition
from folkmoot.gateway.metrics_queue import QueueFigures, families
from folkmoot.gateway.status import ALL_REASONS, REASONS
from folkmoot.gateway.store import Store
from folkmoot.gateway.tls import Certificates


class GatewayMetrics:
    """Belongs to the gateway's event loop."""

    def __init__(self, counts: GatewayCounts, store: Store, certificates: Certificates | None) -> None:
        self._counts, self._store, self._certificates = counts, store, certificates
        self._figures = QueueFigures(store)
        self._process = ProcessCollector(registry=None)

    async def text(self) -> bytes:
        """As it is now. While the store is away, without what stands there."""
        found = await self._figures.read()
        of_queue = [] if found is None else list(families(found))
        own = self._own(is_up=found is not None)
        return exposition([*self._counts.families(), *own, *of_queue, *self._process.collect()])

    def _own(self, *, is_up: bool) -> Iterator[Family]:
        counts = self._store.counts
        yield metrics.STORE_UP.of(float(is_up))
        yield metrics.STORE_SECONDS.family(((script,), found) for script, found in counts.took_s.items())
        yield metrics.STORE_ERRORS.family(((reason,), counts.failures[kind]) for kind, reason in REASONS.items())
        yield metrics.REFUSALS.family(((reason,), self._counts.refusals[reason]) for reason in ALL_REASONS)
        if self._certificates is not None:
            yield metrics.CERTIFICATES.family(((name,), number) for name, number in self._certificates.reads.items())
