"""What both sides need of a vLLM process: an engine configuration, a world of one rank."""

import importlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import (
    _groups,
    destroy_distributed_environment,
    destroy_model_parallel,
    init_distributed_environment,
    initialize_model_parallel,
    model_parallel_is_initialized,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.registry import _RegisteredModel

from folkmoot.experts.vllm_api import text_only


def register_eagerly(architecture: str) -> None:
    """Import the model class of `architecture`. Otherwise vLLM inspects it in a fresh interpreter (many seconds)."""
    architecture = text_only.class_of(architecture)
    if architecture not in ModelRegistry.models:
        raise ValueError(f"vLLM knows no model architecture {architecture!r}")
    entry = ModelRegistry.models[architecture]
    if not hasattr(entry, "model_cls"):
        ModelRegistry.models[architecture] = _RegisteredModel.from_model_cls(entry.load_model_cls())


def engine_config(checkpoint: Path, *, dtype: str, quantization: str | None = None) -> VllmConfig:
    """vLLM's configuration for the model in `checkpoint`, eager, without a tokenizer.

    `quantization` names one of vLLM's online quantisations; None: as the checkpoint says.
    """
    arguments = EngineArgs(
        model=str(checkpoint),
        dtype=dtype,
        quantization=quantization,
        hf_overrides=text_only.overrides,
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_num_seqs=1,
    )
    return arguments.create_engine_config()


@contextmanager
def world_of_one() -> Iterator[None]:
    """A distributed world of this process alone while open, unless there is one already (an engine's).

    Needs a current vLLM configuration. Building a model asks for a world, running experts does not; and an open one
    keeps 45 threads that wake up a hundred times a second.
    """
    if model_parallel_is_initialized():
        yield
        return
    with tempfile.TemporaryDirectory(prefix="folkmoot-world-") as folder:
        try:
            init_distributed_environment(1, 0, f"file://{folder}/meeting-point", 0, "gloo")
            initialize_model_parallel(1, 1)
            yield
        finally:
            destroy_model_parallel()
            destroy_distributed_environment()


def rest_groups_of_one() -> None:
    """Give vLLM's process groups in which this process is alone a backend without threads.

    Gloo's wake a hundred times a second for as long as a group is there. In a group of one vLLM's collectives return at
    once, but building a model asks the groups for rank and size, and leaving the world closes them: they must be real.
    """
    importlib.import_module("torch.testing._internal.distributed.fake_pg")  # registers the backend
    for reference in list(_groups.values()):
        group = reference()
        if group is None or group.world_size != 1:
            continue
        for name in ("device_group", "cpu_group"):
            busy = getattr(group, name)
            setattr(group, name, torch.distributed.new_group(group.ranks, backend="fake"))
            torch.distributed.destroy_process_group(busy)


def prepare_cpu() -> None:
    """Ask the kernel for the AMX registers where there are some: without it the first AMX kernel dies of SIGILL."""
    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()
