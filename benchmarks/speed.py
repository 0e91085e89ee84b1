"""Speed: the engine's own speed-ups, alone and together, against transformers and against monolithic vLLM.

Same model, same cores, same run; all take turns in each round, with prompts that are new in each round, and ratios are
medians over rounds of what was measured in the same round.

    demo     a real model on real text: 160 tokens of instructions that all prompts share, and 32 of their own
    large    1.5 GiB of random experts on random prompts of 16 tokens, where neither a cached prefix nor a guess helps

Ours is one engine with two expert hosts, as `folkmoot up` starts them; two micro-batches are measured alone, and not
together with the others. A peer is given its best form at each batch:
transformers its static and its continuous batching and each of its implementations of experts, vLLM its defaults and
all that is measured here.

    over_transformers_worst, _best    over all batch sizes, in bf16
    over_vllm                         the geometric mean over all batch sizes, in bf16
    over_vllm_int8, _int4             the same with such experts of ours; over_transformers_int8_worst, _int4_worst too
    itl_p99_over_p50                  inter-token latency at a client, 8 of which load a whole cluster steadily

    python -m benchmarks.speed --json speed.json
"""

import asyncio
import functools
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks import load, report, transformers_peer
from benchmarks.checkpoints import measure_sized, tiny
from benchmarks.clusters import Cluster
from benchmarks.engines import Bench, Pool, prompts_of
from benchmarks.load import Load
from folkmoot.cluster import demo_model
from folkmoot.cluster.bench import percentile

SHARED_TOKENS, OWN_TOKENS = 160, 32
WARM_TOKENS = 4
KV_CACHE_BYTES = 256 << 20
NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
SPEED_UPS: Mapping[str, Mapping[str, Any]] = {
    "prefix caching": {"enable_prefix_caching": True},
    "chunked prefill": {"enable_chunked_prefill": True, "max_num_batched_tokens": 256},
    "compiled": {"enforce_eager": False},
    "n-gram speculation": {"speculative_config": NGRAM},
}
PLAIN: Mapping[str, Any] = {"enable_chunked_prefill": False}
VLLM_DEFAULTS: Mapping[str, Any] = {"enforce_eager": None, "enable_prefix_caching": None}
QUANTISED = ("int8", "int4")
OURS, VLLM, TRANSFORMERS = "ours", "vLLM", "transformers"

Contestant: TypeAlias = tuple[str, str]
"""(whose, form)"""
Generate: TypeAlias = Callable[[list[list[int]], int], dict[str, Any]]
Prompts: TypeAlias = Callable[[int, int], list[list[int]]]
"""(round, batch) -> prompts of equal length"""


@dataclass(frozen=True)
class Subject:
    """What is measured on one model."""

    name: str
    checkpoint: Path
    prompts: Prompts
    batches: tuple[int, ...]
    num_tokens: int
    rounds: int
    speed_ups: tuple[str, ...]
    vllm: Mapping[str, Mapping[str, Any]]
    """forms of the monolith beside all speed-ups together"""


def together(speed_ups: Sequence[str]) -> dict[str, Any]:
    """Arguments of an engine with several of them on."""
    return {**PLAIN, **{name: value for s in speed_ups for name, value in SPEED_UPS[s].items()}}


def contestants(bench: Bench, subject: Subject, pools: Mapping[str, Pool]) -> dict[Contestant, Generate]:
    """All of them, loaded one after the other."""
    forms: dict[str, Mapping[str, Any]] = {"plain": PLAIN}
    if len(subject.speed_ups) > 1:
        forms |= {one: together([one]) for one in subject.speed_ups}
    forms["together"] = together(subject.speed_ups)
    common: dict[str, Any] = {"max_model_len": 512, "kv_cache_memory_bytes": KV_CACHE_BYTES}
    found: dict[Contestant, Generate] = {}

    def ours(form: str, arguments: Mapping[str, Any], dtype: str = "checkpoint", *, halved: bool = False) -> None:
        dispatch = {"background_workers": True, "micro_batches": halved}
        engine = bench.engine(subject.checkpoint, pool=pools[dtype], dispatch=dispatch, **common, **arguments)
        found[OURS, form] = engine.wait().generate

    for form, arguments in forms.items():
        ours(form, arguments)
    ours("micro-batches", PLAIN, halved=True)
    for dtype in QUANTISED:
        ours(f"together, {dtype}", forms["together"], dtype)
    for form, arguments in {**subject.vllm, "together": forms["together"]}.items():
        found[VLLM, form] = bench.engine(subject.checkpoint, openmp={}, **common, **arguments).wait().generate
    peer = transformers_peer.start(bench, subject.checkpoint).wait()
    for form, experts in transformers_peer.FORMS:
        generate = functools.partial(transformers_peer.generate, peer, form=form, experts=experts)
        found[TRANSFORMERS, f"{form}, {experts}"] = generate
    return found


