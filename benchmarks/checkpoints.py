"""Random checkpoints to test and to measure with: real configurations, real tensor names, no hub, seconds to write.

`tiny` writes one small model of any architecture that Folkmoot is tested on. Its experts all differ, and its weights
are scaled so that every layer changes the residual stream by about its own size and logits have a standard deviation
of a few units: a row that reaches the wrong expert changes the answer. `measure_sized` writes the 1.5 GiB mixture of
experts that throughput is measured with.

    python -m benchmarks.checkpoints mixtral /tmp/tiny-mixtral
"""

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast

VOCABULARY = 512
MXFP4_BLOCK = 32  # weights that share one power-of-two scale in the OCP microscaling formats

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL_TOKENS = ("<|start|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
CORPUS = (
    "A folkmoot was a meeting of the people of a town or a shire, who heard a question and gave an answer together.",
    "Each expert knows one thing well. The gate asks a few of them, and their answers are weighed and added.",
    "When one of them does not come back, the question goes to another who knows the same thing.",
    "What is the capital of France? How many legs has a spider? Write a short poem about rain on a tin roof.",
    "def add(left: int, right: int) -> int:\n    return left + right\n",
    "0 1 2 3 4 5 6 7 8 9 10 100 1000; one, two, three, four, five, six, seven, eight, nine, ten.",
)


@dataclass(frozen=True)
class Sizes:
    """The dimensions of a checkpoint; what an architecture has no use for is ignored."""

    num_layers: int = 4
    num_experts: int = 8
    top_k: int = 2
    hidden_size: int = 128
    intermediate_size: int = 128
    vocab_size: int = VOCABULARY

    def common(self) -> dict[str, Any]:
        """What every configuration class spells the same way."""
        return {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.hidden_size // 32,
            "num_key_value_heads": max(1, self.hidden_size // 64),
            "max_position_embeddings": 2048,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "tie_word_embeddings": False,
        }


def _transformers() -> Any:
    """Imported only where something is made, since that takes 6 s."""
    import transformers

    return transformers


def _mixtral(s: Sizes) -> "PreTrainedConfig":
    return _transformers().MixtralConfig(
        **s.common(), num_local_experts=s.num_experts, num_experts_per_tok=s.top_k, sliding_window=None
    )


def _qwen3_moe(s: Sizes) -> "PreTrainedConfig":
    return _transformers().Qwen3MoeConfig(
        **s.common(),
        head_dim=32,
        moe_intermediate_size=s.intermediate_size,
        num_experts=s.num_experts,
        num_experts_per_tok=s.top_k,
        norm_topk_prob=True,
    )


def _deepseek_v3(s: Sizes) -> "PreTrainedConfig":
    # The head sizes are those of the real model, since vLLM's latent attention kernels take only them.
    config = _transformers().DeepseekV3Config(
        **{**s.common(), "num_attention_heads": 2, "num_key_value_heads": 2},
        moe_intermediate_size=s.intermediate_size,
        n_routed_experts=s.num_experts,
        num_experts_per_tok=s.top_k,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=2,
        topk_group=1,
        q_lora_rank=64,
        kv_lora_rank=512,
        qk_rope_head_dim=64,
        qk_nope_head_dim=128,
        v_head_dim=128,
        num_nextn_predict_layers=0,
    )
    config.topk_method = "noaux_tc"
    config.scoring_func = "sigmoid"
    return config


def _gpt_oss(s: Sizes) -> "PreTrainedConfig":
    return _transformers().GptOssConfig(
        **s.common(),
        head_dim=32,
        num_local_experts=s.num_experts,
        num_experts_per_tok=s.top_k,
        rope_parameters={
            **{"rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0},
            **{"truncate": False, "original_max_position_embeddings": 64},
        },
        sliding_window=128,
        layer_types=["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(s.num_layers)],
    )


def _llama4(s: Sizes, every: int = 1) -> "PreTrainedConfig":
    return _transformers().Llama4TextConfig(
        **s.common(),
        head_dim=32,
        intermediate_size_mlp=2 * s.intermediate_size,
        num_local_experts=s.num_experts,
        num_experts_per_tok=1,
        interleave_moe_layer_step=every,
        attention_chunk_size=512,
    )


def _llama(s: Sizes) -> "PreTrainedConfig":
    return _transformers().LlamaConfig(**s.common())


ARCHITECTURES: dict[str, Callable[[Sizes], "PreTrainedConfig"]] = {
    "llama4": _llama4,
    "llama4_interleaved": lambda s: _llama4(s, every=2),
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
    "deepseek_v3": _deepseek_v3,
    "gpt_oss": _gpt_oss,
    "gpt_oss_mxfp4": _gpt_oss,
    "llama": _llama,
}


def tiny(architecture: str, path: Path, *, dtype: str = "bfloat16", seed: int = 0, **sizes: int) -> Path:
    """Write a random checkpoint of `architecture` (a key of ARCHITECTURES) to the folder `path`, which it returns.

    `sizes` are the fields of Sizes. The weights follow from `seed` alone. `gpt_oss_mxfp4` is quantised here, and is
    always bfloat16 beside its experts. `qwen3_moe` is written in several shards with an index.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {architecture!r}: one of {', '.join(ARCHITECTURES)}")
    shape = Sizes(**sizes)
    config = ARCHITECTURES[architecture](shape)
    shard_size = "200KB" if architecture == "qwen3_moe" else "5GB"
    _write(config, path, dtype=dtype, seed=seed, shard_size=shard_size)
    if architecture == "gpt_oss_mxfp4":
        _quantise_experts(path)
    return path


def multimodal(text: Path, path: Path) -> Path:
    """Write a Llama 4 checkpoint of text as the published ones are, with eyes: the language model's tensors and
    configuration are a part of the whole. The eyes are too few to see."""
    path.mkdir(parents=True, exist_ok=True)
    tensors = {f"language_model.{name}": tensor for name, tensor in load_file(text / "model.safetensors").items()}
    eyes = {"vision_model.class_embedding": (64,), "multi_modal_projector.linear_1.weight": (128, 64)}
    save_file(tensors | {name: torch.ones(shape) for name, shape in eyes.items()}, path / "model.safetensors")
    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = _transformers().Llama4Config(
        text_config=json.loads((text / "config.json").read_text()), vision_config=vision
    )
    config.architectures = ["Llama4ForConditionalGeneration"]
    config.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def measure_sized(path: Path, *, seed: int = 0) -> Path:
    """Write the model that throughput is measured with: 1.5 GiB of experts (8 layers of 32, top-2), bfloat16."""
    shape = Sizes(num_layers=8, num_experts=32, hidden_size=1024, intermediate_size=1024, vocab_size=VOCABULARY)
    config = _mixtral(shape)
    _write(config, path, dtype="bfloat16", seed=seed, shard_size="400MB")
    return path


def tokenizer(vocab_size: int = VOCABULARY) -> "PreTrainedTokenizerFast":
    """A real byte-level tokenizer of at most `vocab_size` tokens, trained here, that can spell any text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(CORPUS, trainer)
    fast = _transformers().PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=SPECIAL_TOKENS[0], eos_token=SPECIAL_TOKENS[1]
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _write(config: "PreTrainedConfig", path: Path, *, dtype: str, seed: int, shard_size: str) -> None:
    path.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = _transformers().AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    state = model.state_dict()
    for name in sorted(state):
        _fill(name, state[name], config, generator)
    model.save_pretrained(path, max_shard_size=shard_size)
    tokenizer(config.vocab_size).save_pretrained(path)


def _fill(name: str, tensor: torch.Tensor, config: "PreTrainedConfig", generator: torch.Generator) -> None:
    """Random values for one tensor, by its kind: about unit gain for matrices, near one for norms, small for biases."""
    if not tensor.is_floating_point():
        return
    values = torch.empty(tensor.shape, dtype=torch.float32).normal_(generator=generator)
    if "norm" in name:
        values = 1.0 + 0.1 * values
    elif tensor.ndim < 2 or name.endswith("bias"):
        values = 0.1 * values
    elif "embed_tokens" not in name:
        values *= _gain(name) / math.sqrt(_fan_in(tensor, config))
    tensor.copy_(values.to(tensor.dtype))


def _gain(name: str) -> float:
    if "lm_head" in name or "gate.weight" in name or "router" in name:
        return 3.0  # spread logits: next to no ties among tokens, clear choices among experts
    return 1.5 if "down" in name or "experts" in name else 1.0


def _fan_in(tensor: torch.Tensor, config: "PreTrainedConfig") -> int:
    """Inputs of one output. Matrices are [out, in]; Llama 4 and gpt-oss stack their experts as [expert, in, out]."""
    in_first = tensor.ndim == 3 and config.model_type in ("llama4_text", "gpt_oss")
    return tensor.shape[-2] if in_first else tensor.shape[-1]


def _quantise_experts(path: Path) -> None:
    """Turn the experts of a gpt-oss checkpoint into MXFP4, in the layout of the published gpt-oss checkpoints.

    The tensor `X` [expert, in, out] becomes `X_blocks` uint8 [expert, out, in / 32, 16], two 4-bit floats a byte with
    the first in the low half, and `X_scales` uint8 [expert, out, in / 32], exponents with a bias of 127.
    """
    file = path / "model.safetensors"
    tensors = load_file(file)
    for name in [n for n in tensors if n.endswith((".experts.gate_up_proj", ".experts.down_proj"))]:
        blocks, scales = mxfp4_quantise(tensors.pop(name).float().transpose(1, 2).contiguous())
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks, scales
    save_file(tensors, file, metadata={"format": "pt"})
    config_file = path / "config.json"
    config = json.loads(config_file.read_text())
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
    }
    config_file.write_text(json.dumps(config, indent=2) + "\n")


def mxfp4_quantise(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round float32 [..., n] to MXFP4 (OCP Microscaling Formats 1.0): uint8 [..., n / 32, 16] and [..., n / 32].

    n must be a multiple of 32. The scale of a block is the largest power of two that keeps its largest value within
    reach of the element format (E2M1, whose largest value is 6).
    """
    blocks = values.reshape(*values.shape[:-1], -1, MXFP4_BLOCK)
    largest = blocks.abs().amax(dim=-1).clamp_min(2.0**-100)
    exponents = torch.floor(torch.log2(largest)) - 2.0
    scaled = blocks / torch.exp2(exponents).unsqueeze(-1)
    magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    codes = (scaled.abs().unsqueeze(-1) - magnitudes).abs().argmin(dim=-1)
    codes = (codes + 8 * (scaled < 0)).to(torch.uint8)
    packed = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return packed.contiguous(), (exponents + 127).to(torch.uint8).contiguous()


def main() -> None:
    p = argparse.ArgumentParser(description="Write a random checkpoint.")
    p.add_argument("architecture", choices=[*ARCHITECTURES, "measure"])
    p.add_argument("path", type=Path)
    p.add_argument("--dtype", default="bfloat16")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    if args.architecture == "measure":
        measure_sized(args.path, seed=args.seed)
    else:
        tiny(args.architecture, args.path, dtype=args.dtype, seed=args.seed)
    print(args.path)


if __name__ == "__main__":
    main()
