"""This file is the price of what happens once per step: exchange of gradients and parameters, and the optimizer."""

from functools import lru_cache

from meshes.platform import Platform
from models import cost
from models.config import ModelConfig
from piperjax.planner.network import Group, all_gather, axis_group, reduce_scatter
from piperjax.planner.plan import Plan
from piperjax.planner.work import FLOAT32_BYTES


def step_end_seconds(
    model: ModelConfig, plan: Plan, platform: Platform, *, dtype: str = "bfloat16"
) -> tuple[float, float]:
    """Seconds once per step: exchange of gradients and parameters, and the optimizer, on the rank with most of them.

    Gradients are reduce-scattered in float32, the optimizer works on a device's share (ZeRO-1), and parameters are
    gathered in the compute dtype: of experts along data, of everything else along data and expert. What devices that
    share cores copy for it counts as the optimizer's.
    """
    device = platform.device
    batch, data = axis_group(plan, "batch"), axis_group(plan, "data")
    exchange = optimizer = 0.0
    for own, experts in _parameters_by_rank(model, plan.layers_per_stage, plan.stages_of_rank):
        shared = experts / plan.expert
        seconds = _reduced(platform, batch, own, dtype) + _reduced(platform, data, shared, dtype)
        exchange = max(exchange, seconds)
        share = own / batch.size + shared / data.size
        # Read: gradient, master, two moments; written: the last three. Before it accumulators are zeroed, and the
        # compute copy is cast.
        num_bytes = 7 * FLOAT32_BYTES * share + (FLOAT32_BYTES + itemsize_of(dtype)) * (own + shared)
        seconds = device.stream_seconds(num_bytes) + _layout_seconds(
            platform, dtype, (batch, own), (data, shared)
        )
        optimizer = max(optimizer, seconds)
    return exchange, optimizer


def itemsize_of(dtype: str) -> int:
    """Bytes of an activation where products are in `dtype`."""
    return {"float64": 8, "float32": FLOAT32_BYTES}.get(dtype, 2)


@lru_cache(maxsize=1024)
def _parameters_by_rank(
    model: ModelConfig, layers_per_stage: tuple[int, ...], stages_of_rank: tuple[tuple[int, ...], ...]
) -> tuple[tuple[float, float], ...]:
    """What pipe ranks hold, each different case once: parameters outside the routed experts, and of these."""
    counted = cost.parameters(model)
    outer = (counted.embedding + counted.head) / len(stages_of_rank)
    first = [0]
    for count in layers_per_stage:
        first.append(first[-1] + count)
    held = set()
    for stages in stages_of_rank:
        layers = [
            counted.layers[index] for stage in stages for index in range(first[stage], first[stage + 1])
        ]
        experts = sum(layer.experts for layer in layers)
        held.add((outer + sum(layer.total for layer in layers) - experts, experts))
    return tuple(sorted(held))


def _layout_seconds(platform: Platform, dtype: str, *exchanged: tuple[Group, float]) -> float:
    """Seconds of the copies around exchanges of so many parameters in a group, on simulated devices.

    XLA's CPU collectives want the dimension that is split outermost, and parameters are split along a wide one: whole
    gradients and a share of them are brought into another layout, and a share and all of the parameters.
    """
    if platform.device.concurrent_devices is None:
        return 0.0
    copied = sum(parameters * (1 + 1 / group.size) for group, parameters in exchanged if group.size > 1)
    num_bytes = 2 * (FLOAT32_BYTES + itemsize_of(dtype)) * copied  # read and written
    return platform.device.elementwise_seconds("layout", num_bytes)


def _reduced(platform: Platform, group: Group, parameters: float, dtype: str) -> float:
    if group.size == 1 or not parameters:
        return 0.0
    gradients = reduce_scatter(platform, group, parameters * FLOAT32_BYTES).seconds
    return gradients + all_gather(platform, group, parameters * itemsize_of(dtype)).seconds
