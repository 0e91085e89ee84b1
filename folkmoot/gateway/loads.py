"""The load of a model as clients see it: of both lanes, and of the tenants with the most in each."""

from dataclasses import asdict

from folkmoot.gateway.keys import LANES
from folkmoot.gateway.pb import gateway_pb2 as pb
from folkmoot.gateway.queue import PB_LANE, Load, RequestQueue

MAX_TENANTS = 10


async def lane_loads(queue: RequestQueue, model: str) -> list[pb.LaneLoad]:
    """One entry a lane, interactive first. Raises StoreError."""
    lanes = []
    for lane in LANES:
        tenants = await queue.tenant_loads(model, lane, MAX_TENANTS)
        lanes.append(
            pb.LaneLoad(
                lane=PB_LANE[lane],
                load=_message(await queue.lane_load(model, lane)),
                tenants=[pb.TenantLoad(tenant=name, load=_message(load)) for name, load in tenants.items()],
            )
        )
    return lanes


def total(lanes: list[pb.LaneLoad]) -> pb.QueueLoad:
    """All lanes together."""
    loads = [Load(**{f.name: v for f, v in lane.load.ListFields()}) for lane in lanes]
    return _message(sum(loads, Load()))


def _message(load: Load) -> pb.QueueLoad:
    return pb.QueueLoad(**asdict(load))
