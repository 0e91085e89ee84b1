"""Runs vLLM in children forked from one process that has imported it, for test_vllm_api.

Not a test itself. `python vllm_runs.py` prints "ready", then reads one JSON request a line and answers each with one
line {"ok": bool, "result" or "error": ...}. A request names a function below and its arguments. Each runs in its own
child, since a process can hold one vLLM engine.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from folkmoot.cluster import replay
from folkmoot.experts import turns, vllm_api
from folkmoot.experts.expert_choice import KINDS
from folkmoot.experts.quantise_cache import ExpertCache
from folkmoot.experts.vllm_api import lanes
from folkmoot.experts.vllm_api.checkpoint import identity
from folkmoot.experts.vllm_api.engine import current_dispatcher
from folkmoot.experts.vllm_api.runtime import register_eagerly

NUM_TOKENS = 32
PROMPTS = (
    "What is the capital of France?",
    "Each expert knows one thing well.",
    "one, two, three, four,",
    "def add(left: int, right: int)",
    "Rain on a tin roof",
    "How many legs has a spider?",
)


class InProcessDispatcher:
    """Hosts in the engine's own process: expert e of a layer lives on the host that `owner` names for it."""

    def __init__(self, hosts: Sequence[vllm_api.HostedExperts], slots: Sequence[Mapping[int, Sequence[int]]]) -> None:
        self.hosts = hosts
        self.slots = slots
        self.calls = 0
        self.parts: list[int] = []
        """of a step's micro-batches, the one of each call"""

    def forward(
        self,
        layer: int,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared: Callable[[], torch.Tensor] | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        self.calls += 1
        self.parts.append(turns.number())
        top_k = topk_ids.shape[1]
        pairs = x.repeat_interleave(top_k, dim=0)
        rows = torch.full_like(pairs, float("nan"))
        flat = topk_ids.flatten()
        for host, held in zip(self.hosts, self.slots, strict=True):
            for slot, expert in enumerate(held.get(layer, ())):
                mine = (flat == expert).nonzero().flatten()
                ids = torch.full((len(mine),), slot, dtype=torch.int32)
                rows[mine] = host.layers[layer](pairs[mine], ids)
        shared_out = shared() if shared else None
        turns.give_way()
        return combine(rows.view(len(x), top_k, -1), topk_weights), shared_out


def combine(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted sum over k in slot order, in float32. A fused multiply-add is exact in float64 until it is rounded."""
    total = torch.zeros(rows.shape[0], rows.shape[2], dtype=torch.float32)
    for slot in range(rows.shape[1]):
        row, weight = rows[:, slot], weights[:, slot, None]
        if vllm_api.fuses_multiply_add():
            total = (row.double() * weight.double() + total.double()).float()
        else:
            total = row.float() * weight + total
    return total.to(rows.dtype)


def generate(llm: Any, num_tokens: int) -> dict[str, Any]:
    """Greedy tokens, their log-probabilities, and the top-5 of each step, for all prompts."""
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0.0, max_tokens=num_tokens, logprobs=5, ignore_eos=True)
    outputs = [o.outputs[0] for o in llm.generate(list(PROMPTS), parameters, use_tqdm=False)]
    top = [[{str(t): p.logprob for t, p in step.items()} for step in o.logprobs] for o in outputs]
    return {"tokens": [list(o.token_ids) for o in outputs], "top": top}


def load(checkpoint: str, dtype: str, **extra: Any) -> Any:
    from vllm import LLM

    register_eagerly(vllm_api.describe(Path(checkpoint)).architecture)
    return LLM(
        checkpoint, dtype=dtype, enforce_eager=extra.pop("enforce_eager", True), max_model_len=128, max_num_seqs=16,
        kv_cache_memory_bytes=1 << 26, enable_prefix_caching=False, seed=0, **extra,
    )  # fmt: skip


def monolithic(checkpoint: str, dtype: str, num_tokens: int = 16, **extra: Any) -> dict[str, Any]:
    return generate(load(checkpoint, dtype, **extra), num_tokens)


def hosted(
    checkpoint: str,
    dtype: str,
    num_tokens: int = 16,
    expert_dtype: str = "checkpoint",
    letters: str | None = None,
    **extra: Any,
) -> dict[str, Any]:
    """The same with experts outside the model: all on one host, then halves (odd and even) on two."""
    shape = vllm_api.describe(Path(checkpoint))
    dtypes: dict[str, Any] = {"dtype": dtype, "expert_dtype": expert_dtype}
    dtypes["expert_letters"] = letters and dict.fromkeys(shape.moe_layers, letters)
    dispatcher = InProcessDispatcher([], [])
    vllm_api.install(lambda: dispatcher)
    llm = load(checkpoint, dtype, **vllm_api.engine_arguments(), **extra)
    results: dict[str, Any] = {"engine": engine_parameters(llm)}
    for name, num_hosts in (("one", 1), ("halves", 2)):
        held = [{layer: range(h, shape.num_experts, num_hosts) for layer in shape.moe_layers} for h in range(num_hosts)]
        dispatcher.hosts = [vllm_api.load_experts(Path(checkpoint), h, **dtypes) for h in held]
        dispatcher.slots = held
        dispatcher.calls = 0
        results[name] = generate(llm, num_tokens)
        results[f"{name}_calls"] = dispatcher.calls
    return results


def two_lanes(checkpoint: str, batch_rows: int, near_s: float = 60.0, **limits: Any) -> dict[str, Any]:
    """Four batch requests, and in the middle an interactive one; three more batch requests after it. Tokens of the
    first five, alone and so; who got one in each step while the interactive one was there; who was preempted; and how
    many of the last three began in each step. `limits`: vLLM's slots and blocks."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    register_eagerly(vllm_api.describe(Path(checkpoint)).architecture)
    arguments = EngineArgs(
        checkpoint, dtype="float32", enforce_eager=True, max_model_len=128, kv_cache_memory_bytes=1 << 26, seed=0,
        enable_prefix_caching=False, enable_chunked_prefill=False, logits_processors=[replay.PROCESSOR], **limits,
    )  # fmt: skip
    config = arguments.create_engine_config()
    lanes.NEAR_S = near_s
    vllm_api.use_two_lanes(config, vllm_api.Lanes(batch_rows, 64))
    engine = LLMEngine.from_vllm_config(config)
    scheduler = engine.engine_core.engine_core.scheduler  # type: ignore[attr-defined]
    seen: dict[str, list[int]] = {}

    def add(name: str, number: int, priority: int, **how: Any) -> None:
        sampling = SamplingParams(max_tokens=24, ignore_eos=True, **how)
        engine.add_request(name, PROMPTS[number], sampling, priority=priority)

    def step() -> list[str]:
        outputs = {o.request_id: list(o.outputs[0].token_ids) for o in engine.step()}
        grown = [name for name, tokens in outputs.items() if len(tokens) > len(seen.get(name, ()))]
        seen.update(outputs)
        return grown

    ways: list[dict[str, Any]] = [{"temperature": 0.0}] * 2 + [{"temperature": 1.0, "seed": i} for i in range(2)]
    for i, how in enumerate([*ways, {"temperature": 0.0}]):
        add(f"alone-{i}", i, 0, **how)
        while engine.has_unfinished_requests():
            step()
    ways[1] = {**ways[1], "extra_args": {replay.FORCED: seen["alone-1"][:12]}}
    for i, how in enumerate(ways):
        add(f"batch-{i}", i, 1, **how)
    for _ in range(6):
        step()
    add("interactive", 4, 0, temperature=0.0)
    steps = [step()]
    preempted = [r.request_id for r in scheduler.requests.values() if r.num_preemptions]
    while len(seen["interactive"]) < 24:
        steps.append(step())
    for i in range(3):
        add(f"late-{i}", i, 1, temperature=0.0)
    begun = []
    while engine.has_unfinished_requests():
        before = set(seen)
        begun.append(len([name for name in step() if name not in before]))
    mixed = [seen[f"batch-{i}"] for i in range(4)] + [seen["interactive"]]
    alone = [seen[f"alone-{i}"] for i in range(5)]
    return {"alone": alone, "mixed": mixed, "steps": steps, "preempted": preempted, "begun": begun}


def sped_up(checkpoint: str, seeded: bool = True, **arguments: Any) -> dict[str, Any]:
    """Four requests whose prompts of 160 tokens begin alike, one after the other and then all at once, by an engine
    with these speed-ups and one expert host. Tokens of each, steps of the second time, most tokens that one step
    computed, tokens of prompts that were found in the cache, and the micro-batch of each layer call. Every second
    request is seeded sampling; or all are greedy, of three tokens."""
    engine = _sped_up_engine(checkpoint, arguments)
    sizes = _step_sizes(engine)
    tokens: dict[str, list[int]] = {}
    cached = 0

    def finish() -> None:
        nonlocal cached
        while engine.has_unfinished_requests():
            for output in engine.step():
                tokens[output.request_id] = list(output.outputs[0].token_ids)
                cached += (output.num_cached_tokens or 0) if output.finished else 0

    for i in range(4):
        _add_request(engine, f"alone-{i}", i, seeded)
        finish()
    sizes.clear()
    for i in range(4):
        _add_request(engine, f"together-{i}", i, seeded)
    finish()
    return {
        **{name: [tokens[f"{name}-{i}"] for i in range(4)] for name in ("alone", "together")},
        "steps": len([size for size in sizes if size]),
        "most_tokens": max(sizes),
        "cached": cached,
        "parts": current_dispatcher().parts,
    }


def staggered(checkpoint: str, invariant: bool) -> dict[str, Any]:
    """In bf16, four requests each alone, then beside others that began 0 to 9 steps before: log-probabilities of every
    step, which show what tokens of so small a model may not."""
    os.environ.update(vllm_api.batch_invariance("cpu", invariant))
    engine = _sped_up_engine(checkpoint, {"dtype": "bfloat16"})
    seen: dict[str, list[dict[str, float]]] = {}

    def step() -> None:
        for output in engine.step():
            steps = output.outputs[0].logprobs
            seen[output.request_id] = [{str(t): p.logprob for t, p in step.items()} for step in steps]

    for i in range(4):
        _add_request(engine, f"alone-{i}", i, seeded=True, logprobs=5)
        while engine.has_unfinished_requests():
            step()
    for i in range(4):
        _add_request(engine, f"beside-{i}", i, seeded=True, logprobs=5)
        for _ in range(3):
            step()
    while engine.has_unfinished_requests():
        step()
    return {name: [seen[f"{name}-{i}"] for i in range(4)] for name in ("alone", "beside")}


def _sped_up_engine(checkpoint: str, arguments: dict[str, Any]) -> Any:
    """vLLM's engine in this process, with two lanes and all experts on one host here; float32 unless told otherwise."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    shape = vllm_api.describe(Path(checkpoint))
    held = {layer: range(shape.num_experts) for layer in shape.moe_layers}
    dispatcher = InProcessDispatcher([], [held])
    vllm_api.install(lambda: dispatcher)
    vllm_api.allow_chunks()
    arguments = {"dtype": "float32", "enable_chunked_prefill": False, "enable_prefix_caching": False, **arguments}
    if (least_requests := arguments.pop("micro_batch_from", None)) is not None:
        vllm_api.use_micro_batches(least_requests)
    config = EngineArgs(
        checkpoint, enforce_eager=True, max_model_len=256, max_num_seqs=4,
        kv_cache_memory_bytes=1 << 26, seed=0, **arguments,
    ).create_engine_config()  # fmt: skip
    vllm_api.use_two_lanes(config, vllm_api.Lanes(1, 256))
    engine = LLMEngine.from_vllm_config(config)
    dispatcher.hosts = [vllm_api.load_experts(Path(checkpoint), held, dtype=arguments["dtype"])]
    return engine


def _step_sizes(engine: Any) -> list[int]:
    """Tokens that each step computes, from now on."""
    scheduler = engine.engine_core.engine_core.scheduler
    sizes: list[int] = []
    schedule = scheduler.schedule

    def noted(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        sizes.append(output.total_num_scheduled_tokens)
        return output

    scheduler.schedule = noted
    return sizes


def _add_request(engine: Any, name: str, i: int, seeded: bool, logprobs: int | None = None) -> None:
    from vllm import SamplingParams, TokensPrompt

    prompt = [*range(8, 144), *range(200 + 40 * i, 224 + 40 * i)]
    how: dict[str, Any] = {"temperature": 1.0, "seed": i} if seeded and i % 2 else {"temperature": 0.0}
    how |= {} if seeded else {"allowed_token_ids": [20, 21, 22]}  # so that what has been comes again
    sampling = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=logprobs, **how)
    engine.add_request(name, TokensPrompt(prompt_token_ids=prompt), sampling)


def engine_parameters(llm: Any) -> dict[str, int]:
    """Bytes of the engine's parameters: on the meta device, elsewhere, and elsewhere under a routed expert's name."""
    model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    sizes = {"meta": 0, "held": 0, "held_routed": 0}
    for name, parameter in model.named_parameters():
        sizes["meta" if parameter.is_meta else "held"] += parameter.nbytes
        if not parameter.is_meta and "routed_experts" in name and parameter.ndim > 1:
            sizes["held_routed"] += parameter.nbytes
    return sizes


def kernel(checkpoint: str, dtype: str) -> dict[str, Any]:
    """What a subset of experts computes, against all of them, and row by row."""
    path = Path(checkpoint)
    shape = vllm_api.describe(path)
    first, last = shape.moe_layers[0], shape.moe_layers[-1]
    everything = vllm_api.load_experts(path, {n: range(shape.num_experts) for n in shape.moe_layers}, dtype=dtype)
    some = vllm_api.load_experts(path, {first: [5, 2, 7], last: [3]}, dtype=dtype)
    whole, part = everything.layers[first], some.layers[first]
    torch.manual_seed(0)
    x = torch.randn(64, shape.hidden_size).to(whole.dtype)
    slots = torch.randint(0, 3, (64,), dtype=torch.int32)
    rows = part(x, slots)
    out = torch.empty_like(x)
    given = part(x, slots, out=out)
    by_one = torch.cat([part(x[i : i + 1], slots[i : i + 1]) for i in range(len(x))])
    by_seven = torch.cat([part(x[i : i + 7], slots[i : i + 7]) for i in range(0, len(x), 7)])
    again = everything.layers[last](x, torch.full((64,), 3, dtype=torch.int32))
    return {
        "subset_equals_whole": torch.equal(rows, whole(x, torch.tensor([5, 2, 7], dtype=torch.int32)[slots.long()])),
        "other_layer_equals": torch.equal(again, some.layers[last](x, torch.zeros(64, dtype=torch.int32))),
        "writes_out": given is out and torch.equal(rows, out),
        "row_alone_equals": torch.equal(rows, by_one) and torch.equal(rows, by_seven),
        "experts_differ": not torch.equal(part(x, torch.zeros_like(slots)), part(x, torch.ones_like(slots))),
        "input_untouched": torch.equal(x, (torch.manual_seed(0), torch.randn(64, shape.hidden_size))[1].to(x.dtype)),
        "num_layers": len(shape.moe_layers),
        "bytes": everything.bytes,
        "bytes_expected": shape.expert_bytes * shape.num_experts * len(shape.moe_layers),
        "bytes_some": some.bytes,
        "direct": part._write is not None,
        "std": rows.float().std().item(),
    }


def quantised(checkpoint: str, expert_dtype: str) -> dict[str, Any]:
    """Quantised experts of every layer against those of the checkpoint; a subset, and from the cache, against all."""
    path = Path(checkpoint)
    shape = vllm_api.describe(path)
    everything = {n: range(shape.num_experts) for n in shape.moe_layers}
    exact = vllm_api.load_experts(path, everything)
    whole = vllm_api.load_experts(path, everything, expert_dtype=expert_dtype)
    first = shape.moe_layers[0]
    some = vllm_api.load_experts(path, {first: [5, 2, 7]}, expert_dtype=expert_dtype)  # by now, all are in the cache
    torch.manual_seed(0)
    x = torch.randn(64, shape.hidden_size).to(exact.layers[first].dtype)
    slots = torch.randint(0, 3, (64,), dtype=torch.int32)
    of_all = torch.tensor([5, 2, 7], dtype=torch.int32)[slots.long()]
    distances = []
    for layer in shape.moe_layers:
        right = exact.layers[layer](x, of_all).float()
        distances.append(((whole.layers[layer](x, of_all).float() - right).norm() / right.norm()).item())
    return {
        "distance": max(distances),
        "wrong_expert": ((whole.layers[first](x, slots).float() - right).norm() / right.norm()).item(),
        "subset_equals_whole": torch.equal(some.layers[first](x, slots), whole.layers[first](x, of_all)),
        "memory": whole.bytes / exact.bytes,
    }


def mixed(checkpoint: str, letters: str) -> dict[str, Any]:
    """Experts of a layer in different dtypes: each one's distance from the checkpoint's; errors as measured beforehand
    and as made; which parts of measuring were reported, the first time and the second."""
    path = Path(checkpoint)
    shape = vllm_api.describe(path)
    parts: list[float] = []
    again: list[float] = []
    errors, shapes = vllm_api.measure_errors(path, progress=parts.append)
    assert vllm_api.measure_errors(path, progress=again.append) == (errors, shapes)
    first, everything = shape.moe_layers[0], {n: range(shape.num_experts) for n in shape.moe_layers}
    chosen = dict.fromkeys(shape.moe_layers, letters)
    exact = vllm_api.load_experts(path, everything).layers[first]
    whole = vllm_api.load_experts(path, everything, expert_letters=chosen).layers[first]
    some = vllm_api.load_experts(path, {first: [5, 2, 7]}, expert_letters=chosen).layers[first]
    x = torch.randn(64, shape.hidden_size, generator=torch.Generator().manual_seed(0)).to(exact.dtype)
    distances = []
    for expert, letter in enumerate(letters):
        slots = torch.full((64,), expert, dtype=torch.int32)
        right = exact(x, slots).float()
        distances.append((letter, ((whole(x, slots).float() - right).norm() / right.norm()).item()))
    slots = torch.arange(64, dtype=torch.int32) % 3
    of_all = torch.tensor([5, 2, 7], dtype=torch.int32)[slots.long()]
    cache = ExpertCache(path, identity(path), "auto")
    made = [(n, e, KINDS[letter]) for n in shape.moe_layers for e, letter in enumerate(letters)]
    found = [(errors[n][kind][e], cache.read(shapes[n], kind, n, e)) for n, e, kind in made]
    try:
        vllm_api.load_experts(path, everything, expert_letters={first: letters[1:]})
        refusal = ""
    except ValueError as e:
        refusal = str(e)
    return {
        "distances": distances,
        "subset_equals_whole": torch.equal(some(x, slots), whole(x, of_all)),
        "errors": [(measured, kept[1]) for measured, kept in found if kept is not None],
        "parts": parts,
        "again": again,
        "refusal": refusal,
    }


def refusals(checkpoint: str) -> dict[str, str]:
    """The messages of what must not be done. Layer 1 is a mixture of experts, layer 0 is not."""
    path = Path(checkpoint)
    kernel = vllm_api.load_experts(path, {1: [4, 6]}).layers[1]
    x = torch.zeros(2, kernel.hidden_size, dtype=kernel.dtype)
    attempts: dict[str, Callable[[], object]] = {
        "slot_high": lambda: kernel(x, torch.tensor([0, 2], dtype=torch.int32)),
        "slot_negative": lambda: kernel(x, torch.tensor([-1, 0], dtype=torch.int32)),
        "dense_layer": lambda: vllm_api.load_experts(path, {0: [0]}),
        "no_such_expert": lambda: vllm_api.load_experts(path, {1: [8]}),
        "twice": lambda: vllm_api.load_experts(path, {1: [3, 3]}),
    }
    messages = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            messages[name] = "nothing was raised"
        except ValueError as error:
            messages[name] = str(error)
    return messages


def engine_ignores_expert_bytes(checkpoint: str) -> dict[str, int]:
    """How many tensors of routed experts the model was given, and how many of them had data."""
    from folkmoot.experts.vllm_api import checkpoint as names
    from folkmoot.experts.vllm_api import engine

    counts = {"tensors_given": 0, "tensors_with_data": 0}
    plain = engine.DispatchingLoader.get_all_weights

    def counting(self: Any, *args: Any) -> Any:
        for name, tensor in plain(self, *args):
            counts["tensors_given"] += names.is_routed(name)
            counts["tensors_with_data"] += names.is_routed(name) and not tensor.is_meta
            yield name, tensor

    engine.DispatchingLoader.get_all_weights = counting  # type: ignore[method-assign]
    vllm_api.install(lambda: InProcessDispatcher([], []))
    load(checkpoint, "bfloat16")
    return counts


def order_of_events(checkpoint: str) -> list[str]:
    """What a dispatcher sees happen, over one short generation."""
    events: list[str] = []

    class Recorder:
        def forward(
            self, layer: int, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, shared: Any
        ) -> tuple[torch.Tensor, torch.Tensor | None]:
            events.append("away")
            events.append("shared" if shared is not None and shared().shape == x.shape else "no shared experts")
            events.append("back")
            return torch.zeros_like(x), None

    vllm_api.install(Recorder)
    generate(load(checkpoint, "bfloat16"), 2)
    return events


def idle(checkpoint: str) -> dict[str, float]:
    """What a loaded host costs while it waits."""
    kernel = vllm_api.load_experts(Path(checkpoint), {0: range(8)}).layers[0]
    kernel(torch.zeros(4, kernel.hidden_size, dtype=kernel.dtype), torch.zeros(4, dtype=torch.int32))
    return waiting()


def idle_engine(checkpoint: str) -> dict[str, float]:
    """What an engine costs while it waits; afterwards a model can still be built, and the groups be closed."""
    from vllm.distributed import parallel_state

    dispatcher = InProcessDispatcher([], [])
    vllm_api.install(lambda: dispatcher)
    llm = load(checkpoint, "bfloat16")
    held = {layer: range(8) for layer in vllm_api.describe(Path(checkpoint)).moe_layers}
    dispatcher.hosts, dispatcher.slots = [vllm_api.load_experts(Path(checkpoint), held)], [held]
    generate(llm, 2)
    facts = {"calls": dispatcher.calls, **waiting()}
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()
    return facts


def waiting() -> dict[str, float]:
    """Threads of gloo in this process, and the share of a core that it uses in two seconds of doing nothing."""
    names = [Path(f"/proc/self/task/{t}/comm").read_text() for t in os.listdir("/proc/self/task")]
    before_s = time.process_time()
    time.sleep(2)
    used_s = time.process_time() - before_s
    return {"gloo_threads": sum("gloo" in n for n in names), "cpu_fraction": used_s / 2}


def plugin(environment: dict[str, str]) -> str:
    """Which loader serves the default load format once vLLM has loaded its plugins."""
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER
    from vllm.plugins import load_general_plugins

    os.environ.update(environment)
    load_general_plugins()
    return str(_LOAD_FORMAT_TO_MODEL_LOADER["auto"].__name__)


def private_names() -> list[str]:
    return vllm_api.broken_names()


def broken_private_names() -> list[str]:
    from folkmoot.experts.vllm_api.private import PrivateName

    apply = "vllm.model_executor.layers.fused_moe.fused_moe_method_base.FusedMoEMethodBase.apply"
    return vllm_api.broken_names(
        [
            PrivateName("vllm.no_such_module.Thing"),
            PrivateName("vllm.config.NoSuchConfig"),
            PrivateName("vllm.config.CompilationConfig", members=("no_such_member",)),
            PrivateName(apply, ("topk_weights", "x")),
        ]
    )


def main() -> None:
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="WARNING", HF_HUB_OFFLINE="1")
    vllm_api.preimport()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM and its kernels print to stdout as they like
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            try:
                answer = {"ok": True, "result": globals()[request["function"]](**request["arguments"])}
            except BaseException:
                answer = {"ok": False, "error": traceback.format_exc()}
            print(json.dumps(answer), file=answers, flush=True)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        if status:
            print(json.dumps({"ok": False, "error": f"the child died: wait status {status}"}), file=answers, flush=True)


if __name__ == "__main__":
    main()
