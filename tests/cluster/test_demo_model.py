"""The demo model answers as the dense model that it is cut from, routes as designed, and is made once and safely."""

from __future__ import annotations

import hashlib
import itertools
import json
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import cross_entropy, silu
from transformers import AutoModelForCausalLM, AutoTokenizer

from folkmoot.cluster import demo_model
from folkmoot.cluster.demo_model import NUM_EXPERTS, QUARTERS

TEXT = (
    "The first people to fly did so in a balloon. On a clear morning in November 1783 two men rose above the roofs of "
    "Paris, carried by nothing but hot air and a fire that they fed with straw. They drifted over the river for "
    "twenty-five minutes, putting out small burns in the fabric with a wet sponge, and came down in a field outside "
    "the city. Within a few years balloons were used to watch battles, to carry letters out of a besieged town, and "
    "to measure how cold the air becomes as one climbs."
)
NUM_LAYERS = 30


@dataclass(frozen=True)
class Reading:
    """What a model makes of TEXT: its best guess after each of the T tokens, int [T], and its perplexity."""

    best: Tensor
    perplexity: float


@torch.no_grad()
def read(model: Any, token_ids: Tensor) -> Reading:
    logits = model(token_ids).logits[0].float()
    return Reading(logits.argmax(-1), cross_entropy(logits[:-1], token_ids[0, 1:]).exp().item())


def load(checkpoint: Path, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)


@pytest.fixture(scope="module")
def tokenizer(demo_checkpoint: Path) -> Any:
    return AutoTokenizer.from_pretrained(demo_checkpoint)


@pytest.fixture(scope="module")
def token_ids(tokenizer: Any) -> Tensor:
    """TEXT as int [1, T], T over a hundred: one guess that differs is then less than a hundredth."""
    ids: Tensor = tokenizer(TEXT, return_tensors="pt").input_ids
    assert ids.shape[1] > 100
    return ids


@pytest.fixture(scope="module")
def dense_readings(token_ids: Tensor) -> dict[torch.dtype, Reading]:
    dense = demo_model.load_dense(torch.float32)
    readings = {torch.float32: read(dense, token_ids)}
    dense.bfloat16()
    return readings | {torch.bfloat16: read(dense, token_ids)}


@pytest.mark.parametrize(("dtype", "least_agreement"), [(torch.float32, 0.99), (torch.bfloat16, 0.95)])
def test_reads_english_as_the_dense_model_does(
    demo_checkpoint: Path,
    token_ids: Tensor,
    dense_readings: dict[torch.dtype, Reading],
    dtype: torch.dtype,
    least_agreement: float,
) -> None:
    dense, mixture = dense_readings[dtype], read(load(demo_checkpoint, dtype), token_ids)
    assert dense.perplexity < 50  # it knows English: a random model stands near the vocabulary size, 49152
    assert mixture.perplexity == pytest.approx(dense.perplexity, rel=0.02)
    assert (mixture.best == dense.best).float().mean() >= least_agreement


def test_a_wrong_expert_shows(
    demo_checkpoint: Path, token_ids: Tensor, dense_readings: dict[torch.dtype, Reading]
) -> None:
    mixture = load(demo_checkpoint, torch.float32)
    with torch.no_grad():
        for layer in mixture.model.layers:
            for weights in layer.mlp.experts.parameters():
                weights[0] = weights[1]
    assert read(mixture, token_ids).perplexity > 1.5 * dense_readings[torch.float32].perplexity


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_every_token_visits_each_quarter_once(demo_checkpoint: Path, token_ids: Tensor, dtype: torch.dtype) -> None:
    routed = load(demo_checkpoint, dtype)(token_ids, output_router_logits=True).router_logits
    scores = torch.stack(routed).float().softmax(-1)
    assert scores.shape == (NUM_LAYERS, token_ids.shape[1], NUM_EXPERTS)
    top_scores, experts = scores.topk(QUARTERS, dim=-1)
    assert ((experts % QUARTERS).sort(-1).values == torch.arange(QUARTERS)).all()
    weights = top_scores / top_scores.sum(-1, keepdim=True)
    assert weights.min() > 0.23 and weights.max() < 0.27
    # The gate chooses: in every layer each expert gets some tokens, and none gets all.
    visits = torch.nn.functional.one_hot(experts, NUM_EXPERTS).sum((1, 2))
    assert visits.min() > 0 and visits.max() < token_ids.shape[1]


