"""Damaged runs, and runs that cannot go on: one sentence that says what to do, and nothing overwritten."""

import gc
import json
import shutil

import pytest

from piperjax.training import cli


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
def test_runs_and_checkpoints(bad_input, here, capfd, damage, flags, words):
    if damage is not None:
        damage(here / "runs/done/checkpoints/4")
    before = bad_input.contents(here)
    argv = flags.split() if "--resume" in flags else [*bad_input.DONE.split(), *flags.split()]
    code = cli.main(argv + (["--devices", "1"] if "--resume" in flags else []))
    gc.collect()
    bad_input.assert_one_sentence(capfd, code, words)
    assert bad_input.contents(here) == before


def test_the_program_itself_ends_quietly(bad_input, here):
    truncate_arrays(here / "runs/done/checkpoints/4")
    bad_input.assert_program_ends_quietly("--resume runs/done --steps 9 --devices 1", here)
