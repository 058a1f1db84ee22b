"""Bar: the planner predicts the seconds of a training step on meshes of simulated devices, and picks a fast one.

    python -m benchmarks.prediction [--quick] [--platform measured.toml ...] [--steps steps.json]

`python -m piperjax measure` finds out how fast this computer is, unless a platform file is given. A model is trained
for a few steps on twelve meshes of eight devices, with several schedules, memory modes and numbers of microbatches, and
on the plan that the planner picks. Predictions come from the platform file alone, nothing is fitted to the steps. Run
it on a quiet machine.

The speed of a processor that is shared drifts by more than what is to be shown, so all take turns: `measure` is stopped
every now and then, and every mesh takes two steps, of which the second counts: steps of a training follow each other,
and find memory and caches as the one before has left them. It runs twice. The median of a mesh's steps counts, and the
geometric mean of the two predictions. What the planner picks is known after the first, and takes part from then on; at
last it takes turns with the quickest of the twelve alone, as a few per cent decide.
Every mesh trains in a process of its own, as `train.py` would. Beside every turn a product of fixed size is timed, to
say how far the speed drifted.

`--steps` writes the measured seconds to a file, or reads what it has: only predictions change then, and the bars are
not judged.
"""

import argparse
import json
import multiprocessing
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import jax.numpy as jnp

from benchmarks.cases import moe_model, random_batch
from benchmarks.validate import rank_correlation
from meshes.mesh import build_mesh, simulate_devices
from meshes.platform import Platform, load_platform
from piperjax.planner.plan import Plan, default_plan
from piperjax.planner.search import choose_plan
from piperjax.planner.timing import Conditions, estimate_time
from piperjax.runtime.executor import Executor
from piperjax.training import distributed
from piperjax.training.config import DataConfig, TrainConfig
from piperjax.training.state import init_state, make_train_step

NUM_DEVICES = 8
BATCH_SIZE, SEQ_LEN, DTYPE = 16, 256, "float32"
# Products take most of the time: width and experts of a small model, depth for eight pipe ranks.
MODEL = moe_model(num_layers=8, d_model=256, d_ff=512, num_experts=8, vocab_size=2048)
MESHES = (
    {"pipe": 1, "data": 1, "expert": 8, "num_microbatches": 1},
    {"pipe": 1, "data": 8, "expert": 1, "num_microbatches": 2, "memory_mode": "stage"},
    {"pipe": 1, "data": 2, "expert": 4, "num_microbatches": 2, "memory_mode": "named"},
    {"pipe": 1, "data": 4, "expert": 2, "num_microbatches": 1, "memory_mode": "stash"},
    {"pipe": 2, "data": 1, "expert": 4, "num_microbatches": 4},
    {"pipe": 2, "data": 4, "expert": 1, "num_microbatches": 2, "memory_mode": "stash"},
    {"pipe": 2, "data": 2, "expert": 2, "num_microbatches": 4, "schedule": "zb_h1"},
    {"pipe": 4, "data": 1, "expert": 2, "num_microbatches": 8, "schedule": "gpipe", "memory_mode": "stage"},
    {"pipe": 4, "data": 2, "expert": 1, "num_microbatches": 8, "schedule": "zb_v"},
    {
        "pipe": 4,
        "data": 1,
        "expert": 2,
        "num_microbatches": 4,
        "schedule": "interleaved",
        "memory_mode": "named",
    },
    {"pipe": 8, "data": 1, "expert": 1, "num_microbatches": 16},
    {
        "pipe": 8,
        "data": 1,
        "expert": 1,
        "num_microbatches": 8,
        "memory_mode": "products",
        "vocabulary": "whole",
    },
)
# Seconds for which `measure` runs before it is stopped for steps; turns of every mesh where it does not run.
TURN_SECONDS, TURNS = 120.0, 5
# Plans beside which the planner's choice is judged, and turns that these take.
RIVALS, RIVAL_TURNS = 3, 9
WORST_BAR, RANK_BAR, CHOICE_BAR = 0.15, 0.9, 1.05


