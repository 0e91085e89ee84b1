"""Engines and expert hosts to measure: real processes forked by real warm parents, without Ray, queue or gateway.

`Bench` starts them; an engine is vLLM's `LLM` in a process of its own that answers requests over its control channel,
monolithic or with its routed experts on the hosts of a pool.
"""

import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from folkmoot.cluster.placement import HostSlot, rebalance
from folkmoot.experts import expert_map as em
from folkmoot.experts import secret, vllm_api, warm
from folkmoot.experts.dispatcher import Dispatcher
from folkmoot.experts.expert_map import ExpertMap, HostAddress
from folkmoot.experts.warm import Child, Control

LOAD_TIMEOUT_S = 300.0
KV_CACHE_BYTES = 1 << 30
FULL_LOGITS: dict[str, Any] = {"logprobs_mode": "raw_logits", "max_logprobs": -1}
PLAIN: dict[str, Any] = {
    "enforce_eager": True,
    "kv_cache_memory_bytes": KV_CACHE_BYTES,
    "enable_prefix_caching": False,
    "seed": 0,
}
"""Arguments to vLLM's LLM that hold unless a benchmark says otherwise; None leaves one to vLLM."""


def engine_main(spec: dict[str, Any], control: Control) -> None:
    """Entry point of an engine's process. Loads, says {"load_s"}, then answers {"op": ...} until the owner is gone."""
    os.environ.update(spec["environment"])
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="WARNING")
    if spec["dispatch"] is not None:
        os.environ["FOLKMOOT_DISPATCH"] = json.dumps(spec["dispatch"])
    from vllm import LLM

    from folkmoot.experts.vllm_api.runtime import register_eagerly

    began = time.monotonic()
    register_eagerly(vllm_api.describe(Path(spec["checkpoint"])).architecture)
    hosted = {} if spec["dispatch"] is None else vllm_api.engine_arguments()
    if spec["dispatch"] is not None and spec["dispatch"].get("micro_batches"):
        vllm_api.use_micro_batches(2)
    if hosted:
        os.environ.update(vllm_api.batch_invariance("cpu", None))
    arguments = {**PLAIN, **hosted, **spec["arguments"]}
    llm = LLM(spec["checkpoint"], **{name: value for name, value in arguments.items() if value is not None})
    control.send({"load_s": time.monotonic() - began})
    while True:
        request = control.receive()
        assert request is not None
        control.send(OPERATIONS[request.pop("op")](llm, **request))


def generate(
    llm: Any, prompts: list[list[int]], max_tokens: int, logprobs: int | None, ignore_eos: bool
) -> dict[str, Any]:
    """Greedy answers to prompts of token ids: tokens, seconds, and the top log-probabilities where asked for."""
    from vllm import SamplingParams, TokensPrompt

    parameters = SamplingParams(
        temperature=0.0, max_tokens=max_tokens, logprobs=logprobs, ignore_eos=ignore_eos, detokenize=False
    )
    began = time.monotonic()
    outputs = llm.generate([TokensPrompt(prompt_token_ids=p) for p in prompts], parameters, use_tqdm=False)
    seconds = time.monotonic() - began
    answer: dict[str, Any] = {"seconds": seconds, "tokens": [list(o.outputs[0].token_ids) for o in outputs]}
    if logprobs:
        answer["logprobs"] = [
            [{str(t): p.logprob for t, p in step.items()} for step in o.outputs[0].logprobs] for o in outputs
        ]
    return answer


def logits(llm: Any, prompts: list[list[int]], max_tokens: int, path: str) -> dict[str, Any]:
    """Greedy answers, and the raw logits of every step, float32 [prompts, steps, vocabulary], saved at `path`."""
    from vllm import SamplingParams, TokensPrompt

    parameters = SamplingParams(temperature=0.0, max_tokens=max_tokens, logprobs=-1, ignore_eos=True, detokenize=False)
    outputs = llm.generate([TokensPrompt(prompt_token_ids=p) for p in prompts], parameters, use_tqdm=False)
    steps = [o.outputs[0].logprobs for o in outputs]
    values = np.full((len(prompts), max_tokens, len(steps[0][0])), np.nan, np.float32)
    for i, answer in enumerate(steps):
        for j, step in enumerate(answer):
            values[i, j, list(step)] = [entry.logprob for entry in step.values()]
    np.save(path, values)
    return {"tokens": [list(o.outputs[0].token_ids) for o in outputs]}


