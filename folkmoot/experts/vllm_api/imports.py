"""What a parent imports before it forks engines and expert hosts. This module itself is light."""

import gc
import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

_HEAVY = (
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.executor.uniproc_executor",
    "vllm.entrypoints.llm",
    "vllm.model_executor.model_loader",
    "vllm.model_executor.layers.fused_moe.layer",
    "vllm.model_executor.layers.quantization.mxfp4",
    "vllm.model_executor.layers.quantization.online.base",
    "vllm.model_executor.models.mixtral",
    "vllm.tokenizers",
    "folkmoot.experts.vllm_api.hosted",
    "folkmoot.experts.vllm_api.quantised",
    "folkmoot.experts.vllm_api.engine",
)
_HEAVY_CPU = ("vllm.v1.worker.cpu_worker", "vllm.v1.attention.backends.cpu_attn")
_NOT_NEEDED = ("scipy", "ray")
"""vLLM and transformers import them where they are installed, 2 s of a core: for sound, losses, executors on Ray."""


def preimport(architectures: Sequence[str] = (), *, device: str = "cpu") -> None:
    """Import what an engine or an expert host needs, so that a forked child starts in about a second.

    Starts no thread and initialises neither OpenMP nor an accelerator. `architectures` are names as in config.json;
    their model classes are imported too, and vLLM's inspection of them, which else starts another interpreter, is done.
    """
    with _absent(*_NOT_NEEDED):
        for module in _HEAVY + (_HEAVY_CPU if device == "cpu" else ()):
            importlib.import_module(module)
        for architecture in architectures:
            importlib.import_module("folkmoot.experts.vllm_api.runtime").register_eagerly(architecture)
    gc.collect()
    gc.freeze()  # a child's collections then pass over what is imported: they would copy its pages, for over a second


@contextmanager
def _absent(*names: str) -> Iterator[None]:
    """Packages that cannot be imported while this is open, as if they were not installed; later they can."""
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None is Python's own mark for that
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
