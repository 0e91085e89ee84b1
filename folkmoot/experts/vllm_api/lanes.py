"""Two lanes in vLLM's scheduler: as soon as an interactive request is there, batch requests step back.

vLLM's own priority policy orders what waits, and preempts where a *running* request needs memory. It does neither make
room for a request that waits, nor keep a step short. `LaneScheduler` adds, before each step:

    room      a waiting interactive request that finds no slot or no memory preempts batch ones, which are prefilled
              again later
    pause     with an interactive request there, at most `batch_rows` batch requests take part in a step; the others
              keep their memory, and go on where they were
    prefill   at most `prompt_tokens` of batch prompts begin in a step; a longer one begins alone, and only where no
              interactive request is there, since its step can not be cut short (no chunked prefill on a CPU)
    near      for `NEAR_S` after an interactive request at most one batch prompt begins in a step: the next may come
              at any moment, and would wait for the end of that step
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

INTERACTIVE, BATCH = 0, 1
"""Priorities, as vLLM has them: the lower comes first."""

NEAR_S = 5.0
"""A guess at how soon somebody who has asked asks again."""

CONFIG_KEY = "folkmoot_lanes"


@dataclass(frozen=True)
class Lanes:
    """What batch requests may take of a step."""

    batch_rows: int  # beside interactive requests
    prompt_tokens: int


def use_two_lanes(config: Any, lanes: Lanes) -> None:
    """Give an engine whose configuration (VllmConfig) is made, and that has not started, two lanes."""
    scheduler = config.scheduler_config
    scheduler.policy = "priority"
    scheduler.scheduler_cls = AsyncLaneScheduler if scheduler.async_scheduling else LaneScheduler
    config.additional_config = {**config.additional_config, CONFIG_KEY: asdict(lanes)}


def paused(running: Sequence[Any], is_beside: bool, lanes: Lanes) -> list[Any]:
    """The running requests that sit out this step: batch ones, the newest first, where an interactive one is there."""
    return [r for r in running if r.priority != INTERACTIVE][lanes.batch_rows :] if is_beside else []


def step_tokens(
    taking_part: Sequence[Any],
    waiting: Iterable[Any],
    is_beside: bool,
    lanes: Lanes,
    *,
    is_near: bool,
    can_split: bool,
) -> int:
    """Tokens for a step: what runs, all interactive prompts, and what batch prompts may have. `waiting` by priority;
    `can_split`: prompts may be computed in parts."""
    total, prompts, rows = 0, 0, 0
    for r in taking_part:
        left = r.num_tokens_with_spec + r.num_output_placeholders - r.num_computed_tokens
        total += left if r.priority == INTERACTIVE or not can_split else min(left, lanes.prompt_tokens)
        rows += r.priority != INTERACTIVE
    for r in waiting:
        if r.priority == INTERACTIVE:
            total += r.num_tokens
        elif (is_beside and rows >= lanes.batch_rows) or (is_near and prompts):
            break
        elif prompts + r.num_tokens > lanes.prompt_tokens:
            prompts = lanes.prompt_tokens if can_split else prompts or (0 if is_beside else r.num_tokens)
            break
        else:
            rows, prompts = rows + 1, prompts + r.num_tokens
    return total + prompts


class _TwoLanes(Scheduler):
    """Mixed into either of vLLM's schedulers."""

    max_num_scheduled_tokens: int
    _near_until_s = 0.0

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """One step."""
        lanes = Lanes(**self.vllm_config.additional_config[CONFIG_KEY])
        self._make_room()
        self.running.sort(key=lambda r: r.priority)  # tokens of the step go to interactive ones first
        is_beside = any(r.priority == INTERACTIVE for r in self.running) or self._first_interactive() is not None
        now_s = time.monotonic()
        if is_beside:
            self._near_until_s = now_s + NEAR_S
        resting = paused(self.running, is_beside, lanes)
        for r in resting:
            r.next_decode_eligible_step = self.current_step + 2  # not in the step that begins now
        limit: int = self.max_num_scheduled_tokens
        taking_part = [r for r in self.running if r not in resting]
        can_split = self.scheduler_config.enable_chunked_prefill
        is_near = now_s < self._near_until_s
        wanted = step_tokens(taking_part, self.waiting, is_beside, lanes, is_near=is_near, can_split=can_split)
        self.max_num_scheduled_tokens = min(limit, max(1, wanted))
        try:
            return super().schedule(*args, **kwargs)
        finally:
            self.max_num_scheduled_tokens = limit

    def _first_interactive(self) -> Any:
        first = self.waiting.peek_request() if self.waiting else None
        return first if first is not None and first.priority == INTERACTIVE else None

    def _make_room(self) -> None:
        """Preempt batch requests, the newest first, until the first waiting interactive one has a slot and memory."""
        first = self._first_interactive()
        while first is not None and not self._has_room(first):
            victim = max(self.running, key=lambda r: (r.priority, r.arrival_time), default=None)
            if victim is None or victim.priority == INTERACTIVE or not self._request_blocks_can_be_freed(victim):
                return
            self.running.remove(victim)
            self.prev_step_scheduled_req_ids.discard(victim.request_id)  # else it might go on in this same step
            self._preempt_request(victim, time.monotonic())

    def _has_room(self, request: Any) -> bool:
        groups = len(self.kv_cache_config.kv_cache_groups)
        free = self.kv_cache_manager.block_pool.get_num_free_blocks() * self.block_size // max(1, groups)
        return bool(len(self.running) < self.max_num_active_reqs and free > request.num_tokens)


class LaneScheduler(_TwoLanes):
    """For engines whose steps do not overlap, as on a CPU."""


class AsyncLaneScheduler(_TwoLanes, AsyncScheduler):
    """For engines that schedule a step while the one before runs."""
