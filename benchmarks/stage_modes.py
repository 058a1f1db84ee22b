"""Would a memory mode per stage pay? Late ranks of 1F1B hold fewer microbatches and could keep more of each.

    python -m benchmarks.stage_modes

Every rank allocates what the worst rank needs, and a tick lasts as long as its slowest rank. So a rank that recomputes
nothing shortens no tick unless it also gets more layers; then all ranks store that many. For budgets between what
"layer" and what "products" need on every rank, this finds the shortest tick (a) with one mode for all layers, (b) with
"products" in as many layers of every stage as fit, (c) with "products" on late ranks and layers moved there. All in
whole layers and the same bytes per device: parameters and optimizer state of the fullest rank, and for each mode in use
the stashes of its worst rank. Times are F = 1 and B = 2, or 3 where the forward runs again. A model of the lockstep
clock; nothing is run.

A mode per rank gains little, and nothing on a V, where all ranks hold equally much. So the mode is the plan's.
"""

import argparse
import sys
from itertools import product

from models.cost import layer_parameters
from models.presets import preset
from piperjax.planner.kept import Share, kept_bytes
from piperjax.schedules import registry
from piperjax.schedules.ticks import pack

MODES = {"layer": 4.0, "products": 3.0}  # Seconds of F and B of one layer.
# Copy for products and gradients in float32; master parameters and two moments over eight data ranks.
BYTES_PER_PARAMETER = 2 + 4 + 12 / 8
BUDGETS, WORTH_IT = 12, 0.05


class Case:
    """A model on pipe ranks: bytes of one layer's state and of what it keeps, and slots of every rank."""

    def __init__(self, name: str, schedule: str, num_ranks: int, layers_per_rank: int):
        model, share = preset(name), Share(sequences=1, seq_len=4096, expert=8)
        layer = model.layers[-1]
        parameters = layer_parameters(model, layer)
        self.state_bytes = BYTES_PER_PARAMETER * (parameters.total - parameters.experts * 7 / 8)
        self.kept = {mode: kept_bytes(model.d_model, layer, share, mode) for mode in MODES}
        table = pack(registry.build(schedule, num_ranks, 4 * num_ranks))
        self.slots = [held / table.schedule.num_chunks for held in table.peak_in_flight()]
        self.num_layers = num_ranks * layers_per_rank
        self.layers_per_rank = layers_per_rank

    def bytes_of(self, mode: str, layers: int, slots: float) -> float:
        """Bytes of what layers keep on a rank."""
        return layers * slots * self.kept[mode]

    def one_mode(self, budget: float) -> float:
        """Seconds of a tick with the quickest mode that fits."""
        n = self.layers_per_rank
        fits = (
            seconds * n
            for mode, seconds in MODES.items()
            if self.bytes_of(mode, n, max(self.slots)) + n * self.state_bytes <= budget
        )
        return min(fits, default=float("inf"))

    def part_of_every_stage(self, budget: float) -> float:
        """Seconds of a tick where as many layers of every stage as fit recompute nothing."""
        n, worst = self.layers_per_rank, max(self.slots)
        for quick in range(n, -1, -1):
            stash = self.bytes_of("products", quick, worst) + self.bytes_of("layer", n - quick, worst)
            if stash + n * self.state_bytes <= budget:
                return quick * MODES["products"] + (n - quick) * MODES["layer"]
        return float("inf")

    def mode_per_rank(self, budget: float) -> float:
        """Seconds of a tick with the quickest mode on every rank and layers moved to where they are quick."""
        best = float("inf")
        for first_quick, most in product(
            range(len(self.slots)), range(self.layers_per_rank, 2 * self.layers_per_rank + 1)
        ):
            room = budget - most * self.state_bytes
            limits = {seconds * n for seconds, n in product(MODES.values(), range(1, most + 1))}
            for limit in sorted(limits):
                if self._most_layers(first_quick, room, limit, most) >= self.num_layers:
                    best = min(best, limit)
                    break
        return best

    def _most_layers(self, first_quick: int, room: float, limit: float, most: int) -> int:
        """Layers that fit if ranks from `first_quick` on recompute nothing; each mode has buffers of its own."""
        slow = min(most, int(limit / MODES["layer"])) if first_quick else 0
        room -= self.bytes_of("layer", slow, self.slots[0])
        quick = (
            min(most, int(limit / MODES["products"]), int(room / self.bytes_of("products", 1, slots)))
            for slots in self.slots[first_quick:]
        )
        return first_quick * slow + sum(max(n, 0) for n in quick)


def gains(case: Case) -> tuple[list[float], list[float]]:
    """Per budget, how much shorter a tick is: with a part of every stage, and with a mode per rank."""
    n, worst = case.layers_per_rank, max(case.slots)
    low, high = (case.bytes_of(mode, n, worst) + n * case.state_bytes for mode in MODES)
    parts, ranks = [], []
    for step in range(BUDGETS):
        budget = low + (high - low) * step / BUDGETS
        one = case.one_mode(budget)
        parts.append(1 - case.part_of_every_stage(budget) / one)
        ranks.append(1 - min(one, case.mode_per_rank(budget)) / one)
    return parts, ranks


def main() -> int:
    """Prints the table; nothing can fail."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    print(
        f"{'':52s}{'shorter ticks, mean and most over budgets':>44s}\n"
        f"{'model':18s}{'schedule':14s}{'P':>4s}{'layers per rank':>16s}"
        f"{'part of every stage':>24s}{'mode per rank':>20s}"
    )
    for name, schedule in product(("mixtral_8x7b", "qwen3_30b_a3b"), ("one_f_one_b", "zb_v")):
        for num_ranks, layers in product((4, 8, 16), (4, 8)):
            parts, ranks = gains(Case(name, schedule, num_ranks, layers))
            cells = "".join(f"{sum(g) / len(g):14.1%}{max(g):7.1%}" for g in (parts, ranks))
            print(f"{name:18s}{schedule:14s}{num_ranks:4d}{layers:16d}   {cells}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