def use_map(_: Any, expert_map: str) -> dict[str, Any]:
    """Switch a running engine to another expert map."""
    from folkmoot.experts.vllm_api.engine import current_dispatcher

    dispatcher = current_dispatcher()
    assert isinstance(dispatcher, Dispatcher)
    dispatcher.use_map(ExpertMap.from_json(expert_map))
    return {}


def memory(_: Any) -> dict[str, int]:
    """Bytes of this process: resident, its proportional share (pss), and what is its alone (private)."""
    fields = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, value, *_ = line.split()
        fields[name.rstrip(":")] = int(value) * 1024
    private = fields["Private_Clean"] + fields["Private_Dirty"]
    return {"resident": fields["Rss"], "pss": fields["Pss"], "private": private}


OPERATIONS: dict[str, Callable[..., dict[str, Any]]] = {
    "generate": generate,
    "logits": logits,
    "map": use_map,
    "memory": memory,
}


@dataclass
class Engine:
    """One engine's process, seen from the benchmark."""

    child: Child
    load_s: float = 0.0

    def wait(self) -> "Engine":
        """Wait until it has loaded."""
        self.load_s = float(self._answer()["load_s"])
        return self

    def generate(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, logprobs: int | None = None, ignore_eos: bool = True
    ) -> dict[str, Any]:
        """Greedy answers: {"seconds", "tokens", "logprobs"}."""
        self.start(prompts, max_tokens, logprobs, ignore_eos)
        return self._answer()

    def start(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, logprobs: int | None = None, ignore_eos: bool = True
    ) -> None:
        """The same without waiting; `finish` waits."""
        self.child.send(
            {"op": "generate", "prompts": [list(p) for p in prompts], "max_tokens": max_tokens, "logprobs": logprobs,
             "ignore_eos": ignore_eos}
        )  # fmt: skip

    def finish(self) -> dict[str, Any]:
        """The answer to `start`."""
        return self._answer()

    def logits(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, path: Path
    ) -> tuple[list[list[int]], "np.ndarray[Any, np.dtype[np.float32]]"]:
        """Greedy tokens and raw logits [prompts, steps, vocabulary]. The engine needs `**FULL_LOGITS` arguments."""
        self.child.send({"op": "logits", "prompts": prompts, "max_tokens": max_tokens, "path": str(path)})
        tokens = self._answer()["tokens"]
        return tokens, np.load(path)

    def use_pool(self, pool: "Pool", version: int) -> None:
        """Switch to another pool, under a map version above all that it had."""
        self.child.send({"op": "map", "expert_map": replace(pool.expert_map, version=version).to_json()})
        self._answer()

    def memory(self) -> dict[str, int]:
        """Bytes in use: {"resident", "pss", "private"}."""
        self.child.send({"op": "memory"})
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self.child.kill()
        self.child.wait(10)
        self.child.control.close()

    def _answer(self) -> dict[str, Any]:
        answer = self.child.receive(LOAD_TIMEOUT_S)
        if answer is None or answer.get("event") == "error":
            raise RuntimeError(f"engine {self.child.pid}: {answer}")
        return answer


@dataclass
class Pool:
    """Expert hosts that hold all experts of a checkpoint."""

    checkpoint: Path
    expert_map: ExpertMap
    children: dict[str, Child]
    bytes: int
    """of all experts in memory; what hosts share counts once"""
    load_s: list[float]
    directory: Path

    def dispatch(self, **settings: object) -> dict[str, object]:
        """A dispatch configuration for an engine that uses this pool. It reads the map at its first forward pass, so
        each pool needs a file of its own."""
        path = self.directory / f"map-{next(iter(self.children.values())).pid}-{self.expert_map.version}.json"
        path.write_text(self.expert_map.to_json())
        secret_file = str(secret.keep(self.directory / "secret"))
        return {"engine": "bench", "secret_file": secret_file, "map_path": str(path), **settings}

    def close(self) -> None:
        """End the hosts."""
        for child in self.children.values():
            child.kill()
            child.wait(10)
            child.control.close()


