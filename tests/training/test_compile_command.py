"""`python -m piperjax compile`: tables, JSON, and one sentence for a mistake."""

import json

import pytest

from piperjax.__main__ import main
from piperjax.runtime import absent_gpus
from piperjax.training import compile_check

FLAGS = [
    "compile",
    "--model",
    "tiny",
    "--pipe",
    "2",
    "--expert",
    "2",
    "--data-parallel",
    "1",
    "--batch",
    "8",
    "--seq",
    "64",
]


@pytest.fixture(autouse=True)
def keep_jax_settings():
    import jax

    platforms = jax.config.jax_platforms
    yield
    jax.config.update("jax_platforms", platforms)


def test_a_plan_is_compiled_and_compared(capsys, monkeypatch):
    # One program is enough for both ways to print; of the second plan, only what was asked for is looked at.
    compile_step, found = compile_check.compile_step, []

    def compile_once(executor, config, *, gpu):
        assert gpu is None
        if not found:
            found.append(compile_step(executor, config))
        return found[0]

    monkeypatch.setattr(compile_check, "compile_step", compile_once)
    assert main([*FLAGS, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["plan"]["pipe"] == 2
    assert told["argument_bytes"]["moments"] == 2 * told["argument_bytes"]["parameters"]
    assert told["compiled_flop"] == pytest.approx(told["predicted_flop"], rel=0.02)
    assert -0.02 < told["memory_error"] < 0.12
    assert main([*FLAGS, "--set", "plan.memory_mode=stage"]) == 0
    assert "memory mode stage" in capsys.readouterr().out


def test_gpus_need_a_plugin(capsys, monkeypatch):
    monkeypatch.setattr(absent_gpus, "PLUGINS", {"rocm": ("no-such-plugin",)})
    assert main([*FLAGS, "--platform", "frontier", "--target", "gpu"]) == 2
    error = capsys.readouterr().err
    assert (
        "takes JAX's plugin for ROCM, which is not installed: pip install" in error
        and len(error.strip().splitlines()) == 1
    )


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--model", "tinny"], "no model named 'tinny'; did you mean 'tiny'?"),
        (["--pipe", "3", "--devices", "4"], "no mesh of 4 devices has pipe=3; the nearest that is"),
        (["--set", "plan=stage"], "plan is a group of fields; set plan.memory_mode"),
        (["--pipe", "-1"], "give --devices as well"),
        (
            ["--model", "deepseek_v3", "--pipe", "1", "--expert", "8", "--seq", "128"],
            "can be planned but not yet trained",
        ),
        (
            ["--platform", "cpu8", "--target", "gpu"],
            "--target gpu needs a --platform whose file says which GPU",
        ),
    ],
)
def test_a_mistake_is_one_sentence(capsys, flags, sentence):
    assert main(["compile", *flags]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert len(error.strip().splitlines()) == 1
