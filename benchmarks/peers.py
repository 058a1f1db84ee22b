"""Bar: one training step against MaxText and Hugging Face Transformers, measured in the same run.

    python -m benchmarks.peers --install DIR --python312 PATH     # once: 3 GB, an environment for each peer
    python -m benchmarks.peers --peers DIR                        # measure; peers that are missing are skipped

The model is the preset `peers_bench`, 8 sequences of 64 tokens per step, float32, one device. Each trainer runs in a
process of its own, one process at a time, on the same CPUs, in turns: ours, theirs, ours, theirs. A step is the whole
of it: forward, backward with router losses, AdamW, and waiting for the result. Of 40 steps the last 30 count.

Differences that remain: PiperJAX runs in memory mode "products", which repeats only elementwise work and attention's
inner products in backward; its default "layer" repeats each layer and is about a tenth slower. MaxText repeats each
layer, Hugging Face nothing. PiperJAX and MaxText clip the gradient by its global norm, Hugging Face does not. MaxText's
times are those that it logs, from the end of a step to the end of the next, in whole milliseconds, with asynchronous
dispatch turned off; its experts run by `ragged_dot`, the fastest of its dropless paths that works on a CPU.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from models.config import ModelConfig
from models.cost import parameters
from models.presets import preset

STEPS, COUNTED_STEPS = 40, 30
BATCH_SIZE, SEQ_LEN = 8, 64
THREADS = 2
BUSY = THREADS + 0.5  # load average that these runs alone do not reach
HERE = Path(__file__).resolve().parent

HUGGING_FACE = ("torch==2.13.0", "transformers==5.23.0")
MAXTEXT = "maxtext==0.2.5"
# What MaxText imports. Its wheel names no dependencies, and its lists of them bring TensorFlow and CUDA.
MAXTEXT_IMPORTS = (
    *("absl-py", "aqtp", "array-record", "chex", "datasets", "drjax", "flax", "grain", "huggingface_hub"),
    *("jax>=0.11.1", "jaxtyping", "jinja2", "jsonlines", "ml-collections", "omegaconf", "optax"),
    *("orbax-checkpoint", "pathwaysutils", "pillow", "psutil", "pydantic", "qwix", "sentencepiece", "sympy"),
    *("tensorboardx", "tiktoken", "tokamax", "transformers"),
)


class Run(NamedTuple):
    """What one process measured.

    Attributes:
      seconds: of the steps that count.
      first_loss: before anything is learnt: about log(vocab_size).
      load_average: of the machine, over the minute before.
    """

    seconds: list[float]
    first_loss: float
    load_average: float

    @property
    def median(self) -> float:
        """Median step in seconds."""
        return statistics.median(self.seconds)


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """A trainer to measure.

    Attributes:
      name: what is printed.
      python: its interpreter.
      packages: whose versions are printed.
      run: starts a process with that interpreter and returns its result.
      times_slower: the bar: its step takes at least this many times ours.
    """

    name: str
    python: Path
    packages: tuple[str, ...]
    run: Callable[[Path, ModelConfig], Run]
    times_slower: float = 1.0


def sizes(model: ModelConfig) -> dict[str, int | float]:
    """The numbers that describe the model to a peer."""
    (layer,) = model.kinds.values()
    attention, ffn = layer.attention, layer.ffn
    return {
        "vocab_size": model.vocab_size,
        "d_model": model.d_model,
        "num_layers": model.num_layers,
        "num_heads": attention.num_heads,
        "num_kv_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "num_experts": ffn.num_experts,
        "experts_per_token": ffn.experts_per_token,
        "d_ff": ffn.d_ff,
        "aux_loss_coefficient": ffn.router.aux_loss_coefficient,
        "batch_size": BATCH_SIZE,
        "seq_len": SEQ_LEN,
        "steps": STEPS,
        "threads": THREADS,
        "memory_mode": "products",
    }


def run_script(script: str) -> Callable[[Path, ModelConfig], Run]:
    """Returns a function that runs a script of this directory, which prints its result as a line of JSON."""

    def run(python: Path, model: ModelConfig) -> Run:
        command = [python, HERE / script, json.dumps(sizes(model))]
        environment = {"OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE.parent)}
        load = os.getloadavg()[0]
        result = json.loads(_output(command, environment).splitlines()[-1])
        expected = parameters(model).total
        if result["parameters"] != expected:
            raise RuntimeError(
                f"{script} must train {expected} parameters, but it has {result['parameters']}"
            )
        return Run(result["seconds"][-COUNTED_STEPS:], result["first_loss"], load)

    return run


def run_maxtext(python: Path, model: ModelConfig) -> Run:
    """Runs MaxText's own command and reads its log."""
    code = "import maxtext; print(maxtext.__path__[0])"
    package = Path(_output([python, "-c", code], {}).splitlines()[-1])
    environment = {
        "DECOUPLE_GCLOUD": "TRUE",
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_ENABLE_ASYNC_DISPATCH": "0",
    }
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as directory:
        options = maxtext_options(model) | {"base_output_directory": directory}
        arguments = [f"{name}={value}" for name, value in options.items()]
        module = "maxtext.trainers.pre_train.train"
        log = _output([python, "-m", module, package / "configs" / "base.yml", *arguments], environment)
    steps = re.findall(r"completed step: \d+, seconds: ([\d.]+).*? loss: ([\d.]+)", log)
    if len(steps) != STEPS:
        raise RuntimeError(f"MaxText must log {STEPS} steps, but its log has {len(steps)}:\n{log[-2000:]}")
    return Run([float(seconds) for seconds, _ in steps][-COUNTED_STEPS:], float(steps[0][1]), load)


