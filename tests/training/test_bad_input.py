"""Bad input: every mistake is one sentence that says what to do, exit code 2, and nothing overwritten.

A case is a command line and words of the sentence. Bad files: test_bad_files.py; bad runs: test_bad_runs.py.
"""

import numpy as np
import pytest

from piperjax import __main__ as piperjax_main
from piperjax.training import cli

COMMAND_LINES = [
    ("--modle tiny", ["no flag --modle", "did you mean --model"]),
    ("--data_parallel 2", ["no flag --data_parallel", "--data-parallel"]),
    ("tiny", ["'tiny' belongs to no flag"]),
    ("--steps", ["--steps", "expected one argument"]),
    ("--steps many", ["--steps", "'many'"]),
    ("--steps 0", ["steps must be a whole number of at least 1", "got 0"]),
    ("--steps 2.5", ["--steps", "'2.5'"]),
    ("--model tinny", ["no model named 'tinny'", "did you mean 'tiny'"]),
    ("--model missing.json", ["cannot read model file missing.json", "No such file"]),
    ("--batch 0", ["data.batch_size must be a whole number of at least 1", "got 0"]),
    ("--batch -4", ["data.batch_size", "got -4"]),
    ("--seq 1", ["data.seq_len must be a whole number of at least 2", "got 1"]),
    ("--dtype fp8", ["dtype must be one of float32, bfloat16", "'fp8'"]),
    ("--seed -1", ["seed must be a whole number of at least 0"]),
    ("--log-every 0", ["log.log_every must be a whole number of at least 1"]),
    ("--schedule 1f2b", ["no schedule named '1f2b'", "1f1b"]),
    ("--platform fronteir", ["no platform named 'fronteir'", "frontier"]),
    ("--platform missing.toml", ["missing.toml"]),
    ("--devices 0", ["at least 1", "got 0"]),
    ("--devices 1000", ["1000"]),
    ("--plan missing.json", ["cannot read plan file missing.json", "No such file"]),
    ("--plan bigram.json", ["plan file bigram.json: a plan has the fields", "missing: batch_size"]),
    ("--plan text/0.txt", ["plan file text/0.txt is not valid JSON", "piperjax plan --out text/0.txt"]),
    ("--plan runs/done/run.json --pipe 2", ["--plan runs/done/run.json already says what --pipe says"]),
    ("--plan runs/done/run.json --mesh auto", ["already says what --mesh says"]),
    ("--plan runs/done/run.json --model bigram.json --batch 16", ["= 1 devices, but there are 8"]),
    ("--plan runs/done/run.json --model bigram.json", ["= 1 devices, but there are 8"]),
    ("--plan runs/done/run.json", ["no model named 'bigram'"]),
    ("--mesh pip=2", ["--mesh must be auto or sizes such as pipe=2,expert=4,data=1", "'pip=2'"]),
    ("--mesh pipe=two", ["--mesh must be auto or sizes", "'pipe=two'"]),
    ("--mesh pipe=2 --expert 4", ["--mesh pipe=2 and --expert contradict"]),
    ("--pipe 0", ["--pipe must be at least 1, or -1"]),
    ("--expert -2", ["--expert must be at least 1, or -1", "got -2"]),
    ("--pipe -1 --expert -1", ["only one axis can be -1"]),
    ("--pipe 3 --expert 1 --data-parallel 1", ["8 devices", "3"]),
    ("--pipe 3 --expert -1", ["--expert -1 cannot take what is left", "8 devices"]),
    ("--expert 3 --data-parallel 1 --pipe 1 --devices 3", ["8 experts of tiny", "got 3"]),
    ("--pipe 8 --expert 1 --data-parallel 1", ["8 stages needs at least 8 layers, got 4"]),
    ("--pipe 2 --microbatches 3", ["16 sequences", "3 microbatches"]),
    ("--batch 10 --data-parallel 8 --pipe 1 --expert 1", ["10 sequences", "multiple of 8"]),
    ("--microbatches 0", ["--microbatches must be at least 1, got 0"]),
    ("--set optimizer.peak_lr", ["--set takes FIELD=VALUE", "'optimizer.peak_lr'"]),
    ("--set optimizer.peek_lr=1", ["no field 'optimizer.peek_lr'", "did you mean 'optimizer.peak_lr'"]),
    ("--set optimiser.peak_lr=1", ["no field 'optimiser'", "did you mean 'optimizer'"]),
    ("--set optimizer.peak_lr=fast", ["optimizer.peak_lr must be a number, got 'fast'"]),
    ("--set optimizer.peak_lr=-1", ["optimizer.peak_lr must be a number above 0, got -1.0"]),
    ("--set optimizer.betas=0.9", ["optimizer.betas must be 2 values"]),
    ("--set optimizer.betas=0.9,1.5", ["optimizer.betas", "from 0 to below 1"]),
    ("--set plan=none", ["plan is a group of fields"]),
    ("--set plan.pipes=2", ["no field 'plan.pipes'", "did you mean 'plan.pipe'"]),
    (
        "--set plan.memory_mode=all",
        ["memory_mode must be one of stage, layer, named, products, stash, got 'all'"],
    ),
    ("--schedule zb_w", ["no schedule named 'zb_w'", "did you mean"]),
    (
        "--schedule interleaved --set plan.num_chunks=two",
        ["plan.num_chunks must be a whole number, got 'two'"],
    ),
    ("--set plan.overlap=perhaps", ["plan.overlap must be true or false, got 'perhaps'"]),
    ("--schedule missing.csv", ["cannot read the schedule file missing.csv"]),
    ("--schedule zb_v --set plan.num_chunks=3", ["'zb_v' has 2 stages per pipe rank, got 3"]),
    ("--set plan.capacity_factor=-1", ["capacity_factor", "-1"]),
    ("--set plan.layers_per_stage=2,3", ["layers_per_stage"]),
    ("--set plan.seq_len=64", ["plan.seq_len and data.seq_len must agree"]),
    ("--set model.layers.*.ffn.num_expert=4", ["no field", "num_expert"]),
    ("--set model.layers.9.ffn.d_ff=4", ["model.layers.9 does not exist", "0 to 3"]),
    ("--set model.d_model=0", ["d_model of a ModelConfig must be a whole number of at least 1"]),
    ("--set checkpoint.keep=0", ["checkpoint.keep must be a whole number of at least 1"]),
    ("--set data.validation_fraction=1.5", ["data.validation_fraction", "1.5"]),
    ("--set log.progress=loud", ["log.progress must be one of auto, bar, plain, none"]),
    ("--set model.vocab_size=100", ["257 tokens", "vocab_size 100", "--set model.vocab_size=257"]),
    ("--coordinator host:1234", ["go together", "--processes is missing"]),
    ("--processes 2 --process-id 0", ["go together", "--coordinator is missing"]),
    ("--coordinator host --processes 2 --process-id 0", ["--coordinator must be HOST:PORT", "'host'"]),
    ("--coordinator host:99999 --processes 2 --process-id 0", ["--coordinator must be HOST:PORT"]),
    ("--coordinator host:1 --processes 2 --process-id 2", ["--process-id must lie in 0..1", "got 2"]),
    ("--coordinator host:1 --processes 0 --process-id 0", ["--processes must be at least 1"]),
    ("--resume runs/none", ["runs/none is not the directory of a run", "run.json"]),
    ("--resume runs/done --out runs/other", ["--resume and --out both name the run directory"]),
    ("--out bigram.json", ["cannot make the run directory bigram.json"]),
    ("--out bigram.json/run", ["cannot make the run directory bigram.json/run"]),
]


