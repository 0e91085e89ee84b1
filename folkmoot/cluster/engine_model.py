"""vLLM's AsyncLLM as an engine process wants it: what the process is told, and the arguments that come of it."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from folkmoot.gateway import tracing

if TYPE_CHECKING:
    from folkmoot.gateway.queue import Room

BATCH_SHARE = 3
"""quarters of an engine's slots and KV cache that batch requests may hold beside interactive ones"""
NGRAM = {"method": "ngram", "prompt_lookup_max": 4, "prompt_lookup_min": 2}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "tekken.json", "vocab.json")


@dataclass(frozen=True)
class EngineSpec:
    """What an engine process is told at its start. Unknown keys are an error. `feed` None: a dense model."""

    engine: str
    model_path: str
    model: str
    architecture: str
    redis: str = field(repr=False)
    store_namespace: str
    feed: str | None
    secret_file: str
    dtype: str
    device: str
    max_model_len: int | None
    max_num_seqs: int
    max_batch_seqs: int | None
    batch_rows: int
    batch_prompt_tokens: int
    batch_invariant: bool | None
    prefix_caching: bool
    compiled: bool
    speculative_tokens: int
    prefill_chunk: int | None
    micro_batch_from: int | None
    seed: int
    kv_cache_gib: float
    transport: str
    combine: str
    background_workers: bool
    hedge_s: float
    stall_s: float
    no_replica_timeout_s: float
    grace_s: float
    metrics_dir: str | None
    """where the node's endpoint hears of this process (folkmoot.gateway.metrics_server); None: no metrics"""


def load(spec: EngineSpec) -> Any:
    """vLLM's AsyncLLM for the spec: one core process, forked from here, with its executor inside."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    from folkmoot.cluster import replay
    from folkmoot.experts import vllm_api
    from folkmoot.experts.vllm_api.runtime import register_eagerly

    register_eagerly(spec.architecture)
    on_cpu = spec.device == "cpu"
    arguments = AsyncEngineArgs(
        model=spec.model_path,
        served_model_name=spec.model,
        dtype=spec.dtype,
        seed=spec.seed,
        max_model_len=spec.max_model_len,
        max_num_seqs=spec.max_num_seqs,
        enforce_eager=on_cpu and not spec.compiled,
        skip_tokenizer_init=not has_tokenizer(spec),
        kv_cache_memory_bytes=int(spec.kv_cache_gib * 2**30) if on_cpu else None,
        # The processor is for vLLM's first model runner, which is the only one on a CPU.
        logits_processors=[replay.PROCESSOR] if can_replay(spec) else None,
        language_model_only=True,  # the gateway takes no images: a multimodal model needs no memory for them
        enable_prefix_caching=None if spec.prefix_caching else False,
        disable_log_stats=spec.metrics_dir is None,
        **_step_arguments(spec),
        **(vllm_api.engine_arguments(spec.device) if spec.feed is not None else {}),
    )
    config = arguments.create_engine_config(UsageContext.ENGINE_CONTEXT)
    vllm_api.use_two_lanes(config, vllm_api.Lanes(spec.batch_rows, spec.batch_prompt_tokens))
    if on_cpu:
        vllm_api.allow_chunks()
        if spec.micro_batch_from is not None:
            vllm_api.use_micro_batches(spec.micro_batch_from)
        # vLLM's CPU platform asks for "spawn", which would import everything once more.
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
    # Its spans say how long things took, too.
    is_counted = spec.metrics_dir is not None or tracing.is_wanted()
    return AsyncLLM.from_vllm_config(config, disable_log_stats=not is_counted)


def _step_arguments(spec: EngineSpec) -> dict[str, Any]:
    """What one step of the engine does: prompts in chunks or whole, guesses ahead or none."""
    arguments: dict[str, Any] = {}
    if spec.prefill_chunk is not None:
        arguments |= {
            "enable_chunked_prefill": True,
            "long_prefill_token_threshold": spec.prefill_chunk,
            "max_num_batched_tokens": max(spec.prefill_chunk, spec.max_num_seqs * (1 + spec.speculative_tokens)),
        }
    elif spec.device == "cpu":
        arguments["enable_chunked_prefill"] = False
    if spec.speculative_tokens:
        arguments["speculative_config"] = {**NGRAM, "num_speculative_tokens": spec.speculative_tokens}
    return arguments


def can_replay(spec: EngineSpec) -> bool:
    """vLLM takes no logits processors of ours on a GPU's newer runner, nor beside guesses ahead."""
    return spec.device == "cpu" and not spec.speculative_tokens


def batch_rooms(spec: EngineSpec, llm: Any) -> "tuple[Room, Room]":
    """What batch requests may hold beside interactive ones, so that those find slots and memory without preempting; and
    where there have been none for a while."""
    from folkmoot.gateway.queue import Room

    cache = llm.vllm_config.cache_config
    requests, tokens = spec.max_num_seqs, cache.num_gpu_blocks * cache.block_size
    share = max(1, requests * BATCH_SHARE // 4)
    beside = Room(spec.max_batch_seqs or share, tokens * BATCH_SHARE // 4)
    return beside, Room(spec.max_batch_seqs or requests, tokens)


def has_tokenizer(spec: EngineSpec) -> bool:
    """Whether the checkpoint comes with one."""
    return any((Path(spec.model_path) / name).exists() for name in TOKENIZER_FILES)
