"""What experts of fewer bits cost and save: memory, tokens/s, CPU seconds a token, and the quality of the answers.

For the 1.5 GiB model and the demo model, in bf16, int8, int4, and with experts of several dtypes under a budget of 0.4
of bf16's memory: one engine and four pools of two hosts, of which one serves at a time, so that all see the same noise.
Cost is the CPU seconds that hosts and engine use a token, and its ratio is the median over rounds of that to bf16's in
the same round.

Quality is the demo model's on real text (this repository's docs), read by transformers in float32 with only its experts
quantised: the perplexity's rise, the KL divergence from the unquantised model, and how often both find the same token
the likeliest. Under the budget experts get their bits by the rows that they have on every other window of the text, and
the others are read; "alike" is the same without knowing of rows.

    python -m benchmarks.cost --json cost.json
"""

import itertools
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.checkpoints import measure_sized, tiny
from benchmarks.engines import Bench, Engine, Pool, prompts_of
from folkmoot.cluster import demo_model, expert_precision
from folkmoot.experts.expert_choice import Choice, choose, parse
from folkmoot.experts.quantised import KINDS, ExpertShape, QuantisedKernel, Weights, quantise, sampled_errors

FORMS = {"int8": "int8", "int4": "int4", "auto": "auto:0.4"}
"""What is compared with bf16, and how `--expert-dtype` names it."""
DTYPES = {"bf16": "checkpoint", **FORMS}
TEXT = (Path(__file__).parents[1] / "README.md", *sorted((Path(__file__).parents[1] / "docs").glob("*.md")))
MOST_RISE = 0.01
"""A form counts as good as bf16 where its perplexity is at most this much higher."""
PROMPT_TOKENS, VOCABULARY = 16, 500


@dataclass(frozen=True)
class Spent:
    """One round of one form at one batch size."""

    tokens_s: float
    cpu_s: float
    """of hosts and engine, a token"""
    host_cpu_s: float


@dataclass(frozen=True)
class Quality:
    """What a form does to the demo model's predictions, against the unquantised model."""

    perplexity: float
    rise: float
    kl: float
    top1: float


def cpu_s(pids: Sequence[int]) -> float:
    """CPU seconds that processes have used so far."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def spend(engine: Engine, pool: Pool, batch: int, num_tokens: int) -> Spent:
    """Generate with the pool that the engine uses now."""
    hosts = [child.pid for child in pool.children.values()]
    before = cpu_s(hosts), cpu_s([engine.child.pid])
    seconds = engine.generate(prompts_of(batch, PROMPT_TOKENS, VOCABULARY), num_tokens)["seconds"]
    own, other = cpu_s(hosts) - before[0], cpu_s([engine.child.pid]) - before[1]
    tokens = batch * num_tokens
    return Spent(tokens / seconds, (own + other) / tokens, own / tokens)


def costs(
    bench: Bench, checkpoint: Path, batches: Sequence[int], num_tokens: int, rounds: int
) -> tuple[dict[str, int], dict[tuple[str, int], list[Spent]]]:
    """Bytes of each form's experts; and all rounds of each form and batch size."""
    pools = {form: pool_of(bench, checkpoint, name) for form, name in DTYPES.items()}
    engine = bench.engine(checkpoint, pool=pools["bf16"], dispatch={"background_workers": True}).wait()
    versions = itertools.count(1000)
    spent: dict[tuple[str, int], list[Spent]] = {(form, b): [] for form in DTYPES for b in batches}
    for turn, batch, form in itertools.product(range(rounds + 1), batches, DTYPES):
        engine.use_pool(pools[form], next(versions))
        engine.generate(prompts_of(2, PROMPT_TOKENS, VOCABULARY), 2)  # links are made
        one = spend(engine, pools[form], batch, num_tokens)
        if turn:  # the first round warms up
            spent[form, batch].append(one)
    sizes = {form: pool.bytes for form, pool in pools.items()}
    engine.close()
    for pool in pools.values():
        pool.close()
    return sizes, spent


def pool_of(bench: Bench, checkpoint: Path, expert_dtype: str) -> Pool:
    """Two hosts, each with all experts. A budget's choice is made as `folkmoot up` makes it without loads."""
    if (budget := parse(expert_dtype)) is None:
        return bench.pool(checkpoint, 2, 2, expert_dtype=expert_dtype)
    log = bench.directory / "measure.log"
    measured = expert_precision.measure(str(checkpoint), "auto", bench.parent(), log, lambda text, part: None)
    return bench.pool(checkpoint, 2, 2, expert_dtype=expert_dtype, expert_letters=choose(*measured, budget).letters)


