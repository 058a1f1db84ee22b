"""Tests of how a run comes by its plan: flags, resumed runs and plan files."""

import dataclasses
import json
import re

import pytest

from meshes.platform import Device, Platform, load_platform
from piperjax.training import cli
from piperjax.training.overrides import parse_assignments
from piperjax.training.planning import make_plan, read_plan_file, requested_sizes
from piperjax.training.run_file import write_run_file

CPU8 = load_platform("cpu8")


def choice(*argv, num_devices=8):
    args = cli.parse_arguments(argv)
    tree = parse_assignments(args.set)
    changes = tree.pop("plan", {})
    plan_file = None if args.plan is None else read_plan_file(args.plan)
    config = cli.configuration(args, tree, plan_file)
    return make_plan(args, config, CPU8, num_devices, changes=changes, plan_file=plan_file)


def planned(*argv, **options):
    return choice(*argv, **options).plan


def sizes(plan):
    return plan.pipe, plan.data, plan.expert


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--pipe 2 --expert 4 --data-parallel 1", (2, 1, 4)),
        ("--mesh pipe=2,expert=4,data=1", (2, 1, 4)),
        ("--mesh auto --pipe 2 --expert 2", (2, 2, 2)),
        ("--pipe 2 --expert -1", (2, 1, 4)),
        ("--pipe 2 --expert 2 --data-parallel -1", (2, 2, 2)),
        ("--mesh data=-1,pipe=2", (2, 4, 1)),
    ],
)
def test_axis_sizes(flags, expected):
    assert sizes(planned(*flags.split())) == expected


@pytest.mark.parametrize("flags", ["", "--mesh auto"])
def test_without_sizes_the_planner_chooses_and_says_why_not_the_next(flags):
    chosen = choice(*flags.split())
    assert chosen.plan.num_devices == 8
    best, second = chosen.notes
    assert (
        f"pipe={chosen.plan.pipe}, data={chosen.plan.data}, expert={chosen.plan.expert}: the quickest of"
        in best
    )
    assert re.search(r"would take \d+\.\d% longer: \S+ s more of \w+", second)


def test_without_rates_a_simple_rule_chooses_and_says_so():
    bare = Platform(name="bare", description="no rates", device=Device(), devices_per_node=8)
    args = cli.parse_arguments([])
    chosen = make_plan(args, cli.configuration(args, {}), bare, 8, changes={})
    assert sizes(chosen.plan) == (1, 1, 8)
    assert chosen.notes[0].startswith("by a simple rule, because no rates of bare in float32 are known")


def test_plan_fields_can_be_set():
    plan = planned(
        "--pipe", "2", "--schedule", "gpipe", "--microbatches", "2", "--set", "plan.memory_mode=stage"
    )
    assert (plan.schedule, plan.num_microbatches, plan.memory_mode) == ("gpipe", 2, "stage")


@pytest.fixture
def begun(tmp_path):
    """A run directory as `--pipe 2 --expert 4 --schedule gpipe --seed 4` leaves it."""
    args = cli.parse_arguments(["--out", str(tmp_path), "--seed", "4", "--steps", "50"])
    config = cli.configuration(args, {})
    plan = planned("--pipe", "2", "--expert", "4", "--schedule", "gpipe", "--set", "plan.memory_mode=stage")
    config = dataclasses.replace(config, plan=plan)
    write_run_file(config, platform={}, devices={})
    return tmp_path, config


def test_resume_keeps_the_plan_where_the_devices_are_as_many(begun):
    directory, config = begun
    assert planned("--resume", str(directory)) == config.plan
    assert planned("--resume", str(directory), "--schedule", "1f1b").schedule == "one_f_one_b"
    assert sizes(planned("--resume", str(directory), "--schedule", "1f1b")) == (2, 1, 4)


def test_resume_plans_anew_for_other_devices_or_sizes(begun):
    directory, _ = begun
    assert planned("--resume", str(directory), num_devices=4).num_devices == 4
    plan = planned("--resume", str(directory), "--pipe", "4")
    assert plan.pipe == 4 and plan.num_devices == 8


