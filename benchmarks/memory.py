"""Predicted memory per device against what XLA allocates for the real training step, on devices that are not here.

python -m benchmarks.memory               compiles every case, writes benchmarks/results/memory.csv and docs/memory.svg
python -m benchmarks.memory --gpu h100    the same for GPUs of `meshes/gpus/`, writes memory_h100.csv and .svg;
                                          needs JAX's plugin for them (`piperjax/runtime/absent_gpus.py`), and no GPU
python -m benchmarks.memory --reuse       predicts again beside the compiled bytes of the table
python -m benchmarks.memory --random 100 --seed 7    the same for random steps (`memory_random.py`)
"""

import argparse
import csv
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks import memory_gpu_cases, memory_random
from benchmarks.memory_cases import COLUMNS, Case, case, in_both_dtypes, scaled
from meshes.mesh import simulate_devices
from piperjax.planner.memory import estimate_memory
from piperjax.schedules import registry

ROOT = Path(__file__).resolve().parent.parent
MEAN_BAR, UNDER_BAR, OVER_BAR, GPU_OVER_BAR = 0.05, -0.02, 0.12, 0.13
NUM_DEVICES = 64
# What is allocated is known before machine code is made, of which little will do.
FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
NUMBERS = ("compiled_bytes", "predicted_bytes", "error")
DEVICES_PER_NODE = 8


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is compiled for.

    Attributes:
      gpu: a GPU's name in `meshes/gpus/`; "" for simulated devices.
    """

    gpu: str = ""

    @property
    def table(self) -> Path:
        """Compiled and predicted bytes of every case."""
        return ROOT / "benchmarks" / "results" / f"{self._stem}.csv"

    @property
    def picture(self) -> Path:
        """The errors, drawn."""
        return ROOT / "docs" / f"{self._stem}.svg"

    @property
    def _stem(self) -> str:
        return f"memory_{self.gpu}" if self.gpu else "memory"

    @property
    def backend(self) -> str:
        """As `estimate_memory` calls it."""
        return "gpu" if self.gpu else "cpu"

    @property
    def over_bar(self) -> float:
        """How much too high a prediction may be. It was not known of GPUs when the bar was set; to be low is worse."""
        return GPU_OVER_BAR if self.gpu else OVER_BAR

    def cases(self) -> Iterator[Case]:
        """What is compiled."""
        return memory_gpu_cases.cases() if self.gpu else cases()


SIMULATED = Target()


def cases() -> Iterator[Case]:
    """What is compiled: every schedule, memory mode, vocabulary, both dtypes, families of models, up to 64 devices."""
    mixtral = scaled("mixtral_8x7b", num_layers=8)
    for schedule in registry.names():
        if schedule != "auto":
            yield case(mixtral, (4, 1, 2), schedule=schedule)
    for schedule in ("interleaved", "zb_v"):
        yield case(mixtral, (4, 1, 2), schedule=schedule, dtype="float32")
    for memory_mode in ("stage", "named", "products", "stash"):
        yield case(scaled("qwen3_30b_a3b", num_experts=16), (2, 2, 4), memory_mode=memory_mode, seq_len=192)
        yield case(scaled("xmoe_small"), (2, 1, 2), memory_mode=memory_mode, dtype="float32")
    for memory_mode in ("named", "products", "stash"):
        yield case(scaled("weak_1_7t"), (2, 1, 2), schedule="zb_h1", memory_mode=memory_mode)
    yield from _families()
    yield from _meshes()
    yield from _dispatchers()
    yield from _gradients()
    yield from _kinds()
    yield from _overlapped_single_layers()


def _families() -> Iterator[Case]:
    """Models as they differ: dense prologue, alternating layers, shared and residual parts, norms, biases, ties."""
    yield from in_both_dtypes(case, scaled)
    yield case(scaled("llama4_maverick", num_layers=8), (4, 1, 2))
    yield case(scaled("deepseek_v3", num_layers=6), (2, 2, 2), dtype="float32")
    yield case(scaled("qwen2_57b_a14b"), (2, 1, 4))
    yield case(scaled("olmoe_1b_7b", num_experts=16), (2, 4, 1), dtype="float32")
    yield case(scaled("arctic", num_layers=5), (2, 2, 2), layers_per_stage=(3, 2), dtype="float32")
    yield case(scaled("mixtral_8x7b", num_layers=6), (4, 1, 2), layers_per_stage=(2, 2, 1, 1))


def _meshes() -> Iterator[Case]:
    """Devices, sequence lengths, vocabularies, capacities."""
    mixtral, weak = scaled("mixtral_8x7b"), scaled("weak_862b")
    yield case(mixtral, (1, 1, 1), dtype="float32")
    yield case(mixtral, (1, 1, 8))
    yield case(mixtral, (1, 1, 8), dtype="float32", sequences=4)
    yield case(mixtral, (1, 8, 1), dtype="float32")
    yield case(mixtral, (4, 4, 4))
    yield case(weak, (4, 2, 8), dtype="float32")
    yield case(scaled("weak_862b", num_layers=16), (16, 2, 2), sequences=1)
    yield case(mixtral, (2, 1, 2), seq_len=1024, sequences=1)
    yield case(mixtral, (2, 2, 1), seq_len=768, sequences=1, dtype="float32")
    for memory_mode in ("products", "stash"):
        yield case(weak, (2, 1, 1), seq_len=1024, sequences=2, dtype="float32", memory_mode=memory_mode)
    yield case(scaled("mixtral_8x7b", vocab_size=24_000), (2, 2, 2), sequences=4)
    yield case(scaled("mixtral_8x7b", vocab_size=16_384), (2, 1, 2), vocabulary="whole", sequences=4)
    yield case(scaled("mixtral_8x7b", vocab_size=16_384), (2, 1, 2), vocabulary="whole", dtype="float32")
    yield case(weak, (2, 1, 4), capacity_factor=1.25, sequences=4)
    yield case(weak, (2, 1, 4), capacity_factor=1.0, sequences=8, dtype="float32")
    yield case(weak, (4, 1, 2), overlap=True, num_microbatches=16)
    yield case(mixtral, (2, 1, 2), overlap=True, dtype="float32")


def _overlapped_single_layers() -> Iterator[Case]:
    """A forward beside a backward in stages of one layer, in every mode that has either."""
    overlapped = dict(overlap=True, seq_len=256)
    chunks = dict(schedule="interleaved", num_chunks=2, **overlapped)
    yield case(scaled("mixtral_8x7b"), (2, 1, 2), **chunks, memory_mode="stash", dtype="float32")
    passes = dict(capacity_factor=2.0, overflow="passes")
    yield case(scaled("weak_1_7t"), (2, 1, 2), **chunks, **passes, memory_mode="products")
    yield case(scaled("mixtral_8x7b"), (4, 1, 2), **overlapped, memory_mode="named", dtype="float32")
    yield case(scaled("olmoe_1b_7b"), (4, 1, 2), **overlapped, schedule="zb_h1", memory_mode="products")


def _dispatchers() -> Iterator[Case]:
    """Dispatchers, between two nodes of four devices or four of two, and chunks."""
    deepseek, mixtral = scaled("deepseek_moe_16b", num_experts=16), scaled("mixtral_8x7b")
    eight = dict(expert_factors=(1, 2, 4), sequences=4)
    yield case(deepseek, (1, 1, 8), dispatch="halo2", **eight)
    yield case(deepseek, (1, 1, 8), dispatch="halo3", expert_factors=(1, 4, 2), dtype="float32")
    for dtype in ("float32", "bfloat16"):
        yield case(deepseek, (1, 1, 8), dispatch="halo2_dedup", dtype=dtype, **eight)
        yield case(mixtral, (2, 1, 4), dispatch="halo2_dedup", expert_factors=(1, 2, 2), dtype=dtype)
    yield case(deepseek, (1, 1, 8), dispatch="halo2_dedup", dispatch_chunks=4, **eight)
    yield case(deepseek, (1, 1, 8), dispatch="flat", dispatch_chunks=2, dtype="float32", **eight)
    limited = dict(dispatch="halo2_dedup", capacity_factor=1.25)
    yield case(deepseek, (1, 1, 8), **limited, **eight)
    yield case(deepseek, (1, 1, 8), **limited, **eight, overflow="passes")
    passes = dict(capacity_factor=1.25, overflow="passes")
    yield case(mixtral, (2, 1, 4), **passes, dtype="float32")
    yield case(mixtral, (2, 1, 4), **passes, schedule="zb_h1")
    yield case(mixtral, (2, 1, 4), **passes, schedule="zb_h1", dtype="float32", memory_mode="named")
    yield case(deepseek, (2, 1, 4), **passes, schedule="zb_h1", memory_mode="stash")
    yield case(deepseek, (1, 1, 8), **limited, dtype="float32", dispatch_chunks=2, **eight)
    for memory_mode in ("named", "products", "stash"):
        yield case(deepseek, (1, 1, 8), dispatch="halo2_dedup", memory_mode=memory_mode, **eight)
    for memory_mode in ("layer", "products", "stash"):
        yield case(deepseek, (1, 1, 8), dispatch="halo3_dedup", memory_mode=memory_mode, **eight)
    yield case(deepseek, (1, 1, 8), dispatch="halo3_dedup", capacity_factor=1.25, dtype="float32", **eight)


def _gradients() -> Iterator[Case]:
    """Gradients added up in 16 bits: alone, with copies of parameters, in stages of one layer, in two parts."""
    mixtral, narrow = scaled("mixtral_8x7b"), dict(gradient_dtype="bfloat16")
    yield case(mixtral, (1, 1, 1), **narrow)
    yield case(mixtral, (1, 1, 1), **narrow, dtype="float32")
    yield case(mixtral, (2, 2, 2), **narrow)
    yield case(mixtral, (2, 2, 2), **narrow, dtype="float32")
    yield case(scaled("mixtral_8x7b", num_layers=8), (4, 1, 2), **narrow, schedule="zb_v")
    yield case(scaled("deepseek_moe_16b", num_experts=16), (2, 1, 4), **narrow, schedule="zb_h1")
    yield case(mixtral, (2, 1, 2), **narrow, vocabulary="whole")
    yield case(scaled("xmoe_small"), (2, 1, 2), **narrow, overlap=True, dispatch_chunks=2)


def _kinds() -> Iterator[Case]:
    """Loops over one layer, or none: kinds of layers in turn, and stages of one layer of either kind."""
    yield case(scaled("llama4_maverick", num_layers=8), (2, 1, 2), dtype="float32")
    deepseek = scaled("deepseek_moe_16b", num_layers=8, num_experts=16)
    yield case(deepseek, (4, 1, 4), schedule="v_half", memory_mode="named", dtype="float32")


def compiled_bytes(one: Case, target: Target = SIMULATED) -> int:
    """Bytes per device that the compiler allocates: arguments, outputs that are not donated arguments, temporaries."""
    import jax

    from meshes.mesh import build_mesh
    from piperjax.runtime import absent_gpus
    from piperjax.runtime.compiled import memory_of
    from piperjax.runtime.executor import Executor
    from piperjax.training.compile_check import compile_step
    from piperjax.training.config import TrainConfig

    plan = one.plan
    gpu = absent_gpus.target(target.gpu) if target.gpu else None
    if gpu is None:
        devices = jax.devices("cpu")[: plan.num_devices]
    else:
        devices = absent_gpus.devices(gpu, plan.num_devices, DEVICES_PER_NODE)
    mesh = build_mesh(pipe=plan.pipe, data=plan.data, expert_factors=plan.expert_factors, devices=devices)
    executor = Executor(one.model, plan, mesh, one.dtype)
    config = TrainConfig(model=one.model, out="unused", dtype=one.dtype)
    return memory_of(compile_step(executor, config, gpu=gpu)[0]).total


def predicted_bytes(one: Case, target: Target = SIMULATED, backend: str = "") -> float:
    """Bytes per device that the planner predicts, for what the table was compiled with, or for another backend."""
    ranks = estimate_memory(one.model, one.plan, dtype=one.dtype, backend=backend or target.backend)
    return max(rank.total for rank in ranks)


def read_table(target: Target = SIMULATED) -> dict[tuple[str, ...], int]:
    """Compiled bytes of the committed table by case; empty if there is none."""
    if not target.table.exists():
        return {}
    with target.table.open(newline="", encoding="utf-8") as file:
        return {
            tuple(row[name] for name in COLUMNS): int(row["compiled_bytes"]) for row in csv.DictReader(file)
        }


def write_table(rows: list[tuple[Case, int, float]], target: Target) -> None:
    """Writes one line per case."""
    target.table.parent.mkdir(parents=True, exist_ok=True)
    with target.table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*COLUMNS, *NUMBERS])
        for one, compiled, predicted in rows:
            writer.writerow([*one.key, compiled, round(predicted), f"{predicted / compiled - 1:.4f}"])


def picture(rows: list[tuple[Case, int, float]], target: Target) -> str:
    """SVG: predicted over compiled bytes of every case, with the bars."""
    width, height, left, top = 860, 320, 60, 30
    step = (width - left - 20) / len(rows)

    def y(error: float) -> float:
        return top + (height - top - 30) * (0.14 - error) / 0.18

    lines = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
            'font-size="11">'
        ),
        f'<rect width="{width}" height="{height}" fill="white"/>',
        (
            f'<text x="{left}" y="18" font-size="13">Predicted over compiled memory per device'
            f"{' of ' + target.gpu.upper() if target.gpu else ''}, {len(rows)} steps "
            "(blue float32, orange bfloat16)</text>"
        ),
    ]
    lines.append(
        f'<text x="{(left + width - 20) / 2:.0f}" y="{height - 6}" text-anchor="middle">steps, in the order of '
        f"results/{target.table.name}</text>"
    )
    for error in (-0.04, -0.02, 0.0, 0.02, 0.04, 0.06, 0.08, 0.10, target.over_bar, 0.14):
        bar = error in (UNDER_BAR, target.over_bar)
        style = 'stroke="#c00" stroke-dasharray="5 4"' if bar else 'stroke="#ddd"'
        lines.append(f'<line x1="{left}" x2="{width - 20}" y1="{y(error):.1f}" y2="{y(error):.1f}" {style}/>')
        lines.append(f'<text x="{left - 8}" y="{y(error) + 4:.1f}" text-anchor="end">{error:+.0%}</text>')
    for number, (one, compiled, predicted) in enumerate(rows):
        error = min(0.14, max(-0.04, predicted / compiled - 1))
        colour = "#d97706" if one.dtype == "bfloat16" else "#2563eb"
        x = left + (number + 0.5) * step
        lines.append(
            f'<circle cx="{x:.1f}" cy="{y(error):.1f}" r="4" fill="{colour}"><title>{" ".join(one.key)}: '
            f"{predicted / compiled - 1:+.1%}</title></circle>"
        )
    return "\n".join([*lines, "</svg>", ""])


def _random_steps(count: int, seed: int, *, reuse: bool) -> int:
    known = memory_random.read_table(seed) if reuse else {}
    functions = dict(compiled_bytes=compiled_bytes, predicted_bytes=predicted_bytes)
    rows = memory_random.run(count, seed, known=known, **functions)
    memory_random.write_table(rows, seed)
    print(memory_random.summary(rows, under=UNDER_BAR, over=OVER_BAR))
    return 0


def main() -> int:
    """Prints the table and says whether the bars are met."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--reuse", action="store_true", help="take compiled bytes from the table where it has them"
    )
    parser.add_argument(
        "--only", default="", help="compile only cases whose columns contain this text; write nothing"
    )
    parser.add_argument(
        "--gpu", default="", metavar="NAME", help="compile for GPUs of meshes/gpus/, such as h100"
    )
    parser.add_argument("--random", type=int, metavar="N", help="compile N random steps instead")
    parser.add_argument("--seed", type=int, default=0, help="of the random steps")
    args = parser.parse_args()
    if not args.gpu:
        os.environ["XLA_FLAGS"] = f"{FLAGS} {os.environ.get('XLA_FLAGS', '')}"
    simulate_devices(NUM_DEVICES)
    if args.random is not None:
        if args.random < 1:
            parser.error(f"--random takes at least 1 step, got {args.random}")
        return _random_steps(args.random, args.seed, reuse=args.reuse)
    target = Target(gpu=args.gpu)
    known = read_table(target) if args.reuse else {}
    rows = []
    for one in target.cases():
        if args.only and args.only not in " ".join(one.key):
            continue
        compiled = known.get(one.key) or compiled_bytes(one, target)
        predicted = predicted_bytes(one, target)
        rows.append((one, compiled, predicted))
        print(
            f"{predicted / compiled - 1:+7.1%} {compiled / 2**20:9.2f} MiB  {' '.join(one.key)}", flush=True
        )
        if not args.only:
            write_table(rows, target)
    if not args.only:
        target.picture.write_text(picture(rows, target), encoding="utf-8")
    errors = [predicted / compiled - 1 for _, compiled, predicted in rows]
    mean = sum(map(abs, errors)) / len(errors)
    print(f"{len(errors)} steps: mean absolute error {mean:.1%} (bar {MEAN_BAR:.0%}), ", end="")
    print(f"worst {min(errors):+.1%} and {max(errors):+.1%} (bars {UNDER_BAR:+.0%}, {target.over_bar:+.0%})")
    met = mean <= MEAN_BAR and min(errors) >= UNDER_BAR and max(errors) <= target.over_bar
    print("bars: " + ("met" if met else "MISSED"))
    return not met


if __name__ == "__main__":
    sys.exit(main())