def cost_ratio(spent: Mapping[tuple[str, int], list[Spent]], form: str, batch: int) -> float:
    """CPU seconds a token over bf16's: the median over rounds."""
    pairs = zip(spent[form, batch], spent["bf16", batch], strict=True)
    return statistics.median(a.cpu_s / b.cpu_s for a, b in pairs)


def windows(tokenizer: Any, num: int, length: int) -> torch.Tensor:
    """Real text as token ids [num, length], windows spread evenly over all of it."""
    ids = tokenizer("\n\n".join(path.read_text() for path in TEXT), verbose=False).input_ids
    step = (len(ids) - length) // num
    return torch.tensor([ids[i * step : i * step + length] for i in range(num)])


def weights_of(layer: Any) -> tuple[ExpertShape, list[Weights]]:
    """Of a layer's routed experts of a transformers Mixtral."""
    _, hidden, intermediate = layer.down_proj.shape
    pairs = zip(layer.gate_up_proj.detach(), layer.down_proj.detach(), strict=True)
    return ExpertShape(hidden, intermediate), [Weights(w13, w2) for w13, w2 in pairs]


def quantised_forwards(experts: Sequence[Any], kind_of: Callable[[int, int], str]) -> list[Any]:
    """For each layer's routed experts of a transformers Mixtral: the same function with quantised ones."""
    forwards = []
    for number, layer in enumerate(experts):
        shape, weights = weights_of(layer)
        kinds = [kind_of(number, e) for e in range(len(weights))]
        blobs = [quantise(shape, kind, w)[0] for kind, w in zip(kinds, weights, strict=True)]
        kernel = QuantisedKernel(shape, kinds, blobs, torch.float32)

        def forward(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, k: Any = kernel) -> torch.Tensor:
            rows = k(x.repeat_interleave(ids.shape[1], 0).contiguous(), ids.flatten().int().contiguous())
            out: torch.Tensor = (rows.view(*ids.shape, -1) * weights[..., None]).sum(1)
            return out

        forwards.append(forward)
    return forwards


def recorded_rows(model: Any, experts: Sequence[Any], ids: torch.Tensor) -> dict[int, list[float]]:
    """Of each layer the rows that each expert has while the model reads these windows."""
    counts = [torch.zeros(len(layer.down_proj), dtype=torch.int64) for layer in experts]

    def add(count: torch.Tensor, _: Any, given: tuple[torch.Tensor, ...]) -> None:
        count += torch.bincount(given[1].flatten(), minlength=len(count))

    hooks = [e.register_forward_pre_hook(partial(add, count)) for e, count in zip(experts, counts, strict=True)]
    with torch.inference_mode():
        for row in ids:
            model(row[None])
    for hook in hooks:
        hook.remove()
    return {n: count.tolist() for n, count in enumerate(counts)}


