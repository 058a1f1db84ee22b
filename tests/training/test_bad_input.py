"""Bad input: every mistake is one sentence that says what to do, exit code 2, and nothing overwritten.

A case is a command line, what is broken beforehand, and words of the sentence.
"""

import gc
import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers

from piperjax import __main__ as piperjax_main
from piperjax.training import cli, loop

ROOT = Path(__file__).parents[2]
RUN = "--model bigram.json --data text --batch 8 --seq 32 --microbatches 2 --devices 1 --set data.cache_dir=cache"
DONE = f"{RUN} --steps 6 --out runs/done"


@pytest.fixture
def small_executor(monkeypatch, bigram):
    def build(model, plan, mesh, dtype):
        return bigram.executor(model, pipe=plan.pipe, num_devices=plan.data * plan.expert)

    monkeypatch.setattr(loop, "Executor", build)
    # Nothing is predicted of the small executor.
    monkeypatch.setattr(loop, "compare", lambda *_, **__: None)
    monkeypatch.setattr(loop, "compiled_lines", lambda _: "compiled  as predicted")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, request):
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
        begin = f"{RUN} --steps 4 --out runs/done --set checkpoint.every_steps=2"
        assert cli.main(begin.split()) == 0
    shutil.copytree(workspace, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    capfd.readouterr()
    return tmp_path


def contents(directory):
    return {
        path.relative_to(directory): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.name != ".lock" and "cache" not in path.relative_to(directory).parts
    }


def assert_one_sentence(capfd, code, words, program="train.py"):
    error = capfd.readouterr().err
    assert code == 2, error
    assert error.startswith(f"{program}: error: ") and error.count("\n") == 1 and error.endswith("\n"), error
    assert all(word in error for word in words), error
    assert len(error) < 600, "a sentence, not an essay"


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
def test_command_lines(here, capfd, flags, words):
    before = contents(here)
    code = cli.main(f"--set data.cache_dir=cache {flags}".split())
    assert_one_sentence(capfd, code, words)
    assert contents(here) == before


def write_jsonl(path, *lines):
    path.write_text("".join(line + "\n" for line in lines))


def write_gzip_half(path):
    content = gzip.compress(b"to be or not to be " * 500)
    path.write_bytes(content[: len(content) // 2])


def write_parquet(path, column):
    pyarrow.parquet.write_table(pyarrow.table({column: ["a", "b"]}), path)


DATA_FILES = [
    ("missing", "missing.txt", None, ["missing.txt", "no file"]),
    ("empty", "a.txt", lambda path: path.write_text(""), ["a.txt", "empty"]),
    ("binary", "a.txt", lambda path: path.write_bytes(b"ab\0cd" * 100), ["a.txt", "binary"]),
    ("not unicode", "a.txt", lambda path: path.write_bytes(b"caf\xe9 " * 100), ["a.txt", "UTF-8"]),
    (
        "broken json",
        "a.jsonl",
        lambda path: write_jsonl(path, '{"text": "a"}', '{"text": '),
        ["a.jsonl", "line 2"],
    ),
    ("no field text", "a.jsonl", lambda path: write_jsonl(path, '{"body": "a"}'), ["a.jsonl", "text"]),
    ("text is a number", "a.jsonl", lambda path: write_jsonl(path, '{"text": 3}'), ["a.jsonl", "line 1"]),
    ("broken parquet", "a.parquet", lambda path: path.write_bytes(b"PAR1 nothing"), ["a.parquet"]),
    ("no column text", "a.parquet", lambda path: write_parquet(path, "body"), ["a.parquet", "text"]),
    ("unknown kind", "a.exe", lambda path: path.write_text("hello"), ["a.exe", ".txt"]),
    ("empty directory", "nothing", lambda path: path.mkdir(), ["nothing"]),
    ("glob of nothing", "nothing/*.txt", None, ["nothing/*.txt"]),
    ("cut off gzip", "a.txt.gz", write_gzip_half, ["a.txt.gz"]),
    ("not gzip", "a.txt.gz", lambda path: path.write_text("plain text"), ["a.txt.gz"]),
    ("too little text", "a.txt", lambda path: path.write_text("short"), ["a.txt", "too few", "32"]),
    ("stray comma", "text,,text", None, ["text,,text", "comma"]),
]


@pytest.mark.parametrize(
    ("path", "write", "words"), [row[1:] for row in DATA_FILES], ids=[row[0] for row in DATA_FILES]
)
def test_data_files(here, capfd, path, write, words):
    if write is not None:
        write(here / path)
    before = contents(here)
    code = cli.main([*RUN.split(), "--data", path, "--out", "runs/new"])
    assert_one_sentence(capfd, code, words)
    assert contents(here) == before and not (here / "runs/new").exists()


def write_tokenizer(path, vocabulary):
    tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>")).save(str(path))


def large_vocabulary():
    return {"<unk>": 0, "<|endoftext|>": 1} | {f"word{number}": number for number in range(2, 400)}


TOKENIZERS = [
    ("missing", "none.json", None, ["none.json"]),
    ("a directory without", "text", None, ["text", "tokenizer.json"]),
    ("not json", "t.json", lambda path: path.write_text("hello"), ["t.json"]),
    ("another json", "t.json", lambda path: path.write_text('{"a": 1}'), ["t.json"]),
    ("binary", "t.json", lambda path: path.write_bytes(bytes(range(256))), ["t.json"]),
    ("no end of document", "t.json", lambda path: write_tokenizer(path, {"<unk>": 0, "b": 1}), ["end"]),
    (
        "too many tokens",
        "t.json",
        lambda path: write_tokenizer(path, large_vocabulary()),
        ["'t.json' has 400 tokens", "vocab_size 257", "--set model.vocab_size=400"],
    ),
]


@pytest.mark.parametrize(
    ("path", "write", "words"), [row[1:] for row in TOKENIZERS], ids=[row[0] for row in TOKENIZERS]
)
def test_tokenizers(here, capfd, path, write, words):
    if write is not None:
        write(here / path)
    before = contents(here)
    code = cli.main([*RUN.split(), "--tokenizer", path, "--out", "runs/new"])
    assert_one_sentence(capfd, code, words)
    assert contents(here) == before


def write_model(path, change):
    values = json.loads(path.with_name("bigram.json").read_text())
    change(values)
    path.write_text(json.dumps(values))


MODELS = [
    ("not json", lambda path: path.write_text("model"), ["m.json is not valid JSON"]),
    ("a list", lambda path: path.write_text("[]"), ["m.json", "must be an object"]),
    ("unknown field", lambda path: write_model(path, lambda v: v.update(width=3)), ["no field 'width'"]),
    (
        "missing field",
        lambda path: write_model(path, lambda v: v.pop("d_model")),
        ["needs the field 'd_model'"],
    ),
    ("no layers", lambda path: write_model(path, lambda v: v.update(layers=[])), ["layers"]),
    (
        "odd heads",
        lambda path: write_model(path, lambda v: v["layers"][0]["attention"].update(num_kv_heads=3)),
        ["num_kv_heads must divide num_heads"],
    ),
]


@pytest.mark.parametrize(("write", "words"), [row[1:] for row in MODELS], ids=[row[0] for row in MODELS])
def test_model_files(here, capfd, write, words):
    write(here / "m.json")
    code = cli.main([*RUN.split(), "--model", "m.json", "--out", "runs/new"])
    assert_one_sentence(capfd, code, words)
    assert not (here / "runs/new").exists()


def change_json(path, change):
    values = json.loads(path.read_text())
    path.write_text(json.dumps(change(values)))


def truncate_arrays(step):
    for path in (step / "arrays").rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def other_arrays(step):
    """The description is that of this run, the arrays are of a narrower model."""
    path = step / "description/metadata"
    change_json(
        path, lambda v: v | {"arrays": v["arrays"] | {"params/head": {"shape": [257, 4], "checksum": 1}}}
    )


def swapped_value(step):
    path = step / "description/metadata"

    def change(values):
        values["arrays"]["params/head"]["checksum"] += 1
        return values

    change_json(path, change)


def empty_directory(step):
    shutil.rmtree(step)
    step.mkdir()


GO_BACK = "delete that directory to resume from step 2"
RUNS = [
    ("arrays cut off", truncate_arrays, "", ["runs/done/checkpoints/4 is damaged", GO_BACK]),
    ("arrays gone", lambda step: shutil.rmtree(step / "arrays"), "", ["4 is damaged", GO_BACK]),
    ("a value changed", swapped_value, "", ["4 is damaged", "params/head differ", GO_BACK]),
    ("description gone", lambda step: shutil.rmtree(step / "description"), "", ["4 is damaged", GO_BACK]),
    (
        "description cut off",
        lambda step: (step / "description/metadata").write_text('{"for'),
        "",
        ["4 is damaged"],
    ),
    ("empty directory", empty_directory, "", ["4 is damaged", GO_BACK]),
    (
        "a later format",
        lambda step: change_json(step / "description/metadata", lambda v: v | {"format": 2}),
        "",
        ["checkpoints/4 has format 2, but this version reads format 1"],
    ),
    (
        "arrays of another model",
        other_arrays,
        "",
        ["belongs to another model: params/head is [257, 4] there"],
    ),
    ("another model", None, "--set model.d_model=16", ["model.d_model was 8, but now it is 16", "--out"]),
    ("another seed", None, "--seed 9", ["seed was 0, but now it is 9", "--out"]),
    ("another text", None, "--data text/1.txt", ["data.path was", "text/1.txt", "--out"]),
    ("another length", None, "--seq 16", ["data.seq_len was 32, but now it is 16"]),
    ("another batch", None, "--batch 4", ["data.batch_size was 8, but now it is 4"]),
    (
        "resume as another model",
        None,
        "--resume runs/done --model tiny --set data.cache_dir=cache",
        ["model.name was"],
    ),
    ("resume with another seed", None, "--resume runs/done --seed 3", ["seed was 0, but now it is 3"]),
    (
        "run.json is no json",
        lambda step: (step.parents[1] / "run.json").write_text("{"),
        "--resume runs/done",
        ["runs/done/run.json is not valid JSON"],
    ),
    (
        "run.json is empty",
        lambda step: (step.parents[1] / "run.json").write_text("{}"),
        "--resume runs/done",
        ["runs/done/run.json holds no configuration"],
    ),
    (
        "run.json has an unknown field",
        lambda step: change_json(
            step.parents[1] / "run.json", lambda v: {"config": v["config"] | {"speed": "fast"}}
        ),
        "--resume runs/done",
        ["run.json", "no field 'speed'"],
    ),
    (
        "metrics are no records",
        lambda step: (step.parents[1] / "metrics.jsonl").write_text("hello\nworld\n"),
        "",
        ["metrics.jsonl line 1 is not a metrics record"],
    ),
    (
        "fewer steps than a pipeline",
        None,
        "--pipe 5 --devices 5",
        ["5 stages needs at least 5 layers, got 4"],
    ),
]


@pytest.mark.parametrize(
    ("damage", "flags", "words"), [row[1:] for row in RUNS], ids=[row[0] for row in RUNS]
)
def test_runs_and_checkpoints(here, capfd, damage, flags, words):
    if damage is not None:
        damage(here / "runs/done/checkpoints/4")
    before = contents(here)
    argv = flags.split() if "--resume" in flags else [*DONE.split(), *flags.split()]
    code = cli.main(argv + (["--devices", "1"] if "--resume" in flags else []))
    gc.collect()
    assert_one_sentence(capfd, code, words)
    assert contents(here) == before


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


@pytest.mark.parametrize(("flags", "words"), SAMPLES, ids=[line for line, _ in SAMPLES])
def test_sampling(here, capfd, flags, words):
    try:
        code = piperjax_main.main(flags.split())
    except SystemExit as error:
        code = error.code
    assert_one_sentence(capfd, code, words, program="piperjax")


def test_a_model_that_cannot_be_trained_yet(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("to be or not to be " * 100)
    flags = "--model deepseek_v2_lite --data a.txt --seq 16 --batch 1 --devices 1 --set data.cache_dir=cache"
    assert_one_sentence(capfd, cli.main(flags.split()), ["LatentAttention", "planned but not yet trained"])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "flags",
    [
        "--modle tiny",
        "--devices 2 --pipe 8",
        "--data missing.txt",
        "--resume runs/done --steps 9 --devices 1",
    ],
)
def test_the_program_itself_ends_quietly(here, flags):
    truncate_arrays(here / "runs/done/checkpoints/4")
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, str(ROOT / "train.py"), *flags.split()]
    result = subprocess.run(command, capture_output=True, text=True, cwd=here, env=environment, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("train.py: error: ") and result.stderr.count("\n") == 1, result.stderr


def test_the_table_is_long_enough():
    assert sum(map(len, (COMMAND_LINES, DATA_FILES, TOKENIZERS, MODELS, RUNS, SAMPLES))) >= 60
    assert np.unique([line for line, _ in COMMAND_LINES]).size == len(COMMAND_LINES)
