"""This file is the seconds that exchanges add to the computation of a layer: what is repeated, and what is hidden."""

from typing import Any, NamedTuple

from meshes.platform import Platform
from piperjax.planner.dispatchers import named
from piperjax.planner.network import Stages, dispatch_stages

# Part of what an exchange beside products could save that is saved, apart from what it takes from them
# (`Device.interference_fraction`). The program makes it possible (benchmarks/overlap.py). Measured on MI300X with copy
# engines, which leave compute units alone: 0.72 of the ideal on average (arXiv 2412.14335).
HIDDEN_FRACTION = 0.7
GATE_BYTES = 4


class Exchanges(NamedTuple):
    """Seconds of the exchanges of one layer.

    Attributes:
      once: of a forward, there and back.
      back: of their gradients.
      there: what of a forward is repeated to run backward.
    """

    once: float
    back: float
    there: float

    def again(self, memory_mode: str) -> float:
        """What backward repeats of those of forward."""
        return {"stage": self.once + self.there, "layer": self.there}.get(memory_mode, 0.0)


def static_exchanges(
    platform: Platform, *, chunks: int, forward: float, backward: float, **exchange: Any
) -> Exchanges:
    """Those of our executor, whose experts weigh: rows go there with their gates, whose gradients return.

    Args:
      platform: the machine.
      chunks: parts in which tokens travel.
      forward, backward: seconds of products of experts beside which they do, for their results and for gradients.
      exchange: other arguments of `dispatch_stages`; the tokens are those of one chunk.
    """
    stages = dispatch_stages(platform, **exchange)
    once, back = (exposed_seconds(platform, stages, chunks, seconds) for seconds in (forward, backward))
    gates = 0.0
    if not named(exchange["dispatcher"]).deduplicates:  # Once per node they are in the message of the rows.
        alone = dispatch_stages(platform, **exchange | dict(row_bytes=GATE_BYTES))
        gates = chunks * float(alone.beside.seconds)
    return Exchanges(once + gates, back + gates, once / 2 + gates)


def exposed_seconds(platform: Platform, stages: Stages, chunks: int, experts_seconds: float) -> float:
    """Seconds that the exchanges of one pass of one layer add to those of its experts.

    One chunk is sent while the one before is at its experts and the one before that is collected: in each of chunks + 2
    steps the longer of wire and experts counts (`runtime/dispatch_chunks.py`). But the wire slows the experts down
    (`Device.beside_seconds`), and not all of what is left to hide is hidden (`HIDDEN_FRACTION`).
    """
    wire, inside = float(stages.beside.seconds), 2 * float(stages.inside.seconds)
    work = inside + experts_seconds / chunks
    alone = chunks * (2 * wire + inside)
    if chunks == 1:
        return alone
    saved = sum(
        saved_seconds(platform, wire * ((step < chunks) + (step >= 2)), work * (1 <= step <= chunks))
        for step in range(chunks + 2)
    )
    return float(alone - saved)


def saved_seconds(platform: Platform, exchange: Any, computation: Any) -> Any:
    """Seconds that an exchange and computation side by side take less than one after the other; or arrays."""
    together = platform.device.beside_seconds(exchange, computation)
    return HIDDEN_FRACTION * (exchange + computation - together)
