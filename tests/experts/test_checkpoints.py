"""The random checkpoints are real ones: transformers reads them whole, their experts differ, their tokenizer works."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import checkpoints
from folkmoot.experts import vllm_api

pytestmark = pytest.mark.filterwarnings("default")  # transformers warns about what it likes

MOE_LAYERS = {
    "llama4": (0, 1, 2, 3),
    "llama4_interleaved": (1, 3),
    "mixtral": (0, 1, 2, 3),
    "qwen3_moe": (0, 1, 2, 3),
    "deepseek_v3": (1, 2, 3),
    "gpt_oss": (0, 1, 2, 3),
    "gpt_oss_mxfp4": (0, 1, 2, 3),
    "llama": (),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {name: checkpoints.tiny(name, root / name) for name in checkpoints.ARCHITECTURES}


@pytest.mark.parametrize("architecture", MOE_LAYERS)
def test_describe_finds_the_moe_layers_and_their_experts(folders: dict[str, Path], architecture: str) -> None:
    shape = vllm_api.describe(folders[architecture])
    assert shape.moe_layers == MOE_LAYERS[architecture]
    assert (shape.num_layers, shape.hidden_size, shape.dtype) == (4, 128, "bfloat16")
    if architecture == "llama":
        assert (shape.num_experts, shape.top_k, shape.expert_bytes) == (0, 0, 0)
        return
    assert shape.num_experts == 8
    assert shape.top_k == (1 if architecture.startswith("llama4") else 2)
    weights = 3 * 128 * 128
    biases = 2 * 3 * 128 if architecture.startswith("gpt_oss") else 0
    matrices = weights // 2 + weights // 32 if architecture == "gpt_oss_mxfp4" else 2 * weights
    assert shape.expert_bytes == matrices + biases


@pytest.mark.parametrize("architecture", [a for a in MOE_LAYERS if a != "gpt_oss_mxfp4"])
def test_transformers_reads_every_tensor_and_logits_are_spread(folders: dict[str, Path], architecture: str) -> None:
    model, report = AutoModelForCausalLM.from_pretrained(
        folders[architecture], dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    ids = torch.arange(10, 30).unsqueeze(0)
    with torch.no_grad():
        logits = model(ids).logits
    assert logits.isfinite().all()
    assert 1.0 < logits.std() < 10.0


@pytest.mark.parametrize("architecture", [a for a, layers in MOE_LAYERS.items() if layers])
def test_all_experts_of_all_layers_differ(folders: dict[str, Path], architecture: str) -> None:
    seen: set[bytes] = set()
    layers = vllm_api.checkpoint.expert_tensors(folders[architecture])
    for tensors in layers.values():
        for expert in range(8):
            rows = dict(vllm_api.checkpoint.read_experts(tensors, [expert]))
            seen.add(b"".join(rows[name].contiguous().view(torch.uint8).numpy().tobytes() for name in sorted(rows)))
    assert len(seen) == 8 * len(MOE_LAYERS[architecture])


def test_a_seed_fixes_every_weight(folders: dict[str, Path], tmp_path: Path) -> None:
    again = load_file(checkpoints.tiny("mixtral", tmp_path / "again") / "model.safetensors")
    other = load_file(checkpoints.tiny("mixtral", tmp_path / "other", seed=1) / "model.safetensors")
    first = load_file(folders["mixtral"] / "model.safetensors")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_a_sharded_checkpoint_is_read_across_its_files(folders: dict[str, Path]) -> None:
    index = json.loads((folders["qwen3_moe"] / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 4
    tensors = vllm_api.checkpoint.expert_tensors(folders["qwen3_moe"])[2]
    names = [name for name, _ in vllm_api.checkpoint.read_experts(tensors, [6, 1])]
    prefix = "model.layers.2.mlp.experts"
    projections = ("gate_proj", "up_proj", "down_proj")
    assert sorted(names) == sorted(f"{prefix}.{slot}.{p}.weight" for slot in (0, 1) for p in projections)


def test_fused_tensors_are_indexed_in_the_order_asked_for(folders: dict[str, Path]) -> None:
    tensors = vllm_api.checkpoint.expert_tensors(folders["llama4"])[0]
    whole = load_file(folders["llama4"] / "model.safetensors")
    for experts in ([5, 2, 7], [3, 4, 5]):
        for name, rows in vllm_api.checkpoint.read_experts(tensors, experts):
            assert torch.equal(rows, whole[name][experts])


def test_layers_with_different_numbers_of_experts_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    checkpoints.tiny("mixtral", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {n: t for n, t in tensors.items() if not n.startswith("model.layers.1.block_sparse_moe.experts.7.")}
    save_file(kept, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="different numbers of experts"):
        vllm_api.describe(tmp_path)


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 1, "hidden_size": 8}')
    with pytest.raises(FileNotFoundError, match="safetensors"):
        vllm_api.describe(tmp_path)


def test_the_tokenizer_spells_any_text_and_has_a_chat_template(folders: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders["mixtral"])
    text = "Ünïcode: 東京, 1 + 1 = 2\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer) <= checkpoints.VOCABULARY
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|user|>Hello<|end|><|assistant|>"


def test_mxfp4_rounds_to_the_nearest_value_of_the_format() -> None:
    values = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    blocks, scales = checkpoints.mxfp4_quantise(values)
    assert blocks.shape == (3, 2, 16) and scales.shape == (3, 2)
    magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2).long()
    unscaled = magnitudes[codes & 7] * (1 - 2 * (codes >> 3))
    step = torch.exp2(scales.float() - 127).unsqueeze(-1)
    errors = (unscaled * step - values.unflatten(-1, (-1, 32))).abs()
    # A block's largest value may lie up to 8 steps high and saturate at 6; elsewhere the grid is at most 2 wide.
    assert (errors <= 2 * step).all()
    assert (errors <= step).float().mean() > 0.95


def test_an_unknown_architecture_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="qwen3_moe"):
        checkpoints.tiny("gpt-2", tmp_path)