def maxtext_options(model: ModelConfig) -> dict[str, object]:
    """What MaxText is told: the model, and to do nothing but steps."""
    size = sizes(model)
    work = {
        "run_name": "peers",
        "hardware": "cpu",
        "dataset_type": "synthetic",
        "attention": "dot_product",
        "decoder_block": "mixtral",
        "dtype": "float32",
        "weight_dtype": "float32",
        "steps": STEPS,
        "per_device_batch_size": BATCH_SIZE,
        "max_target_length": SEQ_LEN,
        "sparse_matmul": True,  # by ragged_dot, without the two kernel libraries
        "megablox": False,
        "use_tokamax_gmm": False,
    }
    shape = {
        "base_emb_dim": size["d_model"],
        "base_num_query_heads": size["num_heads"],
        "base_num_kv_heads": size["num_kv_heads"],
        "head_dim": size["head_dim"],
        "base_mlp_dim": size["d_ff"],
        "base_moe_mlp_dim": size["d_ff"],
        "base_num_decoder_layers": size["num_layers"],
        "vocab_size": size["vocab_size"],
        "num_experts": size["num_experts"],
        "num_experts_per_tok": size["experts_per_token"],
        "load_balance_loss_weight": size["aux_loss_coefficient"],
    }
    off = (
        *("enable_checkpointing", "enable_checkpoint_cloud_logger", "enable_tensorboard"),
        *("enable_goodput_recording", "monitor_goodput", "log_config"),
    )
    return work | shape | dict.fromkeys(off, False) | {"skip_jax_distributed_system": True}


def trainers(directory: Path | None) -> list[Trainer]:
    """Ours, then the peers installed under `directory`; says which are skipped."""
    ours = Trainer(
        name="PiperJAX",
        python=Path(sys.executable),
        packages=("jax", "flax"),
        run=run_script("peers_piperjax.py"),
    )
    peers = {
        "huggingface": Trainer(
            name="Hugging Face Mixtral, grouped_mm",
            python=Path(),
            packages=("transformers", "torch"),
            run=run_script("peers_huggingface.py"),
            times_slower=1.0,
        ),
        "maxtext": Trainer(
            name="MaxText, dropless",
            python=Path(),
            packages=("maxtext", "jax"),
            run=run_maxtext,
            times_slower=2.0,
        ),
    }
    found = [ours]
    for name, peer in peers.items():
        python = (directory or Path()) / name / "bin" / "python"
        if directory is not None and python.exists():
            found.append(Trainer(**{**peer.__dict__, "python": python.absolute()}))
        else:
            where = "--peers was not given" if directory is None else f"there is no {python}"
            print(f"skipped: {peer.name}: {where}; install it with python -m benchmarks.peers --install DIR")
    return found


