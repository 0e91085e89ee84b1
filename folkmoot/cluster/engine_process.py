"""The engine process: vLLM's AsyncLLM between the request queue and the expert hosts. Forked by the warm parent.

vLLM's core is forked from this process in turn, so nothing is imported twice; the executor runs inside the core
(one process). This process tokenises, leases and journals; the core runs the model, and its dispatcher sends rows to
expert hosts. Expert maps come over the control channel and go to the dispatcher over a unix socket of their own.
"""

import asyncio
import ctypes
import functools
import json
import logging
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import Future
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from setproctitle import setproctitle

from folkmoot import logs
from folkmoot.cluster import engine_model
from folkmoot.cluster.engine_model import EngineSpec
from folkmoot.cluster.map_feed import MapFeedServer
from folkmoot.experts import vllm_api
from folkmoot.experts.expert_map import ExpertMap, missing, remove_host
from folkmoot.experts.warm import Control, exit_with_owner
from folkmoot.gateway import tracing

log = logging.getLogger(__name__)

TITLE = "folkmoot::Engine"
"""What such a process is called in a list of processes."""
PR_SET_PDEATHSIG = 1
REPORT_EVERY_S = 1.0
ASK_TIMEOUT_S = 0.5
GIVE_BACK_S = 2.0

SHARED_WITH_DISPATCHER = (
    *("engine", "feed", "secret_file", "transport", "combine", "background_workers"),
    *("hedge_s", "stall_s", "no_replica_timeout_s"),
)


class MapState:
    """The latest map as this process knows it: passes it on, and says whether every expert has a replica."""

    def __init__(self, spec: EngineSpec, control: Control) -> None:
        self.is_complete = spec.feed is None
        self._control = control
        self._lock = threading.Lock()
        self._map: ExpertMap | None = None
        self._dead: set[tuple[str, int]] = set()
        self._counts: dict[str, Any] = {}
        self._counted = threading.Event()
        self._end_requests: Callable[[str], Coroutine[Any, Any, int]] | None = None
        self._on_host_lost: Callable[[dict[str, Any]], None] = lambda event: None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._feed = MapFeedServer(Path(spec.feed), self._on_event) if spec.feed is not None else None

    def on_message(self, message: dict[str, Any]) -> None:
        """From the owner: {"map": {...}}."""
        if self._feed is not None and "map" in message:
            self._feed.publish(message["map"])
            self._look(ExpertMap.from_json(json.dumps(message["map"])), None)

    def _look(self, expert_map: ExpertMap | None, dead: tuple[str, int] | None) -> None:
        with self._lock:
            self._map = expert_map or self._map
            self._dead |= {dead} if dead else set()
            if self._map is None:
                return
            gone = [a.host for a in self._map.hosts.values() if (a.host, a.incarnation) in self._dead]
            self.is_complete = not missing(functools.reduce(remove_host, gone, self._map))

    def ask_for_rows(self) -> None:
        """Have the dispatcher say how many rows each expert has had; its answer goes to the owner as it is."""
        if self._feed is not None:
            self._feed.tell({"ask": "rows"})

    def dispatch_counts(self) -> dict[str, Any]:
        """What the dispatcher has done since its start (`Dispatcher.counts`), asked for now; where it does not answer
        in ASK_TIMEOUT_S, what it said last. Blocks."""
        if self._feed is not None:
            self._counted.clear()
            self._feed.tell({"ask": "counts"})
            self._counted.wait(ASK_TIMEOUT_S)
        return self._counts

    def listen(
        self, on_host_lost: Callable[[dict[str, Any]], None], end_requests: Callable[[str], Coroutine[Any, Any, int]]
    ) -> None:
        """From now on, on the event loop that calls this: on_host_lost(event) when the dispatcher drops a host, and
        end_requests(reason) when it has waited in vain for an expert's replica; it waits until that has ended, and
        hears its result."""
        self._on_host_lost, self._end_requests = on_host_lost, end_requests
        self._loop = asyncio.get_running_loop()

    def _on_event(self, event: dict[str, Any]) -> None:
        """From the dispatcher, on the feed's thread."""
        if event.get("event") == "host_dead":  # counts at once: the expert router may be away
            self._look(None, (event["host"], event["incarnation"]))
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._on_host_lost, event)
        if event.get("event") == "counts":
            self._counts = event
            self._counted.set()
        elif event.get("event") != "no_replica":
            self._control.send(event)
        elif self._end_requests is not None and self._loop is not None:
            ending = asyncio.run_coroutine_threadsafe(self._end_requests(str(event["reason"])), self._loop)
            ending.add_done_callback(self._tell_ended)

    def _tell_ended(self, ending: Future[int]) -> None:
        if self._feed is not None and not ending.cancelled() and ending.exception() is None:
            self._feed.tell({"ended": ending.result()})


def main(raw: dict[str, Any], control: Control) -> None:
    """Entry point in a process forked by the warm parent: load the model, report ready, serve until told to stop."""
    setproctitle(TITLE)
    spec = EngineSpec(**raw)
    logs.set_up("engine", engine=spec.engine)
    maps = MapState(spec, control)
    exit_with_owner(control, maps.on_message, lambda: give_back(spec.redis, spec.store_namespace, spec.engine))
    _set_environment(spec)
    _tie_core_to_us(control)
    asyncio.run(_serve(spec, control, maps))


