"""Plans: the default rule on known machines, sentences for what is impossible, and JSON."""

import json

import pytest

from meshes.platform import load_platform
from models.presets import preset
from piperjax.planner.plan import Plan, default_plan

CPU8, FRONTIER = load_platform("cpu8"), load_platform("frontier")


def tiny_plan(**options):
    return default_plan(preset("tiny"), CPU8, 8, **{"batch_size": 32, "seq_len": 64, **options})


def test_experts_fill_a_node_and_data_the_rest():
    plan = tiny_plan()
    assert (plan.pipe, plan.expert, plan.data) == (1, 4, 2)
    assert plan.num_devices == 8
    assert plan.layers_per_stage == (4,)


def test_a_model_too_large_for_a_node_gets_pipe_ranks():
    model = preset("mixtral_8x7b")
    plan = default_plan(model, FRONTIER, 64, batch_size=512, seq_len=4096)
    assert plan.expert == 8
    assert plan.pipe >= 2, "16 bytes x 46.7e9 parameters / 8 devices do not fit 64 GiB"
    assert plan.pipe * plan.data * plan.expert == 64
    assert sum(plan.layers_per_stage) == model.num_layers


def test_sizes_that_are_given_are_kept():
    plan = tiny_plan(pipe=2, expert=2, data=2, schedule="1f1b", num_microbatches=4)
    assert (plan.pipe, plan.expert, plan.data, plan.num_microbatches) == (2, 2, 2, 4)
    assert plan.schedule == "one_f_one_b"
    assert plan.build_schedule().num_microbatches == 4


def test_stages_are_balanced_by_flop():
    # The first layer of tiny is dense and cheaper than a MoE layer.
    plan = tiny_plan(pipe=2, expert=4, data=1)
    assert sum(plan.layers_per_stage) == 4
    assert min(plan.layers_per_stage) >= 1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (dict(pipe=3), "pipe x data x expert must be the 8 devices, got 3 x"),
        (dict(expert=3, pipe=1, data=1), "pipe x data x expert must be the 8 devices, got 1 x 1 x 3 = 3"),
        (
            dict(pipe=8, data=1, expert=1),
            "a pipeline of 8 stages needs at least 8 layers, got 4; use --pipe 4",
        ),
        (
            dict(num_microbatches=3, pipe=2, data=2, expert=2),
            "the batch of 32 sequences must divide into 3 microb",
        ),
        (dict(schedule="2f2b"), "no schedule named '2f2b'"),
        (
            dict(memory_mode="full"),
            "memory_mode must be one of stage, layer, named, products, stash, got 'full'",
        ),
        (
            dict(schedule="zb_v", pipe=4, expert=2, data=1),
            "splits the model into 4 pipe ranks x 2 = 8 stages, but tiny has 4 layers; use --pipe 2 or fewer",
        ),
        (
            dict(schedule="1f1b", num_chunks=2, pipe=2),
            "schedule 'one_f_one_b' has one stage per pipe rank, got 2",
        ),
        (dict(dispatch="halo"), "no dispatcher named 'halo'; .* did you mean 'halo"),
        (dict(dispatch_chunks=0), "dispatch_chunks must be at least 1, got 0"),
        (
            dict(dispatch="halo2", dispatch_chunks=7),
            "must divide the 256 tokens of a microbatch on a device, got 7; use 4",
        ),
        (dict(capacity_factor=-1.0), "capacity_factor must be 0 .dropless. or positive, got -1.0"),
    ],
)
def test_the_impossible_is_one_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        tiny_plan(**options)


def test_experts_must_divide_and_the_sentence_lists_what_would():
    with pytest.raises(ValueError, match="must divide the 8 experts of tiny, got 3; use one of 1, 2, 4, 8"):
        default_plan(preset("tiny"), CPU8, 3, batch_size=33, seq_len=8, expert=3, pipe=1, data=1)


def test_the_batch_sentence_says_what_would_work():
    with pytest.raises(ValueError, match="use one of 1, 2, 4, 8 microbatches"):
        tiny_plan(pipe=2, data=2, expert=2, num_microbatches=5)
    with pytest.raises(ValueError, match="use a batch that is a multiple of 8"):
        tiny_plan(pipe=1, data=2, expert=4, num_microbatches=1, batch_size=6)


def test_json_round_trip():
    plan = tiny_plan(pipe=2, data=2, expert=2)
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    with pytest.raises(ValueError, match="unknown: colour"):
        Plan.from_dict({**plan.to_dict(), "colour": "red"})
    with pytest.raises(ValueError, match="missing: pipe"):
        Plan.from_dict({k: v for k, v in plan.to_dict().items() if k != "pipe"})


def test_a_schedule_with_chunks_has_more_stages():
    plan = tiny_plan(schedule="interleaved", pipe=2, expert=2, data=2)
    assert plan.layers_per_stage == (1, 1, 1, 1)
    assert plan.num_microbatches == 8
    assert plan.build_schedule().num_chunks == 2
    assert Plan.from_dict(plan.to_dict()) == plan


def test_microbatches_are_as_many_as_the_schedule_can_have():
    # Interleaved needs a multiple of the pipe ranks: 6 of the 12 sequences, not 8 or 12.
    plan = tiny_plan(schedule="interleaved", pipe=2, expert=4, data=1, batch_size=24)
    assert plan.num_microbatches == 6


def test_a_schedule_file_says_how_many_microbatches_there_are(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text(str(tiny_plan(schedule="gpipe", pipe=2, num_microbatches=4).build_schedule()))
    plan = tiny_plan(schedule=str(path), pipe=2)
    assert plan.num_microbatches == 4


def test_overlap_is_refused_where_one_action_runs_per_tick_and_the_advice_helps():
    options = dict(pipe=2, data=2, expert=2, num_microbatches=2, overlap=True)
    with pytest.raises(ValueError, match="use one_f_one_b, interleaved, zb_h1 or zb_v"):
        tiny_plan(schedule="v_half", **options)
    # Also with no more microbatches than ranks.
    for schedule in ("one_f_one_b", "interleaved", "zb_h1", "zb_v"):
        assert tiny_plan(schedule=schedule, **options).tick_table().head_comes_first