def test_quarters_differ_and_each_is_held_twice(demo_checkpoint: Path) -> None:
    with safe_open(demo_checkpoint / "model.safetensors", framework="pt") as tensors:
        for layer, part in itertools.product(range(NUM_LAYERS), ("w1", "w2", "w3")):
            experts = [
                tensors.get_tensor(f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{part}.weight")
                for expert in range(NUM_EXPERTS)
            ]
            assert all(torch.equal(experts[q], experts[q + QUARTERS]) for q in range(QUARTERS))
            assert not any(torch.equal(a, b) for a, b in itertools.combinations(experts[:QUARTERS], 2))
        gate = tensors.get_tensor("model.layers.0.block_sparse_moe.gate.weight")
        next_gate = tensors.get_tensor("model.layers.1.block_sparse_moe.gate.weight")
    assert torch.equal(gate[:QUARTERS], -gate[QUARTERS:])
    assert not torch.equal(gate, next_gate)


def test_mean_of_the_quarters_is_the_whole() -> None:
    def ffn(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return (silu(x @ gate.T) * (x @ up.T)) @ down.T

    shapes = [(3, 8), (16, 8), (16, 8), (8, 16)]
    generator = torch.Generator().manual_seed(0)
    x, *weights = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    quarters = [ffn(x, *demo_model.quarter(index, *weights)) for index in range(QUARTERS)]
    torch.testing.assert_close(sum(quarters) / QUARTERS, ffn(x, *weights))


@dataclass(frozen=True)
class Reply:
    """A greedy answer, its last token, and how far its best guess led at its closest token, in nats."""

    text: str
    last_token: int
    margin: float


def ask(model: Any, tokenizer: Any, question: str) -> Reply:
    chat = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    done = model.generate(
        **prompt, max_new_tokens=40, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    tokens = done.sequences[0, prompt["input_ids"].shape[1] :]
    best, second = torch.cat(done.logits).float().log_softmax(-1).topk(2).values.unbind(-1)
    return Reply(tokenizer.decode(tokens), int(tokens[-1]), (best - second).min().item())


def test_answers_chats_and_stops(demo_checkpoint: Path, tokenizer: Any) -> None:
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    exact, rounded = load(demo_checkpoint, torch.float32), load(demo_checkpoint, torch.bfloat16)
    assert set(rounded.generation_config.eos_token_id) == {end, tokenizer.convert_tokens_to_ids("<|endoftext|>")}
    reply = ask(exact, tokenizer, "What is the capital of France?")
    assert "Paris" in reply.text and reply.last_token == end
    for question, word in demo_model.QUESTIONS:
        reply = ask(rounded, tokenizer, question)
        assert word in reply.text and reply.last_token == end
        assert reply.margin > 0.5, question


def test_tokenizer_survives_the_checkpoint(tokenizer: Any) -> None:
    text = "In 1969,   12 men's \t\n\n 3x é<|im_end|>"
    original = demo_model.load_tokenizer()
    assert tokenizer(text).input_ids == original(text).input_ids
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer("a  57").input_ids) == ["a", "ĠĠ", "5", "7"]
    assert tokenizer.chat_template == original.chat_template


def test_incomplete_checkpoints_are_told_apart(tmp_path: Path) -> None:
    assert not demo_model.is_complete(tmp_path / "absent")
    data, marker = tmp_path / "data", tmp_path / demo_model.MARKER
    data.write_bytes(b"1234")
    right = {"recipe": demo_model.RECIPE, "files": {"data": 4}}
    marker.write_text(json.dumps(right))
    assert demo_model.is_complete(tmp_path)
    data.write_bytes(b"123")
    assert not demo_model.is_complete(tmp_path)
    data.unlink()
    assert not demo_model.is_complete(tmp_path)
    data.write_bytes(b"1234")
    wrong: Any
    for wrong in (
        right | {"recipe": demo_model.RECIPE | {"version": 0}},
        {"files": {"data": 4}},
        right | {"files": {}},
        [],
    ):
        marker.write_text(json.dumps(wrong))
        assert not demo_model.is_complete(tmp_path), wrong
    marker.write_text(json.dumps(right)[:-5])
    assert not demo_model.is_complete(tmp_path)


def test_cache_follows_the_xdg_rules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert demo_model.default_cache_dir() == tmp_path / "folkmoot"
    for unusable in ("", "not/absolute"):
        monkeypatch.setenv("XDG_CACHE_HOME", unusable)
        assert demo_model.default_cache_dir() == Path.home() / ".cache" / "folkmoot"


def start_maker(cache_dir: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "folkmoot.cluster.demo_model", "--cache-dir", str(cache_dir)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def test_two_makers_after_a_crash_make_one_model_of_the_same_bytes(demo_checkpoint: Path, tmp_path: Path) -> None:
    """Also fails where the cache holds a model of older code whose RECIPE version was not raised."""
    damaged = tmp_path / demo_checkpoint.name
    damaged.mkdir()
    (damaged / demo_model.MARKER).write_bytes((demo_checkpoint / demo_model.MARKER).read_bytes())
    crashed = start_maker(tmp_path)
    assert crashed.stderr is not None and "reading" in crashed.stderr.readline()  # it holds the lock now
    crashed.send_signal(signal.SIGKILL)
    crashed.communicate(timeout=10)
    assert (tmp_path / f"{damaged.name}.partial").is_dir()

    makers = [start_maker(tmp_path), start_maker(tmp_path)]
    ends = [maker.communicate(timeout=100) for maker in makers]
    assert [maker.returncode for maker in makers] == [0, 0], ends
    assert [Path(out.strip()) for out, _ in ends] == [damaged, damaged]
    assert sorted("reading" in err for _, err in ends) == [False, True]
    assert sorted(path.name for path in tmp_path.iterdir()) == [damaged.name, f"{damaged.name}.lock"]
    assert demo_model.is_complete(damaged)
    names = [path.name for path in sorted(demo_checkpoint.iterdir()) if path.is_file()]  # experts' caches lie beside
    assert {name: sha256(damaged / name) for name in names} == {name: sha256(demo_checkpoint / name) for name in names}
