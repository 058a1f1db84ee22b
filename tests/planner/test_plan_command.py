"""`python -m piperjax plan`: output, files, and one sentence for every mistake."""

import json

import pytest

from piperjax.__main__ import main
from piperjax.planner.plan import Plan
from piperjax.planner.plan_command import default_batch_size, parsed_sizes

SMALL = "plan --model tiny --platform cpu8 --devices 8 --batch 32 --seq 64"
LARGE = "plan --model mixtral_8x7b --platform frontier --devices 64"


def run(capsys, line):
    code = main(line.split())
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_answer_is_printed_with_its_reasons(capsys):
    code, out, err = run(capsys, f"{LARGE} --explain pipe=16,expert=4 --top 3")
    assert code == 0 and err == ""
    for words in (
        "mixtral_8x7b (46.7B parameters",
        "(no --batch: 4 sequences per device, for about 16,384 tokens",
        "The best plan of each of the best meshes",
        "Plan 1: pipe=",
        "memory of a device: ",
        "time of a step: ",
        "One choice of plan 1 made otherwise",
        "Why not pipe=16, expert=4: its best plan takes",
        "Left out:",
        "Note: rates of frontier are",
    ):
        assert words in out, words
    assert max(map(len, out.splitlines())) < 330


def test_json_is_all_that_is_printed(capsys):
    _, out, _ = run(capsys, f"{SMALL} --json --imbalance 1.2")
    content = json.loads(out)
    assert content["num_devices"] == 8 and content["imbalance"] == 1.2 and content["dtype"] == "bfloat16"
    assert Plan.from_dict(content["ranked"][0]["plan"]).num_devices == 8


def test_files_are_written(capsys, tmp_path):
    plan, page = tmp_path / "plan.json", tmp_path / "report.html"
    code, out, _ = run(capsys, f"{SMALL} --out {plan} --html {page}")
    assert code == 0 and f"wrote the plan, for train.py --plan: {plan}" in out
    content = json.loads(plan.read_text())
    assert content["model"] == "tiny" and content["platform"] == "cpu8"
    assert Plan.from_dict(content["plan"]).batch_size == 32
    assert page.read_text().startswith("<!doctype html>")


def test_what_is_given_is_kept(capsys, tmp_path):
    path = tmp_path / "plan.json"
    flags = "--pipe 2 --expert 2 --data-parallel 2 --schedule interleaved --chunks 2 --microbatches 4"
    run(
        capsys,
        f"{SMALL} {flags} --memory-mode layer --vocabulary whole --no-overlap --capacity-factor 1.5 --out {path}",
    )
    plan = Plan.from_dict(json.loads(path.read_text())["plan"])
    assert (plan.pipe, plan.data, plan.expert, plan.num_microbatches) == (2, 2, 2, 4)
    assert (plan.schedule, plan.num_chunks, plan.memory_mode) == ("interleaved", 2, "layer")
    assert (plan.vocabulary, plan.overlap, plan.capacity_factor) == ("whole", False, 1.5)


def test_any_dispatcher_can_be_asked_for(capsys):
    flags = "--pipe 1 --expert 8 --memory-mode stage --batch 64 --seq 1024 --dispatch halo3_dedup"
    _, out, _ = run(capsys, f"{LARGE} {flags}")
    assert "Plan 1: pipe=1, data=8, expert=8" in out and "halo3_dedup" in out


@pytest.mark.parametrize(
    ("num_devices", "seq_len", "batch"),
    [(64, 4096, 256), (64, 2048, 512), (16_384, 4096, 16_384), (8192, 4096, 16_384), (8, 32_768, 8)],
)
def test_the_default_batch_follows_its_rule(num_devices, seq_len, batch):
    assert default_batch_size(num_devices, seq_len) == batch


def test_fields_to_explain_are_read():
    assert parsed_sizes("pipe=8, expert=32") == {"pipe": 8, "expert": 32}
    assert parsed_sizes("schedule=zb_v,capacity-factor=1.5") == {"schedule": "zb_v", "capacity_factor": 1.5}


