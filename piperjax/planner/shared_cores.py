"""This file is the time of a step where simulated devices share the cores of their host.

Work is conserved: what all devices of a host compute takes as long as its cores need for it, whoever waits for whom,
and a device that idles in a bubble leaves its part to the others. So bubbles cost nothing until fewer devices work
than the cores could serve. Exchanges are copies in the same memory, measured with all devices at it, so their seconds
are those of everybody already. All devices of the mesh are taken to be on one host.
"""

from collections.abc import Mapping
from typing import Any

from meshes.platform import Platform
from piperjax.planner.plan import Plan
from piperjax.schedules.timeline import ActionCosts


def on_shared_cores(
    parts: Mapping[str, float], plan: Plan, platform: Platform, costs: ActionCosts, *, head_exchange: float
) -> dict[str, float]:
    """Parts of a step, of all devices of a host together, from the parts of a rank that had its own hardware.

    Args:
      parts: of the busiest pipe rank, as if it had all cores for itself; they add up to the schedule's time.
      plan: the plan.
      platform: its devices say how many of them compute at once.
      costs: seconds of every action, of a device that works alone.
      head_exchange: seconds of exchanges in embedding, head and their gradients, per microbatch.
    """
    M = plan.num_microbatches
    splits = any(action.kind == "W" for action in plan.build_schedule().ranks[0])
    backward = [costs.input_gradient, costs.weight_gradient] if splits else [costs.backward]
    layers = sum(sum(stages) for stages in (costs.forward, *backward)) / plan.pipe
    exchange = sum(sum(stages) for stages in (costs.exposed_forward, costs.exposed_backward)) / plan.pipe
    outer = costs.embedding + costs.head + costs.embedding_gradient - head_exchange
    everybody = 1 if plan.vocabulary == "split" else 1 / plan.pipe
    shared = {
        "compute": at_once(platform, plan.num_devices * M * layers),
        "exposed_all_to_all": M * exchange,
        "head": at_once(platform, plan.num_devices * M * outer * everybody) + M * head_exchange,
        "pipeline_transfer": parts["pipeline_transfer"],
    }
    return shared | {"bubble": max(0.0, sum(parts.values()) - sum(shared.values()))}


def fresh_seconds(platform: Platform, num_devices: int, taken_bytes: Any) -> Any:
    """Seconds of the first touch of memory that a step takes on every device; numbers or arrays.

    An operating system hands memory out page by page, when it is first written, and clears it.
    """
    rate = platform.device.fresh_bytes_per_second
    return 0.0 * taken_bytes if rate is None else at_once(platform, num_devices * taken_bytes / rate)


def at_once(platform: Platform, total_seconds: Any) -> Any:
    """Seconds that the cores of a host need for the work of all its devices; numbers or arrays."""
    return platform.device.together_seconds(0.0, total_seconds)