def speeds(subject: Subject, found: Mapping[Contestant, Generate]) -> dict[tuple[Contestant, int], list[float]]:
    """Tokens/s of each at each batch size, one for each round; the first, which warms up, is left out and short."""
    measured: dict[tuple[Contestant, int], list[float]] = {(c, b): [] for b in subject.batches for c in found}
    for turn in range(subject.rounds + 1):
        num_tokens = subject.num_tokens if turn else WARM_TOKENS
        for (contestant, batch), rates in measured.items():
            answer = found[contestant](subject.prompts(turn, batch), num_tokens)
            assert all(len(tokens) == num_tokens for tokens in answer["tokens"])
            if turn:
                rates.append(batch * num_tokens / answer["seconds"])
    return measured


def best_of(measured: Mapping[tuple[Contestant, int], Sequence[float]], whose: str, batch: int) -> Contestant:
    """The quickest form at that batch size; of ours those in bf16."""
    forms = [c for c, b in measured if c[0] == whose and b == batch and not c[1].endswith(QUANTISED)]
    return max(forms, key=lambda c: statistics.median(measured[c, batch]))


def ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """The median over rounds."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def measure(bench: Bench, subject: Subject) -> tuple[list[list[object]], dict[str, float]]:
    """Rows of the table, and figures: over transformers and over vLLM at each batch size."""
    pools = {dtype: bench.pool(subject.checkpoint, 2, 2, expert_dtype=dtype) for dtype in ("checkpoint", *QUANTISED)}
    measured = speeds(subject, contestants(bench, subject, pools))
    rows: list[list[object]] = []
    figures: dict[str, float] = {}
    for batch in subject.batches:
        best = {whose: best_of(measured, whose, batch) for whose in (OURS, VLLM, TRANSFORMERS)}
        base = measured[(OURS, "plain"), batch]
        for contestant in (c for c, b in measured if b == batch):
            rates = measured[contestant, batch]
            mark = "*" if contestant == best[contestant[0]] else ""
            rows.append([subject.name, batch, *contestant, mark, statistics.median(rates), ratio(rates, base)])
        for whose, key in ((VLLM, "vllm"), (TRANSFORMERS, "transformers")):
            peer, end = measured[best[whose], batch], f"{subject.name}_bs{batch}"
            figures[f"over_{key}_{end}"] = ratio(measured[best[OURS], batch], peer)
            for dtype in QUANTISED:
                figures[f"over_{key}_{dtype}_{end}"] = ratio(measured[(OURS, f"together, {dtype}"), batch], peer)
    return rows, figures


def summary(figures: Mapping[str, float]) -> dict[str, float]:
    """Pure: over all models and batch sizes."""

    def of(peer: str, dtype: str = "") -> list[float]:
        """In that dtype; none: in bf16."""
        rest = {k.removeprefix(f"over_{peer}_"): v for k, v in figures.items() if k.startswith(f"over_{peer}_")}
        return [v for k, v in rest.items() if (k.startswith(dtype) if dtype else not k.startswith(QUANTISED))]

    found = {
        "over_transformers_best": max(of("transformers")),
        "over_transformers_worst": min(of("transformers")),
        "over_vllm": statistics.geometric_mean(of("vllm")),
    }
    for dtype in QUANTISED:
        found[f"over_vllm_{dtype}"] = statistics.geometric_mean(of("vllm", dtype))
        found[f"over_transformers_{dtype}_worst"] = min(of("transformers", dtype))
    return found


def text_prompts(checkpoint: Path) -> Prompts:
    """Prompts of real text, this repository's documents: a beginning that all share, and an end of their own."""
    from transformers import AutoTokenizer

    root = Path(__file__).parents[1]
    text = "\n\n".join(path.read_text() for path in (root / "README.md", *sorted((root / "docs").glob("*.md"))))
    ids = AutoTokenizer.from_pretrained(checkpoint)(text, verbose=False).input_ids
    own = [ids[i : i + OWN_TOKENS] for i in range(SHARED_TOKENS, len(ids) - OWN_TOKENS, OWN_TOKENS)]

    def prompts(turn: int, batch: int) -> list[list[int]]:
        return [ids[:SHARED_TOKENS] + own[(turn * 997 + batch * 101 + i) % len(own)] for i in range(batch)]

    return prompts


