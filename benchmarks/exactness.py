"""Exactness: the same logits wherever the experts are, and vLLM's own where its arithmetic allows.

For each architecture a tiny random checkpoint whose experts all differ, 16 prompts and 32 greedy tokens:

- placement: the largest difference of any logit between 1, 2 and 4 hosts, with one and with two replicas;
- against monolithic vLLM: the largest difference of any log-probability, in bf16 and in float32. Where greedy tokens
  part, steps up to and including the first different one are compared;
- for scale, how far monolithic vLLM in bf16 is from transformers in float32 on the same tokens.

Then the demo model: how many of 50 greedy answers of 64 tokens equal monolithic vLLM's word for word, beside how many
of monolithic vLLM's own bf16 answers equal its float32 ones.

    python -m benchmarks.exactness --json exactness.json
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import report
from benchmarks.checkpoints import ARCHITECTURES, tiny
from benchmarks.engines import FULL_LOGITS, Bench, Engine, prompts_of
from benchmarks.questions import QUESTIONS
from folkmoot.cluster import demo_model
from folkmoot.experts import vllm_api, warm

Logits = np.ndarray[Any, np.dtype[np.float32]]  # [prompts, steps, vocabulary]

PLACEMENTS = ((1, 1), (2, 1), (4, 1), (2, 2), (4, 2))  # hosts, replicas
QUICK_PLACEMENTS = ((1, 1), (2, 1), (2, 2))
FIGURES = ("placement", "bf16", "fp32", "transformers")
QUICK = {"mixtral": ("placement", "fp32"), "llama4": ("placement", "bf16")}
"""Of each of two architectures what it must be exact in."""
DENSE = "llama"
FLOAT32_ARGUMENTS = {"deepseek_v3": {"attention_backend": "CPU_MLA"}}
"""vLLM's default attention for this one takes no float32 on a CPU."""


@dataclass(frozen=True)
class Run:
    """What one engine answered."""

    tokens: list[list[int]]
    logits: Logits

    def logprobs(self) -> Logits:
        """Log-probabilities, float64 inside."""
        shifted = self.logits.astype(np.float64) - self.logits.max(-1, keepdims=True)
        result: Logits = (shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))).astype(np.float32)
        return result


def comparable_steps(a: Run, b: Run) -> list[int]:
    """For each prompt how many steps had the same tokens before them: those up to the first different token."""
    counts = []
    for x, y in zip(a.tokens, b.tokens, strict=True):
        different = [i for i, (s, t) in enumerate(zip(x, y, strict=True)) if s != t]
        counts.append(different[0] + 1 if different else len(x))
    return counts


def largest_difference(a: Run, b: Run, of: str) -> float:
    """The largest absolute difference of "logits" or "logprobs" over comparable steps."""
    x, y = (a.logits, b.logits) if of == "logits" else (a.logprobs(), b.logprobs())
    return max(float(np.abs(x[i, :n] - y[i, :n]).max()) for i, n in enumerate(comparable_steps(a, b)))


def transformers_distance(checkpoint: Path, prompts: list[list[int]], run: Run) -> float:
    """The largest difference of any log-probability between `run` and transformers in float32, on run's tokens."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    theirs, largest = run.logprobs(), 0.0
    for i, prompt in enumerate(prompts):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + run.tokens[i][:-1]])).logits[0, len(prompt) - 1 :]
        reference = torch.log_softmax(logits.double(), -1).float().numpy()
        largest = max(largest, float(np.abs(reference - theirs[i]).max()))
    return largest


class Subject:
    """One checkpoint under test: its engines are started once and moved from pool to pool."""

    def __init__(self, bench: Bench, checkpoint: Path, prompts: list[list[int]], num_tokens: int) -> None:
        self.bench, self.checkpoint, self.prompts, self.num_tokens = bench, checkpoint, prompts, num_tokens
        self.shape = vllm_api.describe(checkpoint)

    def arguments(self, dtype: str) -> dict[str, Any]:
        """What vLLM is told beside the checkpoint."""
        extra = FLOAT32_ARGUMENTS.get(self.checkpoint.name, {}) if dtype == "float32" else {}
        return {"dtype": dtype, **FULL_LOGITS, **extra}

    def answer(self, engine: Engine) -> Run:
        """Greedy tokens and logits."""
        path = self.bench.directory / "logits.npy"
        return Run(*engine.logits(self.prompts, self.num_tokens, path))

    def monolithic(self, dtype: str) -> Run:
        """Monolithic vLLM; OpenMP's settings, which are ours here, change how fast it is and nothing else."""
        engine = self.bench.engine(self.checkpoint, openmp=warm.OPENMP, **self.arguments(dtype)).wait()
        run = self.answer(engine)
        engine.close()
        return run

    def hosted(self, dtype: str, placements: tuple[tuple[int, int], ...]) -> list[Run]:
        """One engine under several placements, switched live. A dense model has no hosts, and one run."""
        if not self.shape.moe_layers:
            return [self.monolithic(dtype)]
        runs, engine, version = [], None, 1000
        for hosts, replicas in placements:
            pool = self.bench.pool(self.checkpoint, hosts, replicas, dtype=dtype)
            if engine is None:
                engine = self.bench.engine(self.checkpoint, pool=pool, **self.arguments(dtype)).wait()
            else:
                engine.use_pool(pool, version := version + 1)
            runs.append(self.answer(engine))
            pool.close()
        if engine is not None:
            engine.close()
        return runs