def measure(contestants: list[Trainer], rounds: int) -> dict[str, list[Run]]:
    """Runs every trainer once per round, in turns."""
    model = preset("peers_bench")
    runs: dict[str, list[Run]] = {trainer.name: [] for trainer in contestants}
    for number in range(rounds):
        for trainer in contestants:
            run = trainer.run(trainer.python, model)
            runs[trainer.name].append(run)
            print(
                f"round {number + 1}  {trainer.name:34s} median {run.median * 1e3:7.1f} ms  "
                f"min {min(run.seconds) * 1e3:7.1f} ms  first loss {run.first_loss:.3f}  "
                f"load average before {run.load_average:.1f}",
                flush=True,
            )
    return runs


def report(contestants: list[Trainer], runs: dict[str, list[Run]]) -> bool:
    """Prints medians over rounds, and whether every bar is met."""
    ours, *peers = contestants
    print()
    for trainer in contestants:
        median = statistics.median(run.median for run in runs[trainer.name])
        least = min(min(run.seconds) for run in runs[trainer.name])
        versions = _versions(trainer)
        print(f"{trainer.name:34s} median {median * 1e3:7.1f} ms  min {least * 1e3:7.1f} ms  {versions}")
    all_met = True
    for peer in peers:
        pairs = zip(runs[peer.name], runs[ours.name], strict=True)
        ratio = statistics.median(theirs.median / own.median for theirs, own in pairs)
        met = ratio >= peer.times_slower
        all_met &= met
        print(
            f"{peer.name}: {ratio:.2f} times our step (bar: at least {peer.times_slower:.1f}) "
            + ("met" if met else "MISSED")
        )
    highest = max(run.load_average for each in runs.values() for run in each)
    if highest > BUSY:
        print(
            f"other work disturbed this: the load average reached {highest:.1f}, over {BUSY}; repeat when idle"
        )
    return all_met


def install(directory: Path, python: Path, python312: Path | None) -> None:
    """Makes an environment for each peer; keeps one that exists.

    Raises:
      ValueError: if pip would take a build of torch for GPUs.
    """
    pip = _environment(directory / "huggingface", python)
    with tempfile.TemporaryDirectory() as temporary:
        plan = Path(temporary, "plan.json")
        _output([*pip, "install", "--dry-run", "--report", plan, *HUGGING_FACE], {})
        packages = json.loads(plan.read_text())["install"]
    chosen = [package["metadata"]["name"].lower() for package in packages]
    heavy = [name for name in chosen if name.startswith(("nvidia", "cuda"))]
    if heavy:
        raise ValueError(
            f"torch must be the build for CPUs, but pip would also install {len(heavy)} CUDA packages; set "
            "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu, or choose another Python by --python"
        )
    subprocess.run([*pip, "install", *HUGGING_FACE], check=True)
    if python312 is None:
        print("skipped: MaxText: it needs Python 3.12 or newer; name one by --python312 PATH")
        return
    pip = _environment(directory / "maxtext", python312)
    subprocess.run([*pip, "install", "--no-deps", MAXTEXT], check=True)
    subprocess.run([*pip, "install", *MAXTEXT_IMPORTS], check=True)


def _environment(where: Path, python: Path) -> list[str]:
    """Makes a virtual environment and returns the command of its pip."""
    inside = where / "bin" / "python"
    if not inside.exists():
        subprocess.run([python, "-m", "venv", where], check=True)
    return [str(inside), "-m", "pip"]


def _versions(trainer: Trainer) -> str:
    code = f"from importlib.metadata import version; print(*(f'{{p}} {{version(p)}}' for p in {trainer.packages}))"
    return _output([trainer.python, "-c", code], {}).strip()


def _output(command: list, environment: dict[str, str]) -> str:
    """Standard output and error of a command; an error shows what it said."""
    done = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}:\n{done.stdout[-4000:]}")
    return done.stdout


def main() -> int:
    """Installs or measures; the exit status says whether every bar that was measured is met."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--install", type=Path, metavar="DIR", help="make environments for the peers there")
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="Python for Hugging Face")
    parser.add_argument("--python312", type=Path, metavar="PATH", help="Python for MaxText, at least 3.12")
    parser.add_argument("--peers", type=Path, metavar="DIR", help="where the peers were installed")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each trainer")
    args = parser.parse_args()
    if args.install:
        install(args.install, args.python, args.python312)
        return 0
    if hasattr(os, "sched_setaffinity"):  # the same CPUs for all; processes that are started inherit them
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    contestants = trainers(args.peers)
    runs = measure(contestants, args.rounds)
    return not report(contestants, runs)


if __name__ == "__main__":
    sys.exit(main())
