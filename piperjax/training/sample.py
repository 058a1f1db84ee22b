"""This file is `python -m piperjax sample`: text from a checkpoint, on one device."""

import argparse
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jax

    from models.config import ModelConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags; imports no JAX, so that help answers at once."""
    parser.add_argument(
        "--run", dest="directory", metavar="DIR", required=True, help="run directory of train.py"
    )
    parser.add_argument(
        "--prompt", default="def ", metavar="TEXT", help="what the text begins with (default 'def ')"
    )
    parser.add_argument("--tokens", type=int, default=200, metavar="N", help="tokens to add (default 200)")
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        metavar="X",
        help="0 takes the likeliest token (default 0.8)",
    )
    parser.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="choose among the K likeliest (default all)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="same seed, same text (default 0)")
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint to read (default the last)")


def main(args: argparse.Namespace) -> int:
    """Prints the prompt and its continuation; returns the exit code.

    Raises:
      ValueError: if a flag, the run or its checkpoint is wrong.
    """
    text = sample(
        args.directory,
        args.prompt,
        num_tokens=args.tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        seed=args.seed,
        step=args.step,
    )
    print(text)
    return 0


def sample(
    directory: str,
    prompt: str,
    *,
    num_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 0,
    seed: int = 0,
    step: int | None = None,
) -> str:
    """Returns `prompt` continued by the model that was trained in a run directory.

    Every token costs a forward over the whole context, which is at most as long as the training sequences.
    Ends early at an end of document.

    Args:
      directory: run directory.
      prompt: beginning of the text; "" starts a document.
      num_tokens: tokens to add at most.
      temperature: divides the logits; 0 always takes the likeliest token.
      top_k: tokens to choose among; 0 means all.
      seed: of the choices.
      step: checkpoint to read; the last one by default.

    Raises:
      ValueError: if an argument, the run or its checkpoint is wrong.
    """
    _check(num_tokens=num_tokens, temperature=temperature, top_k=top_k, seed=seed)

    import jax
    import numpy as np

    from piperjax.training.data import open_tokenizer
    from piperjax.training.run_file import read_run_file

    config = read_run_file(directory)
    tokenizer = open_tokenizer(config.data.tokenizer)
    params, router_bias = load_params(directory, config.model, step=step)
    next_token = _next_token(
        config.model, temperature, min(top_k, config.model.vocab_size), tokenizer.vocab_size
    )

    window = config.data.seq_len
    # A document begins after the end of another, as in training.
    context = [tokenizer.end_of_document, *tokenizer.encode(prompt).tolist()]
    added: list[int] = []
    keys = jax.random.split(jax.random.key(seed), num_tokens)
    for key in keys:
        recent = (context + added)[-window:]
        tokens = np.zeros((1, window), np.int32)
        tokens[0, : len(recent)] = recent
        token = int(next_token(params, router_bias, tokens, len(recent), key))
        if token == tokenizer.end_of_document:
            break
        added.append(token)
    return prompt + tokenizer.decode(context[1:] + added).removeprefix(tokenizer.decode(context[1:]))


def load_params(directory: str, model: "ModelConfig", *, step: int | None = None) -> tuple[Any, "jax.Array"]:
    """Returns (logical parameters, router bias) of a checkpoint on the first device.

    Raises:
      ValueError: if there is no such checkpoint, or it is damaged.
    """
    import jax
    import jax.numpy as jnp

    from models.transformer import init_params
    from piperjax.training.checkpoint import Checkpoints
    from piperjax.training.state import router_bias_shape

    checkpoints = Checkpoints(directory)
    try:
        if not checkpoints.steps:
            raise ValueError(f"there is no checkpoint in {directory} yet; let training reach its first one")
        step = checkpoints.latest_step if step is None else step
        if step not in checkpoints.steps:
            known = ", ".join(map(str, checkpoints.steps))
            raise ValueError(f"there is no checkpoint of step {step} in {directory}; there are {known}")
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shapes = jax.eval_shape(lambda: init_params(model, 0))
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), shapes
        )
        bias = jax.ShapeDtypeStruct(router_bias_shape(model), jnp.float32, sharding=here)
        return checkpoints.restore_params(step, (abstract, bias))
    finally:
        checkpoints.close()


def _check(*, num_tokens: int, temperature: float, top_k: int, seed: int) -> None:
    if num_tokens < 1:
        raise ValueError(f"--tokens must be at least 1, got {num_tokens}")
    if not math.isfinite(temperature) or temperature < 0:
        raise ValueError(f"--temperature must be 0 or positive, got {temperature}")
    if top_k < 0:
        raise ValueError(f"--top-k must be 0 (all) or positive, got {top_k}")
    if seed < 0:
        raise ValueError(f"--seed must be 0 or positive, got {seed}")


def _next_token(
    model: "ModelConfig", temperature: float, top_k: int, num_known: int
) -> Callable[..., "jax.Array"]:
    """Returns the jitted (params, router_bias, tokens [1, S], length, key) -> id of the token after `length`."""
    import jax
    import jax.numpy as jnp

    from models.transformer import forward

    @jax.jit
    def next_token(params, router_bias, tokens, length, key):
        positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        # Causal attention never sees what stands after `length`.
        output = forward(model, params, tokens, positions, jnp.ones_like(tokens), router_bias)
        logits = output.logits[0, length - 1].astype(jnp.float32)
        # Rows of the vocabulary that the tokenizer does not use were never trained.
        logits = jnp.where(jnp.arange(logits.shape[0]) < num_known, logits, -jnp.inf)
        if temperature == 0:
            return logits.argmax()
        if top_k:
            logits = jnp.where(logits < jax.lax.top_k(logits, top_k)[0][-1], -jnp.inf, logits)
        return jax.random.categorical(key, logits / temperature)

    return next_token
