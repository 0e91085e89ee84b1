"""`folkmoot bench`: load on a running cluster through its gateway, as clients see it."""

import asyncio
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from folkmoot.gateway.client import AsyncClient


@dataclass(frozen=True)
class Load:
    """What to send: random token ids, greedy answers of exactly `max_tokens`."""

    num_requests: int
    concurrency: int
    prompt_tokens: int
    max_tokens: int
    model: str = ""


@dataclass
class Timing:
    """One request: seconds to the first token, seconds between later pieces, and tokens had."""

    first_token_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    tokens: int = 0


def run(address: str, load: Load, **access: Any) -> dict[str, float]:
    """Send the load; flat figures, latencies in milliseconds. Raises FolkmootError if a request fails.

    `access`: the client's keys and TLS (client_channel.Access).
    """
    return asyncio.run(_run(address, load, access))


async def _run(address: str, load: Load, access: dict[str, Any]) -> dict[str, float]:
    async with AsyncClient(address, **access) as client:
        models = {m.name: m for m in await client.models()}
        model = models[load.model] if load.model else next(iter(models.values()))
        rng = random.Random(0)
        prompts = [
            [rng.randrange(model.vocab_size) for _ in range(load.prompt_tokens)] for _ in range(load.num_requests)
        ]
        await _one(client, model.name, prompts[0], 2)  # the first request pays for what is made once
        slots = asyncio.Semaphore(load.concurrency)

        async def limited(prompt: list[int]) -> Timing:
            async with slots:
                return await _one(client, model.name, prompt, load.max_tokens)

        began = time.monotonic()
        timings = await asyncio.gather(*(limited(prompt) for prompt in prompts))
        return figures(timings, time.monotonic() - began)


async def _one(client: AsyncClient, model: str, prompt: list[int], max_tokens: int) -> Timing:
    timing, began = Timing(), time.monotonic()
    last = began
    options: dict[str, Any] = {"model": model, "max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True}
    async for chunk in client.generate(token_ids=prompt, **options):
        now = time.monotonic()
        if chunk.token_ids:
            if timing.tokens == 0:
                timing.first_token_s = now - began
            else:
                timing.gaps_s.append(now - last)
            timing.tokens += len(chunk.token_ids)
            last = now
    return timing


def figures(timings: Sequence[Timing], wall_s: float) -> dict[str, float]:
    """Pure: totals and percentiles."""
    first_ms = [1e3 * t.first_token_s for t in timings]
    gaps_ms = [1e3 * gap for t in timings for gap in t.gaps_s] or [0.0]
    tokens = sum(t.tokens for t in timings)
    result = {
        "requests": float(len(timings)),
        "wall_s": wall_s,
        "generated_tokens": float(tokens),
        "tokens_per_s": tokens / wall_s,
        "requests_per_s": len(timings) / wall_s,
    }
    for name, values in (("ttft", first_ms), ("itl", gaps_ms)):
        result |= {f"{name}_p{p}_ms": percentile(values, p) for p in (50, 90, 99)}
        result[f"{name}_mean_ms"] = statistics.fmean(values)
    return result


def percentile(values: Sequence[float], percent: int) -> float:
    """The smallest value that `percent` per cent of the values do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


def show(console: Console, load: Load, result: dict[str, float]) -> None:
    """Print the figures."""
    console.print(
        f"{load.num_requests} requests, {load.concurrency} at once, {load.prompt_tokens} tokens in, "
        f"{load.max_tokens} out: [bold]{result['tokens_per_s']:.0f}[/] tokens/s, "
        f"{result['requests_per_s']:.2f} requests/s, {result['wall_s']:.1f} s"
    )
    table = Table("milliseconds", "p50", "p90", "p99", "mean")
    for name, title in (("ttft", "to the first token"), ("itl", "between tokens")):
        table.add_row(title, *(f"{result[f'{name}_{key}_ms']:.1f}" for key in ("p50", "p90", "p99", "mean")))
    console.print(table)
