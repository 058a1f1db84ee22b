"""This file is the FLOP that our executor runs on a device in one step, recomputation included."""

from models import cost
from models.config import DenseFFN, LayerConfig, ModelConfig, MoEFFN
from models.query_blocks import is_in_blocks
from piperjax.planner.plan import Plan


def executed_flop(model: ModelConfig, plan: Plan, *, backend: str = "gpu") -> float:
    """FLOP of matrix products per device and step, on average over the devices.

    Useful work is `cost.flop_per_token(...).step`. Beyond it our layers compute all S^2 attention scores, not the
    causal half, and run again what a memory mode does not keep. Long sequences, whose attention works on a block of
    queries at a time, compute the scores once more in backward, but memory mode "products" does not run it again.

    Args:
      model: the model.
      plan: its plan.
      backend: "cpu" for simulated devices, where what waits at the end of a chunk of tokens is run again though nobody
        needs it: there a barrier is an operation.
    """
    tokens = plan.batch_size * plan.seq_len
    layers = sum(
        _layer(model, layer, plan, mode, backend)
        for layer, mode in zip(model.layers, plan.layer_modes, strict=True)
    )
    rows = model.vocab_size
    if plan.vocabulary == "split":
        rows = -(-rows // plan.pipe) * plan.pipe
    return tokens * (layers + 3 * 2 * rows * model.d_model) / plan.num_devices


def _layer(model: ModelConfig, layer: LayerConfig, plan: Plan, memory_mode: str, backend: str) -> float:
    """FLOP of all passes of a layer per token."""
    flop = cost.layer_flop(model, layer, plan.seq_len)
    forward = flop.total + flop.attention_scores
    in_blocks = is_in_blocks(plan.seq_len)
    again = flop.attention_scores if in_blocks else 0
    if memory_mode == "stash":
        return 3 * forward + again
    if memory_mode == "products":
        return 3 * forward + (again if in_blocks else 2 * flop.attention_scores)
    # What a layer adds to the residual stream last is not needed again. (Experts weigh their hidden rows by the gates.)
    ffn, last = layer.ffn, 0
    if isinstance(ffn, DenseFFN):
        last = 2 * model.d_model * ffn.d_ff
    elif isinstance(ffn, MoEFFN):
        beside = ffn.dense_residual_d_ff + (0 if ffn.shared_gate == "sigmoid" else ffn.shared_d_ff)
        # All chunks of the tokens but the last are waited for.
        waits = backend == "cpu" and memory_mode != "named"
        left_out = 1 / plan.dispatch_chunks if waits else 1
        last = 2 * model.d_model * (beside + left_out * ffn.d_ff * ffn.experts_per_token)
    stage = forward if memory_mode == "stage" else 0
    return 4 * forward - last + stage + again