def test_a_resumed_run_keeps_its_capacity_on_any_mesh(begun):
    directory, config = begun
    limited = dataclasses.replace(config.plan, capacity_factor=1.5)
    write_run_file(dataclasses.replace(config, plan=limited), platform={}, devices={})
    assert planned("--resume", str(directory), num_devices=2).capacity_factor == 1.5
    assert planned("--resume", str(directory), "--set", "plan.capacity_factor=2").capacity_factor == 2


def test_asking_for_another_schedule_changes_nothing_else(begun):
    directory, config = begun
    plan = planned("--resume", str(directory), "--schedule", "zb_v")
    assert (plan.schedule, len(plan.layers_per_stage), plan.memory_mode) == ("zb_v", 4, "stage")
    assert sizes(plan) == sizes(config.plan) and plan.num_microbatches == config.plan.num_microbatches


@pytest.fixture
def plan_file(tmp_path):
    """Writes a plan for `tiny` on pipe 2 x expert 4, bare or with what it was made for; returns its path."""
    plan = planned("--pipe", "2", "--expert", "4", "--schedule", "gpipe", "--batch", "32", "--seq", "64")

    def write(**around):
        path = tmp_path / "plan.json"
        values = plan.to_dict()
        path.write_text(json.dumps({"plan": values, **around} if around else values))
        return str(path)

    write.plan = plan
    return write


@pytest.mark.parametrize(
    "around", [{}, {"model": "tiny", "platform": "frontier"}, {"platform": {"name": "x"}}]
)
def test_a_plan_file_is_the_plan_and_says_batch_and_model(plan_file, around):
    path = plan_file(**around)
    made = choice("--plan", path)
    assert made.plan == plan_file.plan
    where = {"frontier": ", made for frontier"}.get(around.get("platform"), "") if "model" in around else ""
    assert made.notes[0].startswith(f"given by {path}{where}")
    config = cli.configuration(cli.parse_arguments(["--plan", path]), {}, read_plan_file(path))
    assert (config.data.batch_size, config.data.seq_len, config.model.name) == (32, 64, "tiny")


def test_fields_of_a_plan_file_can_be_set(plan_file):
    plan = planned("--plan", plan_file(), "--set", "plan.memory_mode=stage")
    assert plan == dataclasses.replace(plan_file.plan, memory_mode="stage")


def test_the_run_file_of_a_run_is_a_plan_file(begun):
    directory, config = begun
    assert read_plan_file(str(directory / "run.json")).plan == config.plan
    assert read_plan_file(str(directory / "run.json")).model == "tiny"


@pytest.mark.parametrize(
    ("flags", "num_devices", "words"),
    [
        ("", 4, "is for pipe 2 x data 1 x expert 4 = 8 devices, but there are 4; use as many"),
        ("--batch 16", 8, "is for batch_size = 32, got 16; use --batch 32"),
        ("--seq 128", 8, "is for seq_len = 64, got 128; use --seq 64"),
        ("--model small", 8, r"is for a model \(tiny\) of 4 layers, but small has 8; plan for this model"),
        (
            "--set model.layers.*.ffn.num_experts=6",
            8,
            "is for expert = 4, which does not divide the 6 experts of tiny; plan for this model",
        ),
    ],
)
def test_a_plan_that_does_not_fit_is_explained(plan_file, flags, num_devices, words):
    with pytest.raises(ValueError, match=words):
        choice("--plan", plan_file(model="tiny"), *flags.split(), num_devices=num_devices)


@pytest.mark.parametrize(
    "flag", ["--pipe 2", "--mesh pipe=2", "--mesh auto", "--schedule gpipe", "--microbatches 2"]
)
def test_a_plan_file_and_flags_contradict(flag):
    name = flag.split()[0]
    with pytest.raises(
        ValueError, match=f"--plan p.json already says what {name} says; give one of them, or change"
    ):
        requested_sizes(cli.parse_arguments(["--plan", "p.json", *flag.split()]))


@pytest.mark.parametrize(
    "content", ["[]", "3", '{"plan": 3}', '{"plan": {"pipe": 2}}', '{"pipe": "two"}', "{"]
)
def test_what_is_no_plan_is_explained(tmp_path, content):
    path = tmp_path / "plan.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"plan file {path}"):
        read_plan_file(str(path))