def make_plans(platform: Platform) -> list[Plan]:
    """The twelve plans."""
    return [
        default_plan(MODEL, platform, NUM_DEVICES, batch_size=BATCH_SIZE, seq_len=SEQ_LEN, **mesh)
        for mesh in MESHES
    ]


class Training:
    """A plan compiled as `train.py` does, and the state of its run."""

    def __init__(self, plan: Plan):
        config = TrainConfig(
            model=MODEL, plan=plan, data=DataConfig(batch_size=BATCH_SIZE, seq_len=SEQ_LEN), dtype=DTYPE
        )
        mesh = build_mesh(
            pipe=plan.pipe, data=plan.data, expert_factors=plan.expert_factors, devices=jax.devices()
        )
        executor = Executor(MODEL, plan, mesh, config.dtype)
        self.state = init_state(executor, config.seed)
        self.inputs = (
            jax.device_put(random_batch(MODEL, plan), executor.batch_sharding),
            distributed.stop_flags(mesh, is_asked=False),
        )
        self.step = make_train_step(executor, config).lower(self.state, *self.inputs).compile()
        self.seconds()  # The first step does not count.

    def seconds(self) -> float:
        """Seconds of one step."""
        start = time.perf_counter()
        self.state, metrics = self.step(self.state, *self.inputs)
        jax.block_until_ready((self.state, metrics))
        return time.perf_counter() - start


def reference_seconds() -> float:
    """Median seconds of a product of fixed size, with all cores."""
    x = jnp.ones((1024, 1024), jnp.float32)
    multiply = jax.jit(lambda x: x @ x)
    seconds = []
    for _ in range(16):
        start = time.perf_counter()
        multiply(x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def _train(plan: Plan, turns: Connection) -> None:
    """Trains in a process of its own: says when it is ready, and then, every time it is asked, what a step takes."""
    simulate_devices(NUM_DEVICES)
    training = Training(plan)
    turns.send(None)
    with suppress(EOFError):  # Nobody asks any more.
        while True:
            turns.recv()
            training.seconds()
            turns.send(training.seconds())


class Steps:
    """Measured seconds of steps by plan, kept in a file if there is one; what that has is not measured again."""

    def __init__(self, path: Path | None):
        self.path = path
        self.trainings: dict[str, Connection] = {}
        self.taken: dict[str, list[float]] = {}
        self.references: list[float] = []
        if path is not None and path.exists():
            self.taken = json.loads(path.read_text(encoding="utf-8"))
        self.known = frozenset(self.taken)

    def start(self, plan: Plan) -> None:
        """Compiles the step of a plan, if its steps are not known."""
        if _name(plan) in self.known or _name(plan) in self.trainings:
            return
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        context.Process(target=_train, args=(plan, theirs), daemon=True).start()
        ours.recv()
        self.trainings[_name(plan)] = ours

    def take(self, plans: Sequence[Plan] = ()) -> None:
        """A turn of every plan that was started, or of some."""
        for name in dict.fromkeys(map(_name, plans)) or self.trainings:
            training = self.trainings[name]
            self.references.append(reference_seconds())
            training.send(None)
            self.taken.setdefault(name, []).append(training.recv())
        if self.path is not None and self.trainings:
            self.path.write_text(json.dumps(self.taken, indent=1), encoding="utf-8")

    def of(self, plan: Plan, *, last: int = 0) -> float:
        """The median seconds of a step; of the last ones only, if a number is given."""
        return statistics.median(self.taken[_name(plan)][-last:])

    def number(self, plan: Plan) -> int:
        """How many steps of a plan were taken."""
        return len(self.taken[_name(plan)])

    def over_best(self, chosen: Plan, plans: Sequence[Plan]) -> float:
        """Seconds of the planner's choice over those of the quickest of the plans, in turns of these alone."""
        if self.known:
            both = self.number(chosen)
            return self.of(chosen) / min(self.of(plan, last=both) for plan in plans)
        rivals = sorted(plans, key=self.of)[:RIVALS]
        for _ in range(RIVAL_TURNS):
            self.take([chosen, *rivals])
        seconds = [self.of(plan, last=RIVAL_TURNS) for plan in (chosen, *rivals)]
        return seconds[0] / min(seconds[1:])


def measured_in_turns(*, quick: bool) -> Iterator[Platform | None]:
    """Runs `piperjax measure` in a process of its own; None every time it is stopped, and at last what it has found."""
    with TemporaryDirectory() as directory:
        path = Path(directory) / "measured.toml"
        command = [sys.executable, "-m", "piperjax", "measure", "--devices", str(NUM_DEVICES)]
        command += ["--out", str(path), *(["--quick"] if quick else [])]
        with subprocess.Popen(command) as process:
            while process.poll() is None:
                try:
                    process.wait(TURN_SECONDS)
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGSTOP)
                    try:
                        yield None
                    finally:  # Who interrupts this would wait for a process that is stopped.
                        process.send_signal(signal.SIGCONT)
        if process.returncode:
            raise SystemExit(f"measure failed with exit status {process.returncode}")
        yield load_platform(str(path))


