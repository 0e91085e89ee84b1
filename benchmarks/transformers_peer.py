"""transformers as a peer: its own `generate`, static and with continuous batching, in a process of its own.

It answers over its control channel as the engines of `benchmarks.engines` do.
"""

import os
import time
import traceback
from pathlib import Path
from typing import Any

from benchmarks.engines import Bench, Engine
from folkmoot.experts.warm import Control

CACHE_PAGES = 128
"""of 256 tokens each: one for every prompt and its answer, and as many again"""
STATIC, CONTINUOUS = "static", "continuous"
FORMS = ((STATIC, "eager"), (STATIC, "grouped_mm"), (CONTINUOUS, "grouped_mm"))
"""With transformers' own implementations of a layer of experts. (A third, batched_mm, copies each row's experts: it
came to an eighth of these at batch 8; eager with continuous batching was slower than grouped_mm at each batch size.)"""


def start(bench: Bench, checkpoint: Path) -> Engine:
    """Start it, with torch's own settings of OpenMP; call `wait` on it."""
    spec = {"checkpoint": str(checkpoint)}
    return bench.adopt(bench.parent({}).spawn("benchmarks.transformers_peer:main", spec, bench.directory / "peer.log"))


def main(spec: dict[str, Any], control: Control) -> None:
    """Entry point of the process. Loads in bf16, says {"load_s"}, then answers until its owner is gone."""
    import torch
    from transformers import AutoModelForCausalLM

    began = time.monotonic()
    torch.set_num_threads(os.cpu_count() or 1)
    model = AutoModelForCausalLM.from_pretrained(spec["checkpoint"], dtype=torch.bfloat16).eval()
    control.send({"load_s": time.monotonic() - began})
    while (request := control.receive()) is not None:
        try:
            control.send(_generate(model, **request))
        except Exception:
            control.send({"event": "error", "message": traceback.format_exc()})


def generate(peer: Engine, prompts: list[list[int]], max_tokens: int, form: str, experts: str) -> dict[str, Any]:
    """Greedy answers of exactly `max_tokens` tokens to prompts of equal length: {"seconds", "tokens"}."""
    peer.child.send({"prompts": prompts, "max_tokens": max_tokens, "form": form, "experts": experts})
    return peer.finish()


def _generate(model: Any, prompts: list[list[int]], max_tokens: int, form: str, experts: str) -> dict[str, Any]:
    import torch
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model.set_experts_implementation(experts)
    config = GenerationConfig(max_new_tokens=max_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    if form == CONTINUOUS:
        # Left to itself its cache takes nearly all memory that is free.
        paged = ContinuousBatchingConfig(num_blocks=CACHE_PAGES, max_batch_tokens=8192)
        found = model.generate_batch(prompts, generation_config=config, continuous_batching_config=paged, warmup=False)
        answers = [found[name] for name in sorted(found, key=_number)]
        # By its own clock, which leaves out that it sets itself up anew for each call.
        spans = [answer.lifespan for answer in answers]
        seconds = max(end for _, end in spans) - min(begin for begin, _ in spans)
        return {"seconds": seconds, "tokens": [list(answer.generated_tokens) for answer in answers]}
    began = time.monotonic()
    ids = torch.tensor(prompts)
    made = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return {"seconds": time.monotonic() - began, "tokens": made[:, ids.shape[1] :].tolist()}


def _number(name: str) -> int:
    """Requests are called req_0, req_1, ..."""
    return int(name.rpartition("_")[2])
