"""What a checkpoint's experts can be had in is known from its config.json, and said with the option's name."""

import json
from pathlib import Path
from typing import Any

import pytest

from folkmoot.experts.expert_dtype import all_bytes, check, held

COMPRESSED = {
    "quant_method": "compressed-tensors",
    "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int"}}},
}


def checkpoint(folder: Path, **config: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({"hidden_act": "silu", **config}))
    return folder


@pytest.mark.parametrize(
    ("found", "name"),
    [
        (None, None),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "gptq", "bits": 4}, "int4"),
        ({"quant_method": "awq", "bits": 4}, "int4"),
        (COMPRESSED, "int4"),
        ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
    ],
)
def test_what_a_checkpoint_is_quantised_to(found: dict[str, Any] | None, name: str | None) -> None:
    assert held({"quantization_config": found} if found else {}) == name
    assert held({"text_config": {"quantization_config": found}} if found else {"text_config": {}}) == name


@pytest.mark.parametrize("name", ["checkpoint", "bf16", "int8", "int4", "auto:0.3", "auto:1", "auto:8GiB"])
def test_a_cpu_makes_these(tmp_path: Path, name: str) -> None:
    check(checkpoint(tmp_path), name, amx=False)


@pytest.mark.parametrize("name", ["checkpoint", "bf16", "int8", "fp8", "mxfp4"])
def test_a_gpu_makes_these(tmp_path: Path, name: str) -> None:
    check(checkpoint(tmp_path), name, device="cuda", amx=False)


@pytest.mark.parametrize(
    ("config", "options", "wrong"),
    [
        ({}, {"expert_dtype": "int2"}, "--expert-dtype int2: one of checkpoint, bf16, fp8, int8, int4, mxfp4, auto:B"),
        ({}, {"expert_dtype": "auto"}, "--expert-dtype auto: auto needs a budget"),
        ({}, {"expert_dtype": "auto:8GB"}, "--expert-dtype auto:8GB: auto needs a budget"),
        ({}, {"expert_dtype": "auto:1.5"}, "--expert-dtype auto:1.5: a part of bf16's memory is at most 1"),
        ({}, {"expert_dtype": "auto:0.2"}, "--expert-dtype auto:0.2: int4, the least, takes more than 0.28"),
        ({}, {"expert_dtype": "auto:0.4", "device": "cuda"}, "a budget decides on a CPU only"),
        ({"hidden_act": "gelu"}, {"expert_dtype": "auto:0.4"}, "the activation gelu"),
        ({"quantization_config": COMPRESSED}, {"expert_dtype": "auto:0.4"}, "quantised already, to int4"),
        ({}, {"expert_dtype": "mxfp4"}, "--expert-dtype mxfp4: .* a CPU makes int8 and int4; .* without AMX"),
        ({}, {"expert_dtype": "fp8"}, "--expert-dtype fp8: .* a CPU makes int8 and int4"),
        ({}, {"expert_dtype": "int4", "device": "cuda"}, "needs a checkpoint that comes so"),
        ({}, {"expert_dtype": "bf16", "dtype": "float32"}, "--dtype float32"),
        ({"hidden_act": "gelu"}, {"expert_dtype": "int8"}, "the activation gelu"),
        ({"text_config": {"hidden_act": "relu2"}}, {"expert_dtype": "int8"}, "the activation relu2"),
        ({"quantization_config": COMPRESSED}, {"expert_dtype": "int8"}, "quantised already, to int4"),
        ({"quantization_config": COMPRESSED}, {"expert_dtype": "bf16"}, "quantised already, to int4"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, {"expert_dtype": "checkpoint"}, "mxfp4, .* without AMX"),
        ({"quantization_config": COMPRESSED}, {"expert_dtype": "int4"}, "int4, .* without AMX"),
    ],
)
def test_what_cannot_be_is_said(tmp_path: Path, config: dict[str, Any], options: dict[str, str], wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        check(checkpoint(tmp_path, **config), **options, amx=False)  # type: ignore[arg-type]


def test_other_machines_may_have_amx(tmp_path: Path) -> None:
    found = checkpoint(tmp_path, quantization_config={"quant_method": "mxfp4"})
    for amx in (True, None):
        check(found, "mxfp4", amx=amx)
        check(found, "checkpoint", amx=amx)


def test_what_experts_take_in_memory() -> None:
    assert all_bytes(1000, "bfloat16", "checkpoint") == 1000
    assert all_bytes(1600, "bfloat16", "int8") == 850
    assert all_bytes(3200, "float32", "int4") == 475
    assert all_bytes(2000, "float32", "auto:0.4") == all_bytes(1000, "bfloat16", "auto:0.4") == 400
    assert all_bytes(4 << 20, "bfloat16", "auto:2MiB") == 2 << 20
    assert all_bytes(4 << 20, "bfloat16", "auto:8MiB") == 4 << 20
    with pytest.raises(ValueError, match=r"auto:1MiB: 1.0 MiB are less than the experts take in int4, 1.1 MiB"):
        all_bytes(4 << 20, "bfloat16", "auto:1MiB")
