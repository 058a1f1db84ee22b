"""Search: best plans, what the paper says of its own cases, what is impossible, and how long it takes."""

import time
from dataclasses import replace
from itertools import pairwise

import pytest

from meshes.platform import Platform, load_platform
from models.presets import preset
from piperjax.planner.plan import default_plan
from piperjax.planner.scoring import score
from piperjax.planner.search import LEANEST_MESHES, choose_plan, search

FRONTIER, CPU8 = load_platform("frontier"), load_platform("cpu8")
GIB = 2**30


KNOWN = {}


def found(model="mixtral_8x7b", num_devices=64, platform=FRONTIER, **options):
    """What a search finds, which is done once for all tests that ask the same."""
    question = repr((model, num_devices, platform.name, options))
    if question not in KNOWN:
        KNOWN[question] = found_anew(model, num_devices, platform, **options)
    return KNOWN[question]


def found_anew(model, num_devices, platform=FRONTIER, **options):
    options = {"batch_size": 4 * num_devices, "seq_len": 4096} | options
    return search(preset(model), platform, num_devices, **options)


def test_plans_are_ranked_and_fit():
    result = found()
    seconds = [one.time.step_seconds for one in result.ranked]
    assert seconds == sorted(seconds)
    assert result.best.margin == 0 and result.ranked[1].margin == pytest.approx(seconds[1] / seconds[0] - 1)
    assert all(one.peak_bytes <= 64 * GIB for one in result.ranked)
    assert len({one.mesh for one in result.ranked}) == len(result.ranked) == 10
    assert all(one.plan.num_devices == 64 for one in result.ranked)


def test_nothing_that_fits_is_much_quicker_than_the_best():
    result = found()
    assert result.scores.seconds[result.scores.fits].min() >= 0.98 * result.best.time.step_seconds


def test_compromises_trade_memory_for_speed():
    front = found().pareto
    assert len(front) > 3
    for less, more in pairwise(front):
        assert less.num_bytes < more.num_bytes and less.mfu < more.mfu


def test_what_is_wished_for_is_kept():
    wished = {"pipe": 8, "expert": 4, "schedule": "1f1b", "memory_mode": "layer", "num_microbatches": 16}
    best = found(wished=wished).best.plan
    assert (best.pipe, best.data, best.expert) == (8, 2, 4)
    assert (best.schedule, best.memory_mode, best.num_microbatches) == ("one_f_one_b", "layer", 16)


def test_stages_are_divided_by_seconds_where_that_is_quicker():
    result = found("deepseek_v3", 256, load_platform("h200_pod"), wished={"capacity_factor": 1.25})
    plan = result.best.plan
    assert sum(plan.layers_per_stage) == 61 and len(plan.layers_per_stage) % plan.pipe == 0


@pytest.mark.parametrize("model", ["deepseek_v3", "weak_1_7t"])
def test_16384_devices_take_less_than_two_seconds(model):
    seconds = []
    for _ in range(3):  # The least of three: what runs beside a test slows its processor, too.
        start = time.process_time()
        result = found_anew(model, 16_384, batch_size=16_384, wished={"capacity_factor": 1.25})
        seconds.append(time.process_time() - start)
        if seconds[-1] < 2:
            break
    assert min(seconds) < 2
    assert result.best.plan.num_devices == 16_384
    assert result.num_meshes == 54


def test_what_is_hopeless_is_known_without_pricing_every_plan(monkeypatch):
    priced = []

    def counted(question, meshes, rejections):
        scores = score(question, meshes, rejections)
        priced.append((len(meshes), len(scores.seconds)))
        return scores

    monkeypatch.setattr("piperjax.planner.search.score", counted)
    with pytest.raises(ValueError, match=r"does not fit 2 frontier devices: .*; \d+ devices are enough"):
        found("mixtral_8x7b", 2)
    ((meshes, plans),) = priced
    assert meshes <= LEANEST_MESHES and plans < 50
    # What is wished for may not exist on the leanest mesh: 64 stages of zb_v for 32 layers. Then all are looked at.
    monkeypatch.setattr("piperjax.planner.search.LEANEST_MESHES", 1)
    monkeypatch.setattr("piperjax.planner.search.least_bytes", lambda _, mesh: 1e15 / mesh.pipe)
    assert found("mixtral_8x7b", 32, wished={"schedule": "zb_v"} | BALANCED).best.mesh.pipe < 32
    assert priced[1] == (1, 0) and priced[2][0] > 1