@pytest.mark.parametrize(("flags", "words"), COMMAND_LINES, ids=[line for line, _ in COMMAND_LINES])
def test_command_lines(bad_input, here, capfd, flags, words):
    before = bad_input.contents(here)
    code = cli.main(f"--set data.cache_dir=cache {flags}".split())
    bad_input.assert_one_sentence(capfd, code, words)
    assert bad_input.contents(here) == before


# XLA_FLAGS, and words of the sentence: XLA itself would abort with a dump of memory.
XLA_FLAGS = [
    ("--xla_no_such_flag=1", ["XLA_FLAGS has --xla_no_such_flag=1, which is not known", "take it out"]),
    (
        "--xla_gpu_enable_async_collectives=true",
        ["=true, which was removed from XLA and would end the process"],
    ),
    (
        "--xla_cpu_enable_fast_math=perhaps",
        ["--xla_cpu_enable_fast_math=perhaps, which is not known, or not with"],
    ),
    ("missing-file", ["XLA_FLAGS names the file missing-file", "--name=value"]),
    ("--xla_dump_to='a", ["a quotation mark that is not closed"]),
]


@pytest.mark.parametrize(("xla_flags", "words"), XLA_FLAGS, ids=[flags for flags, _ in XLA_FLAGS])
def test_compiler_flags(bad_input, here, xla_flags, words):
    sentence = bad_input.assert_program_ends_quietly("--model bigram.json --data text", here, xla_flags)
    assert all(word in sentence for word in words), sentence
    assert not (here / "runs/bigram").exists()


SAMPLES = [
    ("sample", ["--run"]),
    ("sample --run runs/none", ["runs/none is not the directory of a run"]),
    ("sample --run runs/done --step 99", ["no checkpoint of step 99", "2, 4"]),
    ("sample --run runs/done --tokens 0", ["--tokens must be at least 1"]),
    ("sample --run runs/done --temperature -1", ["--temperature must be 0 or positive"]),
    ("sample --run runs/done --temperature hot", ["--temperature", "'hot'"]),
    ("sample --run runs/done --top-k -3", ["--top-k must be 0 (all) or positive"]),
    ("sample --run runs/done --seed -3", ["--seed must be 0 or positive"]),
]


DOCTOR = [
    ("doctor --platform fronteir", ["no platform named 'fronteir'", "did you mean 'frontier'"]),
    ("doctor --platform missing.toml", ["cannot read platform file missing.toml"]),
    ("doctor --jsn", ["unrecognized arguments: --jsn"]),
    ("doctor --out", ["--out: expected one argument"]),
]


@pytest.mark.parametrize(
    ("flags", "words"), [*SAMPLES, *DOCTOR], ids=[line for line, _ in [*SAMPLES, *DOCTOR]]
)
def test_other_commands(bad_input, here, capfd, flags, words):
    try:
        code = piperjax_main.main(flags.split())
    except SystemExit as error:
        code = error.code
    bad_input.assert_one_sentence(capfd, code, words, program="piperjax")


def test_a_model_that_cannot_be_trained_yet(bad_input, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("to be or not to be " * 100)
    flags = "--model deepseek_v2_lite --data a.txt --seq 16 --batch 1 --devices 1 --set data.cache_dir=cache"
    bad_input.assert_one_sentence(
        capfd, cli.main(flags.split()), ["LatentAttention", "planned but not yet trained"]
    )
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("flags", ["--modle tiny", "--devices 2 --pipe 8", "--data missing.txt"])
def test_the_program_itself_ends_quietly(bad_input, here, flags):
    bad_input.assert_program_ends_quietly(flags, here)


def test_the_table_is_long_enough():
    assert sum(map(len, (COMMAND_LINES, XLA_FLAGS, SAMPLES, DOCTOR))) >= 85
    assert np.unique([line for line, _ in COMMAND_LINES]).size == len(COMMAND_LINES)
