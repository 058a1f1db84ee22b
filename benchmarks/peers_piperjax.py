"""Our side of `benchmarks.peers`: whole training steps, timed one by one. Prints one line of JSON."""

import json
import sys
import time

import jax
import jax.numpy as jnp

from benchmarks.cases import make_executor, random_batch
from models.presets import preset
from piperjax.training.config import DataConfig, TrainConfig
from piperjax.training.state import init_state, make_train_step


def main() -> None:
    """Times the steps."""
    size = json.loads(sys.argv[1])
    model = preset("peers_bench")
    executor = make_executor(
        model,
        num_microbatches=1,
        microbatch_size=size["batch_size"],
        seq_len=size["seq_len"],
        memory_mode=size["memory_mode"],
    )
    data = DataConfig(batch_size=size["batch_size"], seq_len=size["seq_len"])
    config = TrainConfig(model=model, plan=executor.plan, data=data, steps=size["steps"])
    step = make_train_step(executor, config)
    state = init_state(executor, 0)
    batch = jax.device_put(random_batch(model, executor.plan), executor.batch_sharding)
    stop = jnp.zeros(1, jnp.int32)
    seconds, losses = [], []
    for _ in range(size["steps"]):
        start = time.perf_counter()
        state, metrics = step(state, batch, stop)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - start)
        losses.append(float(metrics.loss))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    print(json.dumps({"seconds": seconds, "first_loss": losses[0], "parameters": parameters}))


if __name__ == "__main__":
    main()
