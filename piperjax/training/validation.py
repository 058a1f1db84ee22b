"""This file is the validation: the loss on held-out text, beside what a model without order would reach."""

import math
from collections.abc import Callable
from typing import Any

from piperjax.training import distributed
from piperjax.training.config import TrainConfig
from piperjax.training.data import Dataset, ValidationBatches
from piperjax.training.metrics import Record
from piperjax.training.state import Executor, TrainState


def validate(
    config: TrainConfig,
    executor: Executor,
    evaluate: Callable[..., Any],
    *,
    dataset: Dataset,
    state: TrainState,
    step: int,
) -> Record | None:
    """Returns the validation record of a step, None if no text is held out.

    The loss is the mean in nats per token over the first `log.validation_batches` batches of held-out text, the
    same at every step. `unigram_entropy`, also in nats per token, is the loss of the best model that knows the
    frequency of every token and nothing else.
    """
    if not dataset.validation_targets:
        return None
    plan, sharding = config.plan, executor.batch_sharding
    shape = (plan.num_microbatches, plan.microbatch_size, plan.seq_len)
    rows = distributed.local_rows(sharding, shape)
    batches = ValidationBatches(
        dataset.validation, batch_size=plan.batch_size, num_microbatches=plan.num_microbatches, rows=rows
    )
    total = num_tokens = 0.0
    for index in range(min(len(batches), config.log.validation_batches)):
        batch = distributed.place_batch(batches[index], sharding, rows=rows, num_rows=shape[1])
        stats = evaluate(state.params, state.router_bias, batch, state.placement)
        total += float(stats.loss) * float(stats.num_tokens)
        num_tokens += float(stats.num_tokens)
    loss = total / num_tokens
    return {
        "step": step,
        "validation_loss": loss,
        "bits_per_byte": loss / math.log(2) / dataset.bytes_per_token,
        "unigram_entropy": dataset.unigram_entropy,
        "validation_tokens": round(num_tokens),
    }
