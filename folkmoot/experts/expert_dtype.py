"""The dtypes that experts can be had in, and which of them a checkpoint, a device and a processor allow.

Light: reads config.json and what the kernel says of the processor, so that what cannot be is said before anything is
started.
"""

import json
import math
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from folkmoot.experts import expert_choice

CHECKPOINT = "checkpoint"
"""As the checkpoint has them, in the model's dtype where it has them unquantised."""
NAMES = (CHECKPOINT, "bf16", "fp8", "int8", "int4", "mxfp4")
ON_CPU = ("int8", "int4")
"""Made while loading, on a CPU (quantised.py)."""
ON_CUDA: Mapping[str, str] = {"int8": "int8_per_channel_weight_only", "fp8": "fp8_per_channel", "mxfp4": "mxfp4"}
"""Made while loading, on a GPU, by vLLM's online quantisation of this name."""
ACTIVATIONS = ("silu", "swish")
"""As config.json names what quantised.c can do; gpt-oss's own says silu too."""


def check(
    checkpoint: Path, expert_dtype: str, *, dtype: str = "auto", device: str = "cpu", amx: bool | None = None
) -> None:
    """ValueError where the checkpoint's experts cannot be had in `expert_dtype` on such a device.

    `amx` says whether the processors that run experts have AMX; None: that is not known, or they are not x86.
    """
    budget = check_name(expert_dtype)
    config = json.loads((checkpoint / "config.json").read_text())
    has = held(config)
    if expert_dtype in (CHECKPOINT, has):
        if has in NAMES and device == "cpu" and amx is False:
            raise ValueError(f"the experts are {has}, for which vLLM has no kernel on a processor without AMX")
        return
    if has is not None:
        raise ValueError(f"--expert-dtype {expert_dtype}: the checkpoint's experts are quantised already, to {has}")
    if expert_dtype == "bf16":
        if dtype not in ("auto", "bfloat16"):
            raise ValueError(f"--expert-dtype bf16: unquantised experts have the model's dtype, here --dtype {dtype}")
    elif device == "cpu":
        _check_cpu(expert_dtype, config)
    elif budget is not None:
        raise ValueError(f"--expert-dtype {expert_dtype}: a budget decides on a CPU only")
    elif expert_dtype not in ON_CUDA:
        raise ValueError(
            f"--expert-dtype {expert_dtype}: from unquantised experts a GPU makes {', '.join(ON_CUDA)}; "
            f"{expert_dtype} needs a checkpoint that comes so"
        )


def check_name(expert_dtype: str) -> expert_choice.Budget | None:
    """The budget, where it is one. ValueError for what is neither a dtype nor auto:BUDGET."""
    if (budget := expert_choice.parse(expert_dtype)) is None and expert_dtype not in NAMES:
        raise ValueError(f"--expert-dtype {expert_dtype}: one of {', '.join(NAMES)}, auto:BUDGET")
    return budget


def _check_cpu(expert_dtype: str, config: Mapping[str, Any]) -> None:
    if expert_dtype not in ON_CPU and expert_choice.parse(expert_dtype) is None:
        raise ValueError(
            f"--expert-dtype {expert_dtype}: from unquantised experts a CPU makes {' and '.join(ON_CPU)}; for others "
            "vLLM has no kernel on a processor without AMX, and with it only for checkpoints that come so"
        )
    text = {**config, **config.get("text_config", {})}
    if (activation := text.get("hidden_act") or "silu") not in ACTIVATIONS:
        raise ValueError(
            f"--expert-dtype {expert_dtype}: experts with the activation {activation} are not quantised here, "
            f"only {' and '.join(ACTIVATIONS)}"
        )


def held(config: Mapping[str, Any]) -> str | None:
    """What a checkpoint's experts are quantised to, by its config.json: a name of NAMES, or else its method's own; None
    where they are not quantised."""
    text = config.get("text_config", {})
    found = config.get("quantization_config") or text.get("quantization_config")
    if not found:
        return None
    method = str(found.get("quant_method", "unknown"))
    if method in ("gptq", "awq"):
        return f"int{found.get('bits', 4)}"
    if method == "compressed-tensors":
        weights = [group.get("weights") or {} for group in found.get("config_groups", {}).values()]
        letters = {"int": "int", "float": "fp"}
        return f"{letters.get(weights[0].get('type', ''), '')}{weights[0].get('num_bits', '')}" if weights else method
    return method


def all_bytes(checkpoint_bytes: int, dtype: str, expert_dtype: str) -> int:
    """About what experts take in memory that are so large in a checkpoint whose weights are of `dtype`: all of them,
    where a budget decides. ValueError where they do not fit in it."""
    if (budget := expert_choice.parse(expert_dtype)) is not None:
        bf16 = checkpoint_bytes // 2 if dtype == "float32" else checkpoint_bytes
        budget.check(math.ceil(expert_choice.LEAST * bf16), bf16)
        return min(bf16, budget.limit(bf16))
    most = {"int8": 8.5, "fp8": 8.5, "int4": 4.75, "mxfp4": 4.75}.get(expert_dtype)  # bits, with scales and padding
    return checkpoint_bytes if most is None else round(checkpoint_bytes * most / (32 if dtype == "float32" else 16))


def has_amx() -> bool | None:
    """Whether this machine's processor has AMX; None where it is not one that could."""
    if platform.machine() != "x86_64":
        return None
    return " amx_tile" in Path("/proc/cpuinfo").read_text()