MISTAKES = [
    ("--model mixtral", "no model named 'mixtral'; did you mean 'mixtral_8x7b'?"),
    ("--model missing.json", "cannot read model file missing.json: No such file or directory"),
    ("--platform fronteir", "no platform named 'fronteir', did you mean 'frontier'?"),
    ("--platform missing.toml", "cannot read platform file missing.toml"),
    ("--devices 0", "--devices must be at least 1, got 0"),
    ("--devices 100000", "platform 'cpu8' joins at most 8 devices, got 100000; use --devices 8 or fewer"),
    ("--batch 0", "batch_size must be at least 1, got 0"),
    ("--batch 7", "the nearest that is possible is|use a batch that is a multiple of 2 sequences, such as 8"),
    ("--seq 0", "--seq must be at least 1, got 0"),
    ("--dtype float8", "platform 'cpu8' has no rates for float8, which planning needs; use --dtype float32"),
    ("--pipe 0", "pipe must be at least 1, got 0"),
    ("--pipe 3", "no mesh of 8 devices has pipe=3; the nearest that is possible is pipe=4, data=1, expert=2"),
    (
        "--pipe 8",
        "a pipe rank needs a layer, and there are 4, got pipe=8, data=1, expert=1; the nearest that is",
    ),
    (
        "--expert 3",
        "no mesh of 8 devices has expert=3; the nearest that is possible is pipe=1, data=2, expert=4",
    ),
    (
        "--pipe 2 --expert 2 --data-parallel 4",
        "no mesh of 8 devices has pipe=2, data=4, expert=2; the nearest",
    ),
    ("--schedule 1f2b", "no schedule named '1f2b'; schedules are"),
    (
        "--schedule zb_v --pipe 4",
        "its schedule does not fit the pipe ranks and microbatches, or has more stages than the 4 layers; ",
    ),
    (
        "--schedule 1f1b --chunks 2",
        "schedule 'one_f_one_b' has one stage per pipe rank, got 2; leave the number out",
    ),
    ("--microbatches 5", "a device's part of the batch must divide into the 5 microbatches"),
    ("--memory-mode nmed", "got 'nmed'; did you mean 'named'?"),
    ("--explain pip=3", "did you mean 'pipe'?"),
    ("--memory-mode all", "memory_mode must be one of stage, layer, named, products, stash, got 'all'"),
    ("--vocabulary some", "vocabulary must be one of split, whole, got 'some'"),
    ("--imbalance 0.5", "imbalance is the largest load over the mean, at least 1, got 0.5"),
    ("--top 0", "--top must be at least 1, got 0"),
    ("--explain pipe", "--explain takes fields of a plan such as pipe=8,expert=32, got 'pipe'"),
    ("--explain pipe=two", "pipe of --explain must be a number, got 'two'"),
    ("--explain colour=2", "--explain takes fields of a plan such as pipe=8,expert=32, got 'colour=2'"),
    ("--out missing/plan.json", "cannot write missing/plan.json: No such file or directory"),
    (
        "--platform frontier --model deepseek_v3 --seq 4096",
        "deepseek_v3 does not fit 8 frontier devices: the leanest",
    ),
]


@pytest.mark.parametrize(("flags", "sentence"), MISTAKES)
def test_every_mistake_is_one_sentence(capsys, tmp_path, monkeypatch, flags, sentence):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, f"{SMALL} {flags}")
    assert code == 2 and out == ""
    assert err.startswith("piperjax: error: ") and err.count("\n") == 1, err
    assert any(words in err for words in sentence.split("|")), err
    assert len(err) < 700, "a sentence, not an essay"


def test_unknown_flags_leave_with_code_2(capsys):
    with pytest.raises(SystemExit) as left:
        main(f"{SMALL} --pipes 2".split())
    error = capsys.readouterr().err
    assert (
        left.value.code == 2
        and "--pipes 2; did you mean --pipe?; see `python -m piperjax plan --help`" in error
    )