def _choice(platform: Platform, steps: Steps) -> Plan:
    """What the planner picks, started."""
    plan = choose_plan(MODEL, platform, NUM_DEVICES, batch_size=BATCH_SIZE, seq_len=SEQ_LEN, dtype=DTYPE).plan
    steps.start(plan)
    return plan


def _described(plan: Plan) -> str:
    return (
        f"{plan.pipe} x {plan.data} x {plan.expert}  {plan.schedule:<12}{plan.num_microbatches:3d}  "
        f"{plan.memory_mode:<9}{plan.vocabulary:<6}"
    )


def _name(plan: Plan) -> str:
    return " ".join(_described(plan).split())


def main() -> int:
    """Prints the table and says whether the bars are met."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="measure fewer shapes, and go through the meshes once"
    )
    parser.add_argument("--platform", nargs="+", help="rates measured before, instead of measuring")
    parser.add_argument("--steps", type=Path, help="file of measured steps, written if it is not there")
    args = parser.parse_args()
    try:
        platforms = [load_platform(name) for name in args.platform or ()]
    except ValueError as error:
        parser.error(str(error))
    steps = Steps(args.steps)
    plans = make_plans(platforms[0] if platforms else load_platform("cpu8"))
    for plan in plans:
        steps.start(plan)
    chosen = _choice(platforms[0], steps) if platforms else None
    for _ in range(TURNS if platforms else 0):
        steps.take()
    while not args.platform and len(platforms) < (1 if args.quick else 2):
        for found in measured_in_turns(quick=args.quick):
            if found is not None:
                platforms.append(found)
                chosen = chosen or _choice(found, steps)
            steps.take()

    def row(plan: Plan) -> tuple[float, float]:
        predicted = statistics.geometric_mean(
            estimate_time(MODEL, plan, platform, Conditions(dtype=DTYPE)).step_seconds
            for platform in platforms
        )
        measured = steps.of(plan)
        print(f"{_described(plan)}{predicted:9.3f} s{measured:9.3f} s{predicted / measured:8.2f}")
        return predicted, measured

    print("pipe x data x expert, schedule, microbatches, memory, vocabulary; predicted, measured, ratio")
    predicted, measured = map(list, zip(*map(row, plans), strict=True))
    row(chosen)
    worst = max(abs(p / m - 1) for p, m in zip(predicted, measured, strict=True))
    ranks = rank_correlation(predicted, measured)
    choice = steps.over_best(chosen, plans)
    if steps.references:
        slowest, fastest = max(steps.references), min(steps.references)
        print(f"a product of fixed size took {fastest * 1e3:.1f} to {slowest * 1e3:.1f} ms between the steps")
    if steps.known:
        print(
            f"steps of {args.steps}: worst deviation {worst:.1%}, rank correlation {ranks:.2f}, choice {choice:.2f}"
        )
        return 0
    met = worst <= WORST_BAR and ranks >= RANK_BAR and choice <= CHOICE_BAR
    print(
        f"bar: worst deviation {worst:.1%} of {WORST_BAR:.0%}; rank correlation {ranks:.2f}, at least {RANK_BAR}; the "
        f"planner's choice takes {choice:.2f} times as long as the best of the twelve, at most {CHOICE_BAR}: "
        + ("met" if met else "MISSED")
    )
    return not met


if __name__ == "__main__":
    sys.exit(main())
