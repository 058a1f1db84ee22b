"""A tiny executor with the face of the real one, so that tests of training need no pipeline; and bad input for it."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from models.config import GroupedQueryAttention, LayerConfig, ModelConfig, MoEFFN, Router
from piperjax.training import cli, loop

ROOT = Path(__file__).parents[2]


class Stats(NamedTuple):
    """As `piperjax.runtime.executor.StepStats`."""

    loss: Any
    aux_loss: Any
    num_tokens: Any
    load: Any
    overflow: Any


@dataclass(frozen=True)
class BigramExecutor:
    """Predicts the next token from the last: embedding @ head, with a router that only counts.

    The device layout splits layers over `pipe` and pads the vocabulary to a multiple of it, as the real one does.
    """

    config: ModelConfig
    pipe: int = 1
    num_devices: int = 2
    compiler_options = {}  # noqa: RUF012

    @cached_property
    def mesh(self):
        devices = jax.devices()[: self.num_devices]
        return jax.make_mesh((self.num_devices,), ("data",), axis_types=(AxisType.Auto,), devices=devices)

    @property
    def batch_sharding(self):
        return NamedSharding(self.mesh, P(None, "data", None))

    def _draw(self, seed):
        V, D, E = self.config.vocab_size, self.config.d_model, self.config.num_experts
        keys = jax.random.split(jax.random.key(seed), 3)
        router = jax.random.normal(keys[2], (self.config.num_layers, D, E))
        return {
            "embedding": 0.5 * jax.random.normal(keys[0], (V, D)),
            "final_norm": jnp.ones(D),
            "head": 0.1 * jax.random.normal(keys[1], (V, D)),
            "layers": {"moe": {"ffn": {"router": router}}},
        }

    def _spread(self, tree):
        rows = -tree["embedding"].shape[0] % self.pipe
        padded = {name: jnp.pad(tree[name], ((0, rows), (0, 0))) for name in ("embedding", "head")}
        layers = jax.tree.map(lambda leaf: leaf.reshape(self.pipe, -1, *leaf.shape[1:]), tree["layers"])
        return {**padded, "final_norm": tree["final_norm"], "layers": layers}

    def _collect(self, tree):
        cut = {name: tree[name][: self.config.vocab_size] for name in ("embedding", "head")}
        layers = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), tree["layers"])
        return {**cut, "final_norm": tree["final_norm"], "layers": layers}

    def _sharded(self, shapes):
        def one(leaf):
            spec = P(*("data" if size % self.num_devices == 0 else None for size in leaf.shape[-1:]))
            spec = P(*[None] * (len(leaf.shape) - 1), *spec)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(self.mesh, spec))

        return jax.tree.map(one, shapes)

    @cached_property
    def abstract_params(self):
        return self._sharded(jax.eval_shape(lambda: self._spread(self._draw(0))))

    @cached_property
    def abstract_logical(self):
        return self._sharded(jax.eval_shape(lambda: self._draw(0)))

    def init_params(self, seed):
        out = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_params)
        return jax.jit(lambda: self._spread(self._draw(seed)), out_shardings=out)()

    def to_logical(self, tree, placement=None):
        del placement  # It has no experts.
        return jax.jit(
            self._collect, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, self.abstract_logical)
        )(tree)

    def from_logical(self, tree, placement=None):
        del placement
        return jax.jit(
            self._spread, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, self.abstract_params)
        )(tree)

    def _loss(self, params, router_bias, batch):
        x = params["embedding"][batch["tokens"]] * params["final_norm"]
        logits = (x @ params["head"].T)[..., : self.config.vocab_size]
        picked = jnp.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
        entropy = jax.nn.logsumexp(logits, -1) - picked
        num_tokens = batch["weights"].sum()
        router = params["layers"]["moe"]["ffn"]["router"].reshape(
            -1, *logits.shape[:0], x.shape[-1], self.config.num_experts
        )
        scores = jnp.einsum("mbsd,lde->lmbse", x, router) + router_bias[:, None, None, None]
        chosen = jax.nn.one_hot(scores.argmax(-1), self.config.num_experts)
        load = jax.lax.stop_gradient(chosen.sum((1, 2, 3)))
        loss = (entropy * batch["weights"]).sum() / jnp.maximum(num_tokens, 1)
        return loss, Stats(loss, jnp.float32(0.01), num_tokens, load, jnp.float32(0))

    def gradients(self, params, router_bias, batch, placement=None):
        del placement
        return jax.grad(self._loss, has_aux=True)(params, router_bias, batch)

    def evaluate(self, params, router_bias, batch, placement=None):
        del placement
        return self._loss(params, router_bias, batch)[1]


def make_model(vocab_size=33, balance="bias", num_layers=4):
    attention = GroupedQueryAttention(num_heads=2, num_kv_heads=1, head_dim=8)
    router = Router(balance=balance, bias_update_rate=0.05)
    ffn = MoEFFN(num_experts=4, experts_per_token=1, d_ff=16, router=router)
    layers = (LayerConfig(attention=attention, ffn=ffn),) * num_layers
    return ModelConfig(name="bigram", d_model=8, vocab_size=vocab_size, layers=layers)


def make_batch(model, seed, shape=(2, 4, 16)):
    """A batch [M, B, S] of a text in which token t is followed by (3 t + 1) mod V, mostly."""
    generator = np.random.default_rng(seed)
    M, B, S = shape
    text = generator.integers(0, model.vocab_size, (M, B, S + 1))
    for position in range(1, S + 1):
        follows = generator.random((M, B)) < 0.9
        text[..., position] = np.where(
            follows, (3 * text[..., position - 1] + 1) % model.vocab_size, text[..., position]
        )
    return {
        "tokens": text[..., :-1].astype(np.int32),
        "targets": text[..., 1:].astype(np.int32),
        "positions": np.broadcast_to(np.arange(S, dtype=np.int32), shape).copy(),
        "segment_ids": np.ones(shape, np.int32),
        "weights": np.ones(shape, np.float32),
    }


@pytest.fixture(scope="session", autouse=True)
def all_devices():
    """Starts JAX with all its devices before a test asks for fewer."""
    return jax.devices()


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def executor(model):
    return BigramExecutor(model)


@pytest.fixture
def bigram():
    """The builders of this file, for tests that need other models, meshes or batches."""

    class Builders:
        executor = BigramExecutor
        model = staticmethod(make_model)
        batch = staticmethod(make_batch)

    return Builders


class _BadInput:
    """What tests of bad input share: a run to begin with, and what must hold after a mistake."""

    RUN = "--model bigram.json --data text --batch 8 --seq 32 --microbatches 2 --devices 1 --set data.cache_dir=cache"
    DONE = f"{RUN} --steps 6 --out runs/done"

    @staticmethod
    def contents(directory):
        return {
            path.relative_to(directory): path.read_bytes()
            for path in directory.rglob("*")
            if path.is_file() and path.name != ".lock" and "cache" not in path.relative_to(directory).parts
        }

    @staticmethod
    def assert_one_sentence(capfd, code, words, program="train.py"):
        error = capfd.readouterr().err
        assert code == 2, error
        assert error.startswith(f"{program}: error: ") and error.count("\n") == 1 and error.endswith("\n"), (
            error
        )
        assert all(word in error for word in words), error
        assert len(error) < 600, "a sentence, not an essay"

    @staticmethod
    def assert_program_ends_quietly(flags, directory, xla_flags=""):
        """Runs train.py in `directory`; returns its sentence."""
        environment = {**os.environ, "XLA_FLAGS": xla_flags}
        command = [sys.executable, str(ROOT / "train.py"), *flags.split()]
        result = subprocess.run(
            command, capture_output=True, text=True, cwd=directory, env=environment, check=False
        )
        assert result.returncode == 2
        assert result.stderr.startswith("train.py: error: ") and result.stderr.count("\n") == 1, result.stderr
        return result.stderr


@pytest.fixture(scope="session")
def bad_input():
    return _BadInput


@pytest.fixture
def small_executor(monkeypatch, bigram):
    def build(model, plan, mesh, dtype):
        return bigram.executor(model, pipe=plan.pipe, num_devices=plan.data * plan.expert)

    monkeypatch.setattr(loop, "Executor", build)
    # Nothing is predicted of the small executor.
    monkeypatch.setattr(loop, "compare", lambda *_, **__: None)
    monkeypatch.setattr(loop, "compiled_lines", lambda _: "compiled  as predicted")


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    """A directory with a text, a model file, and a run that was saved at steps 2 and 4."""
    directory = tmp_path_factory.mktemp("workspace")
    (directory / "text").mkdir()
    for number in range(8):
        (directory / f"text/{number}.txt").write_text("to be or not to be, that is the question\n" * 40)
    return directory


@pytest.fixture
def here(workspace, tmp_path, monkeypatch, small_executor, bigram, capfd):
    """A copy of the workspace as the current directory; the run is made by the first test that asks."""
    if not (workspace / "runs").exists():
        monkeypatch.chdir(workspace)
        (workspace / "bigram.json").write_text(json.dumps(bigram.model(vocab_size=257).to_dict()))
        begin = f"{_BadInput.RUN} --steps 4 --out runs/done --set checkpoint.every_steps=2"
        assert cli.main(begin.split()) == 0
    shutil.copytree(workspace, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    capfd.readouterr()
    return tmp_path