@dataclass
class Bench:
    """A context in which engines and pools are started, and ended when it closes."""

    _stack: ExitStack = field(default_factory=ExitStack)
    _parents: dict[tuple[tuple[str, str], ...], Path] = field(default_factory=dict)

    def __enter__(self) -> "Bench":
        self.directory = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="fm-")))
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    def begin_parent(self, environment: Mapping[str, str] | None = None) -> Path:
        """Start a warm parent, unless it is started, without waiting: its socket. Two import as fast as one where there
        are two cores."""
        variables = warm.OPENMP if environment is None else environment
        key = tuple(sorted(variables.items()))
        if key not in self._parents:
            path = self.directory / f"warm{len(self._parents)}.sock"
            process = warm.start(path, path.with_suffix(".log"), environment=variables)
            self._stack.callback(process.wait, 10)
            self._stack.callback(process.terminate)
            self._parents[key] = path
        return self._parents[key]

    def parent(self, environment: Mapping[str, str] | None = None) -> warm.WarmParent:
        """A warm parent with these variables beside the defaults: OpenMP reads its own when it is loaded.

        None stands for Folkmoot's own settings, an empty mapping for vLLM's.
        """
        return warm.connect(self.begin_parent(environment))

    def engine(
        self,
        checkpoint: Path,
        *,
        pool: Pool | None = None,
        openmp: Mapping[str, str] | None = None,
        environment: Mapping[str, str] | None = None,
        dispatch: Mapping[str, object] | None = None,
        **arguments: object,
    ) -> Engine:
        """Start an engine, monolithic without a pool; call `wait` on it. `arguments` go to vLLM's LLM over PLAIN."""
        spec = {
            "checkpoint": str(checkpoint),
            "dispatch": None if pool is None else pool.dispatch(**(dispatch or {})),
            "environment": dict(environment or {}),
            "arguments": {"max_model_len": 512, "max_num_seqs": 64, **arguments},
        }
        parent = self.parent({} if pool is None and openmp is None else openmp)
        return self.adopt(parent.spawn("benchmarks.engines:engine_main", spec, self.directory / "engine.log"))

    def adopt(self, child: Child) -> Engine:
        """A process that answers as an engine does, ended with the others."""
        engine = Engine(child)
        self._stack.callback(engine.close)
        return engine

    def pool(
        self,
        checkpoint: Path,
        num_hosts: int = 2,
        replicas: int = 1,
        *,
        dtype: str = "auto",
        openmp: Mapping[str, str] | None = None,
        share_weights: bool = True,
        **settings: object,
    ) -> Pool:
        """Start hosts that together hold `replicas` replicas of every expert. `settings` go to each HostSpec."""
        shape = vllm_api.describe(checkpoint)
        names = [f"h{i}" for i in range(num_hosts)]
        plan = rebalance([replicas] * shape.num_experts, [HostSlot(n, "node") for n in names], {})
        expert_map, children, size = em.empty(shape.moe_layers, shape.num_experts), {}, 0.0
        load_s = []
        started = time.time_ns()
        for name in names:
            spec = {
                "host": name,
                "incarnation": time.time_ns(),
                "checkpoint": str(checkpoint),
                "experts": {str(n): list(plan[name]) for n in shape.moe_layers},
                "unix_path": str(self.directory / f"{name}-{started}.sock"),
                "secret_file": str(secret.keep(self.directory / "secret")),
                "tcp": "127.0.0.1:0",
                "dtype": dtype,
                **settings,
            }
            children[name] = self.parent(openmp).spawn(
                "folkmoot.experts.host:main", spec, self.directory / "host.log",
                memory=f"{checkpoint} {dtype} {settings.get('expert_dtype')}" if share_weights else None,
            )  # fmt: skip
        for name, child in children.items():
            ready = child.receive(LOAD_TIMEOUT_S)
            if ready is None or ready["event"] != "ready":
                raise RuntimeError(f"host {name}: {ready}")
            size += ready["bytes"] - ready["shared_bytes"] + ready["shared_bytes"] / replicas
            load_s.append(float(ready["load_s"]))
            placed = dict.fromkeys(shape.moe_layers, plan[name])
            expert_map = em.add_host(expert_map, HostAddress(**ready["address"]), placed)
        pool = Pool(checkpoint, expert_map, children, round(size), load_s, self.directory)
        self._stack.callback(pool.close)
        return pool


def prompts_of(num: int, length: int, vocabulary: int, seed: int = 0) -> list[list[int]]:
    """`num` prompts of `length` random token ids."""
    rng = random.Random(seed)
    return [[rng.randrange(8, vocabulary) for _ in range(length)] for _ in range(num)]