def random_prompts(turn: int, batch: int) -> list[list[int]]:
    """16 random tokens each."""
    return prompts_of(batch, 16, 500, seed=1000 * turn + batch)


def itl(checkpoint: Path, seconds: float, *options: str) -> tuple[float, float]:
    """(p50, p99) seconds between two tokens at a client, while 8 clients load a whole cluster steadily. `options` are
    more of `folkmoot up`'s."""
    questions = load.greedy(prompts_of(32, 16, 500), 64)
    with Cluster(checkpoint, ("--max-model-len", "512", *options)) as cluster:

        async def run() -> list[float]:
            async with Load(cluster.addresses, questions, 8) as steady:
                await asyncio.sleep(5.0)
                began = time.monotonic()
                await asyncio.sleep(seconds)
                pairs = [p for a in steady.answers for p in itertools.pairwise(a.arrivals_s)]
            return [b - a for a, b in pairs if began <= a and b <= began + seconds]

        gaps = asyncio.run(run())
    return percentile(gaps, 50), percentile(gaps, 99)


def subjects(quick: bool, folder: Path, *, skip: Sequence[str] = ()) -> list[Subject]:
    """What is measured, without the speed-ups in `skip`."""
    if quick:
        small = tiny("mixtral", folder / "tiny")
        return [Subject("tiny", small, random_prompts, (4,), 8, 1, ("prefix caching",), {})]
    demo, large = demo_model.ensure(), measure_sized(folder / "measure-1.5GiB")
    ups = [one for one in SPEED_UPS if one not in skip]
    vllm = {"plain": PLAIN} if "compiled" in skip else {"defaults": VLLM_DEFAULTS, "plain": PLAIN}
    return [
        Subject("demo", demo, text_prompts(demo), (1, 8, 32), 32, 3, tuple(ups), vllm),
        Subject("large", large, random_prompts, (1, 8, 32, 64), 32, 3, tuple(u for u in ups if u == "compiled"), vllm),
    ]


def main() -> None:
    """Measure and report."""
    parser = report.parser(__doc__)
    parser.add_argument("--only", choices=("demo", "large", "itl"), help="one model, or inter-token latency")
    parser.add_argument("--skip", nargs="*", choices=tuple(SPEED_UPS), default=(), help="leave these speed-ups out")
    args = parser.parse_args()
    rows: list[list[object]] = []
    figures: dict[str, object] = {}
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="fm-ck-") as name:
        for subject in (s for s in subjects(args.quick, Path(name), skip=args.skip) if args.only in (None, s.name)):
            with Bench() as bench:
                more, found = measure(bench, subject)
            rows, ratios = rows + more, ratios | found
    if ratios:
        figures |= ratios | summary(ratios)
    if args.only in (None, "itl"):
        p50, p99 = itl(demo_model.ensure(), 5.0 if args.quick else 30.0)
        figures |= {"itl_p50_ms": 1e3 * p50, "itl_p99_ms": 1e3 * p99, "itl_p99_over_p50": p99 / p50}
    header = ["model", "batch", "who", "form", "best", "tokens/s", "over ours plain"]
    print(report.table("Speed-ups, alone and together, and the peers", header, rows))
    report.finish(figures, args.json)


if __name__ == "__main__":
    main()