def give_back(redis: str, namespace: str, engine: str, error: str = "") -> None:
    """Give back all leases of an engine that is dead or about to end, so that others need not wait for their end.

    With an `error` their attempts count. Blocks, for a few seconds at most where the store is away: then they expire.
    """
    from folkmoot.gateway.errors import StoreError
    from folkmoot.gateway.queue import RequestQueue
    from folkmoot.gateway.store import Store

    async def run() -> None:
        store = Store(redis, namespace)
        try:
            async with asyncio.timeout(GIVE_BACK_S):
                given = await RequestQueue(store).abandon(engine, error)
            log.info("gave back %d leases of %s", given, engine)
        except (StoreError, TimeoutError) as e:
            log.warning("the leases of %s are left to expire: %s", engine, e)
        finally:
            await store.close()

    asyncio.run(run())


def _set_environment(spec: EngineSpec) -> None:
    """vLLM and our plugin read these, here and in the core."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # on a CPU it decides only that the executor is in-process
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ.update(vllm_api.batch_invariance(spec.device, spec.batch_invariant))
    if spec.feed is not None:
        config = {name: getattr(spec, name) for name in SHARED_WITH_DISPATCHER}
        config["micro_batches"] = spec.micro_batch_from is not None
        os.environ["FOLKMOOT_DISPATCH"] = json.dumps(config)


def _tie_core_to_us(control: Control) -> None:
    """A forked core dies with this process, and does not hold its control channel open."""
    libc = ctypes.CDLL(None)

    def in_child() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        os.close(control.fileno())

    os.register_at_fork(after_in_child=in_child)


async def _serve(spec: EngineSpec, control: Control, maps: MapState) -> None:
    began = time.monotonic()
    llm = engine_model.load(spec)
    _start_traces(spec, llm)
    from folkmoot.cluster.generation import Generator
    from folkmoot.cluster.prompts import Preparer
    from folkmoot.gateway.holder import LeaseHolder
    from folkmoot.gateway.queue import ModelRecord, RequestQueue
    from folkmoot.gateway.readiness import keep_saying
    from folkmoot.gateway.store import Store
    from folkmoot.gateway.tasks import cancel

    def can_serve() -> bool:
        return maps.is_complete and not llm.errored and not stopping.is_set()

    stopping = asyncio.Event()
    preparer = Preparer(llm, engine_model.has_tokenizer(spec), can_replay=engine_model.can_replay(spec))
    generator = Generator(llm, preparer, spec.max_num_seqs, *engine_model.batch_rooms(spec, llm), can_serve)
    record = ModelRecord(
        spec.model,
        llm.model_config.max_model_len,
        llm.model_config.get_vocab_size(),
        llm.model_config.max_logprobs,
        engine_model.has_tokenizer(spec),
    )
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    queue = RequestQueue(Store(spec.redis, spec.store_namespace))
    await _wait_for_map(maps, stopping)
    async with LeaseHolder(queue, spec.engine, record, generator.on_ended) as holder:
        load_s = time.monotonic() - began
        log.info("serving %s, loaded in %.2f s", spec.model, load_s)
        control.send({"event": "ready", "load_s": load_s, "max_model_len": record.max_model_len})
        saying = asyncio.create_task(keep_saying(queue, spec.engine, can_serve))
        maps.listen(generator.host_lost, lambda reason: generator.end_all(holder, reason))
        watching = [saying, asyncio.create_task(_report(control, generator, maps))]
        if tracing.is_on() and spec.feed is not None:
            watching.append(asyncio.create_task(generator.dispatch.follow(maps.dispatch_counts)))
        try:
            async with _metrics(spec, maps, holder, generator):
                await generator.run(holder, stopping)
                await generator.drain(spec.grace_s)
        finally:
            await cancel(watching)
    llm.shutdown()
    tracing.stop()


def _start_traces(spec: EngineSpec, llm: Any) -> None:
    """Only now, since vLLM's core is forked from here: a fork with a connection of gRPC's in it is a trap."""
    if tracing.start("folkmoot-engine", spec.engine):
        tracing.share()
        vllm_api.trace_requests(llm)


@asynccontextmanager
async def _metrics(spec: EngineSpec, maps: MapState, holder: Any, generator: Any) -> AsyncIterator[None]:
    """This process's metrics are offered. That they cannot be is no reason not to serve."""
    if spec.metrics_dir is None:
        yield
        return
    from folkmoot.cluster import metrics_engine
    from folkmoot.gateway.metrics_server import offering

    async def text() -> bytes:
        dispatch = await asyncio.to_thread(maps.dispatch_counts)
        return metrics_engine.text(spec.engine, holder, asdict(generator.counters), dispatch)

    async with AsyncExitStack() as stack:
        try:
            await stack.enter_async_context(offering(spec.engine, text, Path(spec.metrics_dir)))
        except OSError as e:
            log.warning("no metrics are offered: %s", e)
        yield


async def _wait_for_map(maps: MapState, stopping: asyncio.Event) -> None:
    while not maps.is_complete and not stopping.is_set():
        await asyncio.sleep(0.02)


async def _report(control: Control, generator: Any, maps: MapState) -> None:
    """Once a second, if anything has changed: what this engine has done, and which experts it took."""
    last: dict[str, Any] = {}
    while True:
        now = {**asdict(generator.counters), **generator.latencies.document()}
        if now != last:
            control.send({"event": "load", **now})
            await asyncio.to_thread(maps.ask_for_rows)
            last = now
        await asyncio.sleep(REPORT_EVERY_S)