# What the paper's planner can and cannot do (PP x EP = n g, EP divides E, 64 GB), with the balanced routing that it
# assumes: as many rows as there are, which capacity factor 1 says.
BALANCED = {"capacity_factor": 1.0, "data": 1}


@pytest.mark.parametrize(
    ("model", "num_devices", "seq_len"),
    [
        ("xmoe_small", 8, 2048),
        ("xmoe_medium", 32, 4096),
        ("xmoe_super", 512, 4096),
        ("weak_110b", 64, 4096),
        ("weak_862b", 512, 4096),
        ("weak_1_7t", 1024, 4096),
        ("mixtral_8x7b", 64, 4096),
        ("mixtral_8x22b", 64, 4096),
    ],
)
def test_the_models_of_the_paper_fit_its_devices(model, num_devices, seq_len):
    result = found(model, num_devices, seq_len=seq_len, wished=BALANCED)
    mesh = result.best.mesh
    assert mesh.pipe * mesh.expert == num_devices
    assert preset(model).num_experts % mesh.expert == 0


@pytest.mark.parametrize(
    ("model", "wished"),
    [
        # Everything on one device, and experts divided without a pipeline.
        ("mixtral_8x7b", {"pipe": 1, "expert": 1}),
        ("xmoe_super", {"pipe": 1}),
        ("weak_862b", {"pipe": 1}),
        ("deepseek_v3", {"pipe": 1}),
    ],
)
def test_large_models_do_not_fit_without_a_pipeline(model, wished):
    devices = preset(model).num_experts
    with pytest.raises(ValueError, match="does not fit .* frontier devices with .*; largest: "):
        found(model, devices, wished={"capacity_factor": 1.0} | wished)


def test_mixtral_8x22b_must_recompute_as_the_paper_says():
    with pytest.raises(ValueError, match="does not fit 64 frontier devices with .*memory_mode=stash"):
        found("mixtral_8x22b", 64, wished=BALANCED | {"memory_mode": "stash"})
    assert found("mixtral_8x22b", 64, wished=BALANCED).best.plan.memory_mode in ("stage", "layer", "named")


def test_experts_stay_close_because_far_costs_more():
    # The paper makes it a rule; here a wider expert axis just takes longer.
    assert found("mixtral_8x7b", 64).best.mesh.expert <= FRONTIER.devices_per_node
    near, far = (
        found(
            "weak_110b", 64, wished={"capacity_factor": 1.0, "pipe": 64 // expert, "expert": expert}
        ).best.time
        for expert in (FRONTIER.devices_per_node, 2 * FRONTIER.devices_per_node)
    )
    assert far.all_to_all_fraction > 2 * near.all_to_all_fraction


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            dict(model="deepseek_v3", num_devices=64, batch_size=256),
            r"deepseek_v3 does not fit 64 frontier devices: the leanest plan \(pipe=\d+, .*\) needs .* GiB, .* more "
            r"than a device has; largest: .*; \d+ devices with --capacity-factor 1.25 --overflow passes are enough",
        ),
        (
            dict(wished={"pipe": 1, "expert": 1}),
            "with pipe=1, expert=1: .*; pipe=.*, data=.*, expert=.* fits",
        ),
        (
            dict(seq_len=8192, wished={"memory_mode": "stash", "pipe": 2, "expert": 2}),
            "; without memory_mode=stash, with --capacity-factor 1.25 --overflow passes, pipe=.* fits",
        ),
        (
            dict(wished={"schedule": "zb_v", "pipe": 32}),
            "its schedule does not fit the pipe ranks and microbatches",
        ),
        (
            dict(wished={"pipe": 5}),
            "no mesh of 64 devices has pipe=5; the nearest that is possible is pipe=4",
        ),
    ],
)
def test_what_does_not_fit_is_one_sentence_with_the_nearest_that_does(options, sentence):
    with pytest.raises(ValueError, match=sentence) as refused:
        found(**options)
    assert "\n" not in str(refused.value)


