"""The autoscaler's shell on a real store, with a clock of its own; and Ray Serve's side of it, as Serve loads it."""

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

import pytest

from folkmoot.cluster.autoscale import Limits
from folkmoot.cluster.autoscaler import Autoscaler
from folkmoot.cluster.ray_runtime import _number
from folkmoot.cluster.router_events import HostLoad, Wished, apply
from folkmoot.cluster.router_state import EngineState, RouterState
from folkmoot.cluster.spec import ClusterSpec
from folkmoot.cluster.wish import Wish
from folkmoot.gateway.demand import Demands
from folkmoot.gateway.embedded import EmbeddedStore
from folkmoot.gateway.pb import gateway_pb2 as pb
from folkmoot.gateway.queue import RequestQueue, Submission
from folkmoot.gateway.store import Store
from tests.cluster.test_operations import running

SPEC = ClusterSpec(
    name="test", model_path="", model="m", architecture="", moe_layers=(0,), num_experts=4, redis="", run_dir="/run-1",
    store_namespace="t", log_dir="", engines=0, most_engines=4, idle_s=30.0,
)  # fmt: skip


@dataclass
class World:
    """A router's state that the test changes, and the autoscaler under test."""

    store: Store
    state: RouterState = field(default_factory=lambda: running(replicas=1, hosts=2))
    now_s: float = 1000.0

    def __post_init__(self) -> None:
        wish = replace(self.state.wish, engines=0, most_engines=4)
        self.state = replace(self.state, wish=wish)
        self.scaler = self.new()

    def new(self) -> Autoscaler:
        """As a restarted router would make it."""
        return Autoscaler(SPEC, self.store, lambda: self.state, self.change)

    async def change(self, wish: Wish) -> None:
        self.state = apply(Wished(wish), self.state)

    def engines(self, ready: int, tokens: int = 0) -> None:
        """So many are ready, and each has made so many tokens."""
        made = {f"e{n}": EngineState(f"e{n}", "ready", info={"generated_tokens": tokens}) for n in range(ready)}
        self.state = replace(self.state, engines=MappingProxyType(made))

    async def look(self, after_s: float = 1.0) -> int | None:
        self.now_s += after_s
        await self.scaler._look(self.now_s)
        return self.scaler.engines


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    with EmbeddedStore(tmp_path / "store") as server:
        store = Store(server.url, "t")
        yield World(store)
        await store.close()


async def test_one_engine_first_then_none_then_one_for_a_request(world: World) -> None:
    queue, demands = RequestQueue(world.store), Demands(world.store)
    assert world.scaler.engines is None, "nothing is known before the first look"
    assert [await world.look(60.0) for _ in range(3)] == [1, 1, 1], "until an engine has been ready"
    world.engines(1)
    assert await world.look() == 1
    assert await world.look(29.0) == 1
    assert [await world.look(100.0) for _ in range(3)][-1] == 0, "idle for longer, and than a start took"
    world.engines(0)
    scaling = await demands.scaling()
    assert scaling is not None and scaling.accepts and scaling.wanted == 0 and scaling.start_s > 100
    request = pb.GenerateRequest(model="m", request_id="r")
    await queue.submit(Submission("r", "m", request, 50, 600.0, 0.0))
    assert await world.look() == 1
    document = json.loads(json.dumps(world.scaler.document()))
    assert (document["least"], document["most"], document["wanted"]) == (0, 4, 1)
    assert "interactive work needs 1" in document["reason"]


async def test_a_restarted_router_knows_what_was_measured(world: World) -> None:
    world.engines(1)
    await world.look()
    await Demands(world.store).owe("m", "batch:x", 1e6)
    for tokens in range(0, 4000, 100):
        world.engines(1, tokens)
        await world.look()
    world.engines(1, 3900 + 1100)
    await world.look(11.0)
    again = world.new()
    await again._load()
    again_speed, speed = again.document()["engine_tokens_per_s"], world.scaler.document()["engine_tokens_per_s"]
    assert again_speed == pytest.approx(speed, rel=0.2) and speed == pytest.approx(100.0, rel=0.1)
    await Demands(world.store).owe("m", "batch:x", 0)
    world.scaler, world.now_s = again, world.now_s + 1000
    world.engines(0)
    assert await world.look() == 0, "and starts no engine to see whether the model loads"


async def test_with_a_fixed_number_it_only_measures(world: World) -> None:
    await world.look()
    world.state = replace(world.state, wish=replace(world.state.wish, engines=2, most_engines=None))
    assert await world.look() == 2
    assert await Demands(world.store).scaling() is None


async def test_hosts_follow_the_busiest_within_limits(world: World) -> None:
    async def work(seconds: float) -> int:
        """All hosts compute for this part of 10 s; how many are wished for then."""
        world.now_s += 10.0
        for host in list(world.state.hosts.values()):
            if (life := host.serving) is not None:
                load = HostLoad(host.host, life.incarnation, life.requests + 10, 100, life.busy_s + seconds)
                world.state = apply(load, world.state)
        await world.scaler._look_at_experts(world.now_s)
        return len(world.state.wish.open_hosts)

    assert [await work(9.0) for _ in range(3)] == [2, 2, 2], "nobody has allowed more"
    world.state = replace(world.state, wish=replace(world.state.wish, host_limits=(2, 3)))
    assert await work(9.0) == 3
    assert await work(9.0) == 3, "nothing more while the third host comes"
    assert "host-" in world.scaler.document()["hosts_reason"]


def test_serve_gets_our_policy_as_it_can_load_it() -> None:
    options = _number(SPEC, Limits(0, 4), 1)
    config = options["autoscaling_config"]
    assert (config.min_replicas, config.max_replicas, config.initial_replicas) == (0, 4, 1)
    policy = config.policy.get_policy()(**config.policy.policy_kwargs)  # as Serve's controller does

    class Context:
        target_num_replicas = 3

    assert policy(Context()) == (3, {}), "while the router has not been heard nothing changes"
    policy._heard.engines, policy._heard.at_s = 2, float("inf")
    assert policy(Context()) == (2, {})
    policy._heard.at_s = float("-inf")
    assert policy(Context()) == (3, {}), "what was heard long ago does not count"
    assert _number(SPEC, Limits(2, 2), None) == {"num_replicas": 2, "autoscaling_config": None}
