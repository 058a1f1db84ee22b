"""How long the planner searches: 16,384 Frontier devices for DeepSeek-V3 and for a 1.7T model, on one core.

Each model is searched in a process of its own, so that nothing is remembered from the other; the time is that of the
process in `search`, imports not counted, and includes pricing the ten best plans in full. Nothing is wished for: that
includes looking for smaller buffers and narrower sums where nothing fits, and for smaller buffers that are quicker.
"""

import json
import os
import subprocess
import sys
import time

NUM_DEVICES, SEQ_LEN = 16_384, 4096
MODELS = ("deepseek_v3", "weak_1_7t")
BAR_SECONDS = 2.0


def searched(model: str) -> dict:
    """Searches once and says how long it took and what was found."""
    from meshes.platform import load_platform
    from models.presets import preset
    from piperjax.planner.plan_command import default_batch_size
    from piperjax.planner.search import search

    start = time.process_time()
    result = search(
        preset(model),
        load_platform("frontier"),
        NUM_DEVICES,
        batch_size=default_batch_size(NUM_DEVICES, SEQ_LEN),
        seq_len=SEQ_LEN,
    )
    seconds = time.process_time() - start
    best, plan = result.best, result.best.plan
    return {
        "seconds": seconds,
        "meshes": result.num_meshes,
        "plans": result.num_plans,
        "fit": result.num_fit,
        "best": f"{best.mesh}, {plan.schedule}, {plan.memory_mode}, places for {plan.capacity_factor or 'all'}, "
        f"gradients {plan.gradient_dtype}, step {best.time.step_seconds:.4g} s",
    }


def main() -> int:
    """Prints a line per model; returns 1 if a search took too long."""
    one_core = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    slowest = 0.0
    for model in MODELS:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.search", model],
            env=one_core,
            capture_output=True,
            text=True,
            check=True,
        )
        found = json.loads(done.stdout)
        slowest = max(slowest, found["seconds"])
        print(
            f"{model:12s} {found['seconds']:.2f} s for {found['plans']:,} plans on {found['meshes']} meshes, "
            f"{found['fit']:,} fit; best: {found['best']}"
        )
    met = slowest < BAR_SECONDS
    print(f"bar: under {BAR_SECONDS:g} s on one core: {'met' if met else 'MISSED'}")
    return 0 if met else 1


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(searched(sys.argv[1])))
        sys.exit(0)
    sys.exit(main())
