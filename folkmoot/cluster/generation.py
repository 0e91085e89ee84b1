"""The engine's loop: lease when there is room, generate, journal every token, hear of cancellations and deadlines.

One task a request. All of them write to one `LeaseHolder`, which journals a whole step of vLLM in one round trip.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm.exceptions import VLLMClientError
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.v1.engine.exceptions import EngineDeadError

from folkmoot import logs
from folkmoot.cluster.dispatch_trace import DispatchTrace, Watch
from folkmoot.cluster.latencies import Latencies
from folkmoot.cluster.prompts import INVALID_ARGUMENT, BadRequest, Prepared, Preparer, tokens_of_a_piece
from folkmoot.gateway import tracing
from folkmoot.gateway.errors import StoreError, public
from folkmoot.gateway.holder import LeaseHolder, ids_of
from folkmoot.gateway.pb import gateway_pb2 as pb
from folkmoot.gateway.queue import Held, Lease, Room

log = logging.getLogger(__name__)

REASONS = {"stop": pb.STOP, "length": pb.LENGTH, "repetition": pb.STOP, "abort": pb.CANCELLED, "error": pb.ERROR}
INTERNAL, DEADLINE_EXCEEDED, ABORTED = 13, 4, 10
STORE_PAUSE_S = 0.5
RESET_PAUSE_S = 0.05
QUIET_S = 60.0
"""after so long without an interactive request, batch ones may have the room that is kept for them"""


class CoreDied(RuntimeError):
    """The process that runs the model is gone; this engine cannot go on."""


@dataclass
class Counters:
    """What an engine has done since its start."""

    running: int = 0
    requests: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    failed: int = 0


class Generator:
    """Runs leased requests in vLLM. `may_lease` says whether new ones can be served now (the map is complete).

    Up to `max_running` requests that are interactive, whatever batch ones run (vLLM makes room); of those up to
    `beside`, or `alone` where no interactive one has run for QUIET_S, and no more than `max_running` with the others.
    """

    def __init__(
        self, llm: Any, preparer: Preparer, max_running: int, beside: Room, alone: Room, may_lease: Callable[[], bool]
    ) -> None:
        self._llm, self._preparer, self._may_lease = llm, preparer, may_lease
        self._max_running, self._beside, self._alone = max_running, beside, alone
        self._interactive_s = -math.inf
        self._holder: LeaseHolder | None = None
        self._tasks: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._leases: dict[tuple[str, int], Lease] = {}
        self._room = asyncio.Event()
        self._core_died = False
        self._is_sound = asyncio.Event()
        self._is_sound.set()
        self._resetting: asyncio.Task[None] | None = None
        self.counters = Counters()
        self.latencies = Latencies()
        self.dispatch = DispatchTrace()

    def on_ended(self, lease: Lease, why: Held) -> None:
        """The lease ended elsewhere (cancelled, deadline, taken over): drop the request, unless it has finished here
        and only its finish came too late."""
        with logs.bound(**ids_of(lease)):
            log.info("%s ended: %s", public(lease.request_id), why)
        task = self._tasks.get((lease.request_id, lease.epoch))
        if task is not None:
            task.cancel()

    async def run(self, holder: LeaseHolder, stopping: asyncio.Event) -> None:
        """Lease and generate until `stopping`. Raises CoreDied once vLLM's core is dead."""
        self._holder = holder
        while not stopping.is_set():
            if self._core_died or self._llm.errored:
                raise CoreDied("vLLM's core is dead")
            room, batch = self._rooms()
            if room <= 0 or not self._may_lease() or not self._is_sound.is_set():
                self._room.clear()
                await _first(self._room.wait(), stopping.wait(), timeout_s=STORE_PAUSE_S)
                continue
            try:
                for lease in await _leased(holder, room, batch, stopping):
                    self._start(holder, lease)
            except StoreError as e:
                log.warning("no leases: %s", e)
                await _first(stopping.wait(), timeout_s=STORE_PAUSE_S)

    def _rooms(self) -> tuple[int, Room]:
        batch = [lease for lease in self._leases.values() if lease.is_batch]
        room = self._max_running - (len(self._leases) - len(batch))
        now_s = time.monotonic()
        if room < self._max_running:
            self._interactive_s = now_s
        most = self._alone if now_s - self._interactive_s > QUIET_S else self._beside
        requests = min(most.requests, room) - len(batch)
        tokens = most.tokens - sum(lease.cost for lease in batch)
        return room, Room(max(0, requests), max(0, tokens))

    async def drain(self, grace_s: float) -> None:
        """Let what runs finish for so long, then drop it."""
        if self._tasks:
            log.info("draining: %d requests may finish for %g s", len(self._tasks), grace_s)
            await asyncio.wait(self._tasks.values(), timeout=grace_s)
        for task in list(self._tasks.values()):
            task.cancel()

    def host_lost(self, event: dict[str, Any]) -> None:
        """The dispatcher has dropped an expert host, in a step of all that runs now."""
        if self._holder is not None:
            for lease in self._leases.values():
                about = {"folkmoot.host": event["host"], "folkmoot.reason": event["reason"]}
                self._holder.span(lease).event("expert host dropped", about)

    async def end_all(self, holder: LeaseHolder, reason: str) -> int:
        """End all running requests with an error; how many there were. New ones wait until vLLM has forgotten what it
        cached meanwhile: the forward pass under way is finished without experts, and its keys and values are wrong."""
        self._is_sound.clear()
        ending = list(self._tasks.items())
        for key, task in ending:
            with logs.bound(**ids_of(self._leases[key])):
                log.warning("ended, since an expert has no live replica")
            holder.fail(self._leases[key], f"{reason}; please send the request again", ABORTED)
            task.cancel()
        self.counters.failed += len(ending)
        await asyncio.gather(*(task for _, task in ending), return_exceptions=True)
        self._resetting = asyncio.create_task(self._forget_cached())
        return len(ending)

    async def _forget_cached(self) -> None:
        """Waits for the pass under way, which holds its requests' blocks until then."""
        try:
            while not await self._llm.reset_prefix_cache():
                await asyncio.sleep(RESET_PAUSE_S)
        except EngineDeadError:
            pass  # `run` sees it too
        self._is_sound.set()
        self._room.set()

    def _start(self, holder: LeaseHolder, lease: Lease) -> None:
        key = (lease.request_id, lease.epoch)
        task = asyncio.create_task(self._serve(holder, lease), name=f"{lease.request_id}/{lease.epoch}")
        self._tasks[key], self._leases[key] = task, lease
        self.counters.running = len(self._tasks)
        self.counters.requests += 1
        task.add_done_callback(lambda _: self._ended(key))

    def _ended(self, key: tuple[str, int]) -> None:
        self._tasks.pop(key, None)
        self._leases.pop(key, None)
        self.counters.running = len(self._tasks)
        self._room.set()
        if self._holder is not None:
            self._holder.ask_again()

    async def _serve(self, holder: LeaseHolder, lease: Lease) -> None:
        """One request from lease to finish. Never raises: what goes wrong ends the request, or gives it back. Messages
        of errors may quote the prompt, and are not logged."""
        logs.bind(**ids_of(lease))
        try:
            async with asyncio.timeout(lease.remaining_s):
                prepared = await self._preparer.prepare(lease)
                self.counters.prompt_tokens += prepared.num_prompt
                await self._generate(holder, lease, prepared)
        except TimeoutError:
            log.info("its time is up")
            finish = pb.Finish(reason=pb.DEADLINE, code=DEADLINE_EXCEEDED, message="the request's time is up")
            holder.write(lease, pb.GenerateResponse(finish=finish))
        except BadRequest as e:
            log.info("refused, with status %d", e.code)
            holder.fail(lease, str(e), e.code)
        except (VLLMClientError, ValueError) as e:
            log.info("vLLM refuses it: %s", type(e).__name__)
            holder.fail(lease, f"vLLM refuses the request: {e}", INVALID_ARGUMENT)
        except EngineDeadError:  # `run` raises it too, and who called that gives everything back at once
            self._core_died = True
            holder.stop_leasing()
            self._room.set()
        except Exception as e:
            log.error("failed: %s", logs.frames_of(e))
            self.counters.failed += 1
            holder.fail(lease, f"the engine failed: {type(e).__name__}: {e}", INTERNAL)

    async def _generate(self, holder: LeaseHolder, lease: Lease, prepared: Prepared) -> None:
        if prepared.is_complete:  # the engine before us was lost between the last token and the finish
            usage = pb.Usage(prompt_tokens=prepared.num_prompt, completion_tokens=lease.offset)
            holder.write(lease, pb.GenerateResponse(finish=pb.Finish(reason=pb.LENGTH), usage=usage))
            return
        await self._is_sound.wait()
        with self.dispatch.watched(holder.span(lease).is_made) as watch:
            await self._stream(holder, lease, prepared, watch)

    async def _stream(self, holder: LeaseHolder, lease: Lease, prepared: Prepared, watch: Watch) -> None:
        tell = self.latencies.of_request(lease)
        done, held = lease.offset, pb.GenerateResponse()
        least = tokens_of_a_piece(lease)
        request_id = f"{lease.request_id}/{lease.epoch}"
        priority = int(lease.is_batch)  # vLLM takes the lower first
        context = holder.span(lease).context
        asked = self._llm.generate(
            prepared.prompt,
            prepared.params,
            request_id,
            priority=priority,
            trace_headers=context.headers if context is not None and tracing.is_on() else None,
        )
        async for output in asked:
            piece = _piece(output, prepared.num_prompt, is_first=not (done or held.prompt_logprobs))
            prepared.repetition.cut(piece)
            done += len(piece.token_ids)
            self.counters.generated_tokens += len(piece.token_ids)
            piece.text = held.text + piece.text
            held.MergeFrom(piece)
            if len(held.token_ids) < least and not held.HasField("finish"):
                continue
            if held.HasField("finish"):
                held.usage.completion_tokens = done
                holder.span(lease).set(watch.attributes())
            if not holder.write(lease, held):
                return
            tell()
            held = pb.GenerateResponse()