def test_training_takes_the_best_plan():
    choice = choose_plan(
        preset("small"), CPU8, 8, batch_size=32, seq_len=64, dtype="float32", wished={"pipe": 2}
    )
    assert choice.plan == choice.result.best.plan and choice.plan.pipe == 2 and choice.reason == ""


def test_without_rates_the_simple_rule_decides():
    bare = replace(CPU8, name="generic", device=replace(CPU8.device, matmul=None))
    shape = dict(batch_size=32, seq_len=64)
    choice = choose_plan(
        preset("tiny"), bare, 8, dtype="float32", wished={"expert": 2, "pipe": None}, **shape
    )
    assert choice.plan == default_plan(preset("tiny"), bare, 8, expert=2, **shape)
    assert choice.result is None and "no rates of generic in float32 are known" in choice.reason
    alone = Platform(name="alone", description="no links", device=CPU8.device, devices_per_node=8)
    choice = choose_plan(preset("tiny"), alone, 8, dtype="float32", **shape)
    assert choice.reason.startswith("no links of alone are known")


@pytest.mark.parametrize(
    ("wished", "sentence"),
    [
        (
            {"pipe": 3},
            "no mesh of 8 devices has pipe=3; the nearest that is possible is pipe=4, data=1, expert=2",
        ),
        (
            {"pipe": 3, "data": 1, "expert": 2},
            "pipe x data x expert must be the 8 devices, got 3 x 1 x 2 = 6",
        ),
    ],
)
def test_impossible_sizes_are_told(wished, sentence):
    with pytest.raises(ValueError, match=sentence):
        choose_plan(preset("tiny"), CPU8, 8, batch_size=32, seq_len=64, dtype="float32", wished=wished)


def test_smaller_buffers_are_taken_where_they_are_quicker():
    result, dropless = found(), found(wished={"capacity_factor": 0.0})
    assert (result.best.plan.overflow, result.given_up) == ("passes", ())
    assert dropless.best.plan.capacity_factor == 0
    assert result.best.time.step_seconds < dropless.best.time.step_seconds
    # Two of them cost more than the places that they save.
    uneven = search(
        preset("mixtral_8x7b"),
        FRONTIER,
        64,
        batch_size=256,
        seq_len=4096,
        imbalance=4.0,
        wished={"expert": 8},
    )
    assert uneven.best.plan.capacity_factor != 1.25
    # What is asked for is kept, and simulated devices have no price for passes.
    assert found(wished={"capacity_factor": 1.25}).best.plan.overflow == "drop"
    simulated = search(preset("tiny"), CPU8, 8, batch_size=32, seq_len=64, dtype="float32")
    assert simulated.best.plan.capacity_factor == 0


def test_narrow_gradients_are_taken_only_where_nothing_fits_without():
    options = dict(batch_size=1040, keep=1)
    result = found("xmoe_large", 80, **options)
    assert result.best.plan.gradient_dtype == "bfloat16" and result.best.plan.overflow == "passes"
    assert set(result.given_up) == {"gradient_dtype", "capacity_factor", "overflow"}
    with pytest.raises(ValueError, match="80 frontier devices with gradient_dtype=float32"):
        found("xmoe_large", 80, wished={"gradient_dtype": "float32"}, **options)
    wide = found(wished={"gradient_dtype": "bfloat16"}).best
    assert wide.plan.gradient_dtype == "bfloat16"
    assert found().best.plan.gradient_dtype == "float32"