def choice_for(experts: Sequence[Any], rows: Mapping[int, Sequence[float]] | None) -> Choice:
    """The dtypes of the experts under the budget."""
    layers = [weights_of(layer) for layer in experts]
    each = [[sampled_errors(shape, w, max(1, shape.intermediate // 64)) for w in ws] for shape, ws in layers]
    errors = {n: {kind: [e[kind] for e in of_layer] for kind in KINDS} for n, of_layer in enumerate(each)}
    sizes = {n: {kind: shape.bytes(kind) for kind in KINDS} for n, (shape, _) in enumerate(layers)}
    budget = parse(FORMS["auto"])
    assert budget is not None
    return choose(errors, sizes, budget, rows)


def qualities(checkpoint: Path, num: int, length: int) -> dict[str, Quality]:
    """Of the checkpoint's own experts and each form, over `num` windows of `length` tokens; rows are recorded on as
    many others between them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    both = windows(AutoTokenizer.from_pretrained(checkpoint), 2 * num, length)
    ids, others = both[::2], both[1::2]
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    experts = [layer.mlp.experts for layer in model.model.layers]
    known, alike = choice_for(experts, recorded_rows(model, experts, others)), choice_for(experts, None)
    print(f"auto: {known}\nalike: {alike}")
    kinds: dict[str, Callable[[int, int], str]] = {"int8": lambda n, e: "int8", "int4": lambda n, e: "int4"}
    kinds |= {"auto": known.kind, "alike": alike.kind}
    forwards = {"bf16": [e.forward for e in experts]}
    forwards |= {form: quantised_forwards(experts, kind_of) for form, kind_of in kinds.items()}
    sums = {form: torch.zeros(3, dtype=torch.float64) for form in forwards}  # -log p, KL, top-1 agreement
    for row in ids:
        exact = None
        for form, own in forwards.items():
            for layer, forward in zip(experts, own, strict=True):
                layer.forward = forward
            with torch.inference_mode():
                seen = torch.log_softmax(model(row[None]).logits[0, :-1].float(), -1)
            exact = seen if exact is None else exact
            kl = (exact.exp() * (exact - seen)).sum(-1)
            agree = (seen.argmax(-1) == exact.argmax(-1)).float()
            sums[form] += torch.stack([-seen.gather(-1, row[1:, None]).mean(), kl.mean(), agree.mean()]).double() / num
    least = float(sums["bf16"][0].exp())
    return {
        form: Quality(float(s[0].exp()), float(s[0].exp()) / least - 1, float(s[1]), float(s[2]))
        for form, s in sums.items()
    }


def report_costs(
    name: str,
    sizes: Mapping[str, int],
    spent: Mapping[tuple[str, int], list[Spent]],
    figures: dict[str, object],
) -> list[list[object]]:
    """Rows of the table; the figures are added."""
    rows: list[list[object]] = []
    for form, batch in spent:
        speed, host = (statistics.median(getattr(s, k) for s in spent[form, batch]) for k in ("tokens_s", "host_cpu_s"))
        ratio = cost_ratio(spent, form, batch)
        figures[f"{name}_{form}_tokens_s_bs{batch}"] = speed
        figures[f"{name}_{form}_cost_ratio_bs{batch}"] = ratio
        figures[f"{name}_{form}_host_cpu_ms_bs{batch}"] = 1e3 * host
        figures[f"{name}_{form}_expert_bytes"] = sizes[form]
        rows.append([name, batch, form, sizes[form] / 2**20, speed, 1e3 * host, ratio])
    return rows


def main() -> None:
    """Measure and report."""
    args = report.parser(__doc__).parse_args()
    figures: dict[str, object] = {}
    rows: list[list[object]] = []
    ratios: dict[str, list[float]] = {form: [] for form in FORMS}
    memory: dict[str, list[float]] = {form: [] for form in FORMS}
    demo = demo_model.ensure()
    with tempfile.TemporaryDirectory(prefix="fm-ck-") as folder, Bench() as bench:
        subjects: dict[str, tuple[Path, tuple[int, ...]]] = {
            "tiny": (tiny("mixtral", Path(folder) / "tiny"), (8,)),
        } if args.quick else {
            "large": (measure_sized(Path(folder) / "measure-1.5GiB"), (1, 8, 32, 64)),
            "demo": (demo, (1, 16, 64)),
        }  # fmt: skip
        for name, (checkpoint, batches) in subjects.items():
            sizes, spent = costs(bench, checkpoint, batches, *((8, 2) if args.quick else (32, 3)))
            rows += report_costs(name, sizes, spent, figures)
            for form in FORMS:
                memory[form].append(sizes[form] / sizes["bf16"])
                ratios[form] += [cost_ratio(spent, form, batch) for batch in batches]
    found = qualities(demo, *((1, 128) if args.quick else (24, 256)))
    for form, quality in found.items():
        for key, value in vars(quality).items():
            figures[f"demo_{form}_{key}"] = value
    figures |= {f"{form}_memory_ratio": max(memory[form]) for form in FORMS}
    good = [form for form in FORMS if found[form].rise < MOST_RISE] or list(FORMS)
    best = min(good, key=lambda form: min(ratios[form]))
    figures["best_form"], figures["best_cost_ratio"] = best, min(ratios[best])
    figures["best_cost_ratio_perplexity_rise"] = found[best].rise
    header = ["model", "batch", "experts", "MiB", "tokens/s", "hosts' CPU ms/token", "cost over bf16"]
    print(report.table("Memory, speed and cost", header, rows))
    quality_rows = [[form, q.perplexity, q.rise, q.kl, q.top1] for form, q in found.items()]
    print(report.table("Quality", ["experts", "perplexity", "rise", "KL", "top-1 agreement"], quality_rows))
    report.finish(figures, args.json)


if __name__ == "__main__":
    main()
