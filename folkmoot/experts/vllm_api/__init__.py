"""Everything of vLLM's private API that Folkmoot touches, in one place, for one pinned version.

`describe` reads what a checkpoint is (no vLLM needed). `load_experts` builds the host side: any set of routed experts
as callable kernels. `install` arms the engine side: a vLLM whose routed experts are elsewhere. `preimport` is for a
parent that forks either. Each name is imported when it is first used, because importing vLLM takes many seconds.

    checkpoint.py  names and headers of a safetensors checkpoint; light
    invariance.py  settings that make answers independent of the batch; light
    imports.py     what a parent imports before it forks; light
    runtime.py     engine configuration, one-rank world
    loader.py      the model on the meta device, and any experts of it, read by vLLM's own loaders
    hosted.py      host side: vLLM's own kernels over a subset of experts
    quantised.py   host side: experts that are quantised while they are loaded, and our own kernels
    engine.py      engine side: routed experts that hold nothing and call a dispatcher
    chunks.py      prompts computed in chunks on a CPU
    micro.py       steps split in two halves that take turns
    lanes.py       a scheduler in which batch requests step back for interactive ones
    rounding.py    how vLLM's kernel rounds where it adds the rows of a token's experts
    traces.py      vLLM's own spans
    private.py     the list of private names relied on, and the check that names what a new version broke
"""

import importlib
from typing import TYPE_CHECKING, Any

from folkmoot.experts.vllm_api.checkpoint import ModelShape, describe

if TYPE_CHECKING:
    from folkmoot.experts.vllm_api.chunks import allow_chunks
    from folkmoot.experts.vllm_api.engine import Dispatch, engine_arguments, install
    from folkmoot.experts.vllm_api.hosted import HostedExperts, LayerKernel, load_experts
    from folkmoot.experts.vllm_api.imports import preimport
    from folkmoot.experts.vllm_api.invariance import batch_invariance
    from folkmoot.experts.vllm_api.lanes import Lanes, use_two_lanes
    from folkmoot.experts.vllm_api.micro import use_micro_batches
    from folkmoot.experts.vllm_api.private import VLLM_VERSION, broken_names
    from folkmoot.experts.vllm_api.quantised import measure_errors
    from folkmoot.experts.vllm_api.rounding import fuses_multiply_add
    from folkmoot.experts.vllm_api.traces import trace_requests

_HOME = {
    "allow_chunks": "chunks",
    "Dispatch": "engine",
    "engine_arguments": "engine",
    "install": "engine",
    "HostedExperts": "hosted",
    "LayerKernel": "hosted",
    "load_experts": "hosted",
    "batch_invariance": "invariance",
    "Lanes": "lanes",
    "use_two_lanes": "lanes",
    "VLLM_VERSION": "private",
    "broken_names": "private",
    "measure_errors": "quantised",
    "preimport": "imports",
    "fuses_multiply_add": "rounding",
    "trace_requests": "traces",
    "use_micro_batches": "micro",
}

__all__ = [
    "VLLM_VERSION",
    "Dispatch",
    "HostedExperts",
    "Lanes",
    "LayerKernel",
    "ModelShape",
    "allow_chunks",
    "batch_invariance",
    "broken_names",
    "describe",
    "engine_arguments",
    "fuses_multiply_add",
    "install",
    "load_experts",
    "measure_errors",
    "preimport",
    "trace_requests",
    "use_micro_batches",
    "use_two_lanes",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
