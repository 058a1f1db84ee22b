"""This file is the price of what happens once per step: exchange of gradients and parameters, and the optimizer."""

from functools import lru_cache

from meshes.platform import Platform
from models import cost
from models.config import ModelConfig
from piperjax.planner.network import Group, all_gather, axis_group, reduce_scatter
from piperjax.planner.plan import Plan
from piperjax.planner.work import FLOAT32_BYTES, GRADIENT_BYTES


def step_end_seconds(
    model: ModelConfig, plan: Plan, platform: Platform, *, dtype: str = "bfloat16"
) -> tuple[float, float]:
    """Seconds once per step: exchange of gradients and parameters, and the optimizer, on the rank with most of them.

    Gradients are reduce-scattered in the dtype they were added up in, the optimizer works on a device's share (ZeRO-1),
    and parameters are gathered in the compute dtype: of experts along data, of everything else along data and expert.
    What devices that share cores copy for it counts as the optimizer's.
    """
    device = platform.device
    batch, data = axis_group(plan, "batch"), axis_group(plan, "data")
    gradient, itemsize = GRADIENT_BYTES[plan.gradient_dtype], itemsize_of(dtype)
    exchange = optimizer = 0.0
    for own, experts in _parameters_by_rank(model, plan.layers_per_stage, plan.stages_of_rank):
        shared = experts / plan.expert
        sizes = gradient, itemsize
        seconds = _reduced(platform, batch, own, sizes) + _reduced(platform, data, shared, sizes)
        exchange = max(exchange, seconds)
        share = own / batch.size + shared / data.size
        # Read: gradient, master, two moments; written: the last three. Before it accumulators are zeroed, and the
        # compute copy is cast.
        num_bytes = (gradient + 6 * FLOAT32_BYTES) * share + (gradient + itemsize) * (own + shared)
        copies = _layout_seconds(platform, sizes, (batch, own), (data, shared))
        optimizer = max(optimizer, device.stream_seconds(num_bytes) + copies)
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


def _layout_seconds(platform: Platform, sizes: tuple[int, int], *exchanged: tuple[Group, float]) -> float:
    """Seconds of the copies around exchanges of so many parameters in a group, on simulated devices; sizes likewise.

    XLA's CPU collectives want the dimension that is split outermost, and parameters are split along a wide one: whole
    gradients and a share of them are brought into another layout, and a share and all of the parameters.
    """
    if platform.device.concurrent_devices is None:
        return 0.0
    copied = sum(parameters * (1 + 1 / group.size) for group, parameters in exchanged if group.size > 1)
    num_bytes = 2 * sum(sizes) * copied  # read and written
    return platform.device.elementwise_seconds("layout", num_bytes)


def _reduced(platform: Platform, group: Group, parameters: float, sizes: tuple[int, int]) -> float:
    """Seconds to reduce gradients and to gather parameters, given the bytes of an element of each."""
    if group.size == 1 or not parameters:
        return 0.0
    gradient, itemsize = sizes
    gradients = reduce_scatter(platform, group, parameters * gradient).seconds
    return gradients + all_gather(platform, group, parameters * itemsize).seconds