def examine(subject: Subject, placements: tuple[tuple[int, int], ...], wanted: Sequence[str]) -> dict[str, float]:
    """The wanted ones of FIGURES of one architecture, the others NaN; "transformers" only beside "bf16"."""
    figures = dict.fromkeys(FIGURES, float("nan"))
    runs = subject.hosted("bfloat16", placements)
    figures["placement"] = max(largest_difference(runs[0], r, "logits") for r in runs)
    if "bf16" in wanted:
        mono = subject.monolithic("bfloat16")
        figures["bf16"] = largest_difference(runs[0], mono, "logprobs")
        if "transformers" in wanted:
            figures["transformers"] = transformers_distance(subject.checkpoint, subject.prompts, mono)
    if "fp32" in wanted:
        try:
            exact = subject.monolithic("float32")
            figures["fp32"] = largest_difference(subject.hosted("float32", placements[-1:])[0], exact, "logprobs")
        except RuntimeError as e:
            print(f"{subject.checkpoint.name}: not run in float32: {str(e)[:200]}")
    return figures


def demo_answers(bench: Bench, num_prompts: int, num_tokens: int) -> dict[str, object]:
    """Fractions of the demo model's greedy answers that are equal: ours to vLLM's, vLLM's bf16 to its float32."""
    from transformers import AutoTokenizer

    checkpoint = demo_model.ensure()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": q}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for q in QUESTIONS[:num_prompts]
    ]  # fmt: skip
    answers: dict[str, list[list[int]]] = {}
    for name, dtype in (("ours", "bfloat16"), ("vllm", "bfloat16"), ("vllm fp32", "float32")):
        pool = bench.pool(checkpoint, 2) if name == "ours" else None
        engine = bench.engine(checkpoint, pool=pool, openmp=warm.OPENMP, dtype=dtype).wait()
        answers[name] = engine.generate(prompts, num_tokens, ignore_eos=False)["tokens"]
        engine.close()
        if pool is not None:
            pool.close()

    def equal(a: str, b: str) -> float:
        return sum(x == y for x, y in zip(answers[a], answers[b], strict=True)) / num_prompts

    return {
        "demo_answers_equal": equal("ours", "vllm"),
        "demo_answers_equal_vllm_bf16_fp32": equal("vllm", "vllm fp32"),
    }


def main() -> None:
    """Measure and report."""
    args = report.parser(__doc__).parse_args()
    architectures = list(QUICK if args.quick else ARCHITECTURES)
    if not args.quick and not report.has_amx():
        architectures.remove("gpt_oss_mxfp4")
        print("left out: gpt_oss_mxfp4, for which vLLM has no kernel on a processor without AMX")
    num_prompts, num_tokens = (4, 8) if args.quick else (16, 32)
    prompts = prompts_of(num_prompts, 12, 500)
    results: dict[str, dict[str, float]] = {}
    figures: dict[str, object] = {}
    with tempfile.TemporaryDirectory(prefix="fm-ck-") as name, Bench() as bench:
        for architecture in architectures:
            subject = Subject(bench, tiny(architecture, Path(name) / architecture), prompts, num_tokens)
            # transformers has no CPU kernel for mxfp4, and a dense model has nothing to place
            every = FIGURES[:-1] if architecture in (DENSE, "gpt_oss_mxfp4") else FIGURES
            wanted, placements = (QUICK[architecture], QUICK_PLACEMENTS) if args.quick else (every, PLACEMENTS)
            results[architecture] = examine(subject, placements, wanted)
            print(architecture, results[architecture], flush=True)
        if not args.quick:
            figures.update(demo_answers(bench, 50, 64))
    top1 = [a for a in results if a.startswith("llama4")]
    figures["max_abs_dlogit_placement"] = max(r["placement"] for r in results.values())
    figures["max_abs_dlogprob_vs_vllm_top1_bf16"] = max(results[a]["bf16"] for a in top1)
    figures["max_abs_dlogprob_vs_vllm_fp32"] = float(np.nanmax([r["fp32"] for r in results.values()]))
    for architecture, result in results.items():
        for kind, value in result.items():
            if value == value:  # what was not run is NaN, which JSON does not know
                figures[f"{architecture}_{kind}"] = value
    header = ["architecture", "placement (logits)", "vLLM bf16", "vLLM fp32", "vLLM bf16 to transformers fp32"]
    rows = [[a, r["placement"], r["bf16"], r["fp32"], r["transformers"]] for a, r in results.items()]
    print(report.table("Largest absolute difference, of log-probabilities unless named", header, rows))
    report.finish(figures, args.json)


if __name__ == "__main__":
    main()