def _piece(output: RequestOutput, num_prompt: int, *, is_first: bool) -> pb.GenerateResponse:
    """One step of one request, as it goes into the journal. Prompt logprobs go out with the first."""
    made = output.outputs[0]
    piece = pb.GenerateResponse(token_ids=made.token_ids, text=made.text)
    if made.logprobs:
        piece.logprobs.extend(
            _logprobs(entries, token) for token, entries in zip(made.token_ids, made.logprobs, strict=True)
        )
    if output.prompt_logprobs and is_first:
        chosen = output.prompt_token_ids or []
        piece.prompt_logprobs.extend(
            _logprobs(entries or {}, token) for token, entries in zip(chosen, output.prompt_logprobs, strict=True)
        )
    if output.finished:
        piece.finish.CopyFrom(_finish(made))
        piece.usage.prompt_tokens = num_prompt
    return piece


def _logprobs(entries: Any, chosen: int) -> pb.TokenLogprobs:
    """vLLM's {token id: Logprob}, the chosen token first, then by rank."""
    order = sorted(entries.items(), key=lambda item: (item[0] != chosen, item[1].rank or 0))
    return pb.TokenLogprobs(
        entries=[
            pb.Logprob(token_id=token, logprob=one.logprob, rank=one.rank or 0, token=one.decoded_token or "")
            for token, one in order
        ]
    )


def _finish(made: CompletionOutput) -> pb.Finish:
    finish = pb.Finish(reason=REASONS.get(made.finish_reason or "", pb.ERROR))
    if finish.reason == pb.ERROR:
        finish.code, finish.message = INTERNAL, f"vLLM ended the request: {made.finish_reason}"
    if isinstance(made.stop_reason, str):
        finish.stop_string = made.stop_reason
    elif isinstance(made.stop_reason, int):
        finish.stop_token_id = made.stop_reason
    return finish


async def _leased(holder: LeaseHolder, room: int, batch: Room, stopping: asyncio.Event) -> list[Lease]:
    """Leases, waiting a while for the first; `stopping` ends the wait. Whatever was leased is never lost."""
    leasing = asyncio.create_task(holder.lease(room, batch=batch))
    stop = asyncio.create_task(stopping.wait())
    await asyncio.wait({leasing, stop}, return_when=asyncio.FIRST_COMPLETED)
    stop.cancel()
    if stopping.is_set():
        holder.stop_leasing()
    return await leasing


async def _first(*waits: Any, timeout_s: float) -> None:
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
