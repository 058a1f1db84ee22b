"""The memory of plans: slots of schedules, and sums that must hold."""

from dataclasses import replace
from math import ceil

import pytest

from benchmarks import memory as benchmark
from models.presets import preset
from piperjax.planner.backends import installed_cpu
from piperjax.planner.memory import estimate_memory, is_straight, layout_of, peak_memory, rank_memory
from piperjax.planner.plan import MEMORY_MODES, Plan
from piperjax.schedules import registry
from piperjax.schedules.lower import lower


def make_plan(model, *, pipe=1, data=1, expert=1, num_microbatches=8, chunks=1, **options):
    stages = pipe * chunks
    quotient, rest = divmod(model.num_layers, stages)
    return Plan(
        pipe=pipe,
        data=data,
        expert=expert,
        expert_factors=(1, 1, expert),
        num_microbatches=num_microbatches,
        layers_per_stage=tuple(quotient + (stage < rest) for stage in range(stages)),
        batch_size=num_microbatches * data * expert,
        **{"schedule": "one_f_one_b", "seq_len": 64, **options},
    )


def test_stash_of_1f1b_drawn_out():
    plan = make_plan(preset("tiny"), pipe=4, num_microbatches=8)
    # Forwards run 2 P - 1 ahead in ticks with a forward and a backward; one input per layer, of 64 tokens.
    (rank, *others) = estimate_memory(preset("tiny"), plan, dtype="float32")
    assert rank.stash == 7 * 2 * 64 * 128 * 4  # Room for a layer of each of two kinds.
    assert rank.taps == 0
    assert others == [rank] * 3


def test_one_rank_of_1f1b_runs_both_passes_in_every_tick():
    assert is_straight("one_f_one_b", 8, 0)
    assert not is_straight("gpipe", 8, 0)


@pytest.mark.parametrize("schedule", sorted(set(registry.names()) - {"auto"}))
def test_slots_are_those_of_the_lowered_schedule(schedule):
    for pipe, num_microbatches in ((4, 28), (3, 24), (24, 48)):
        plan = make_plan(
            replace(preset("tiny"), layers=preset("tiny").layers * 12),
            pipe=pipe,
            num_microbatches=num_microbatches,
            schedule=schedule,
            chunks=registry.chunks_of(schedule),
        )
        lowered = lower(plan.tick_table())
        exact = (
            lowered.num_input_slots,
            lowered.num_gradient_slots,
            lowered.num_stash_slots,
            lowered.num_tap_slots,
        )
        slots = layout_of(plan, "float32").slots
        told = [ceil(count - 1e-6) for count in (slots.inputs, slots.gradients, slots.stash, slots.taps)]
        assert all(e <= t <= 1.1 * e + 1 for t, e in zip(told, exact, strict=True)), (told, exact)


@pytest.mark.parametrize("schedule", ["gpipe", "one_f_one_b", "interleaved", "zb_h1", "zb_v"])
def test_one_tick_is_one_of_the_lowered_schedule(schedule):
    model, chunks = preset("tiny"), registry.chunks_of(schedule)
    for pipe, num_microbatches in ((1, 1), (1, 2), (2, 2)):
        plan = make_plan(
            model, pipe=pipe, num_microbatches=num_microbatches, schedule=schedule, chunks=chunks
        )
        is_one = lower(plan.tick_table()).num_ticks == 1
        assert layout_of(plan, "float32").is_one_tick == is_one


def test_in_one_tick_gradients_of_layers_begin_with_their_pass():
    model = preset("tiny")
    plans = (make_plan(model, num_microbatches=n, schedule="zb_h1", seq_len=1024) for n in (1, 2))
    one, two = (estimate_memory(model, plan, dtype="bfloat16")[0] for plan in plans)
    # The input gradient is the largest phase of both. Beside it are accumulators of embedding, head and final norm.
    outer = (2 * model.vocab_size + 1) * model.d_model * 4
    assert two.taken - one.taken == pytest.approx(one.gradients - outer)


def test_state_is_counted_once_and_shrinks_with_the_data_axis():
    model = preset("tiny")
    one, four = (estimate_memory(model, make_plan(model, data=data), dtype="float32")[0] for data in (1, 4))
    assert one.total == pytest.approx(sum(one.terms.values()))
    assert four.parameters == pytest.approx(one.parameters / 4, rel=1e-3)
    assert four.moments == 2 * four.parameters
    assert four.gradients == one.gradients
    assert peak_memory(model, make_plan(model), dtype="float32") == one.total


def test_a_backend_that_nobody_compiles_for_is_named():
    model = preset("tiny")
    with pytest.raises(ValueError, match="backend must be one of gpu, cpu, native_cpu, got 'tpu'"):
        estimate_memory(model, make_plan(model), backend="tpu")


@pytest.mark.parametrize("gpu", ["", "h100"])
def test_predictions_meet_the_bars_beside_what_was_compiled(gpu):
    target = benchmark.Target(gpu=gpu)
    compiled = benchmark.read_table(target)
    cases = list(target.cases())
    assert len(cases) >= 40 and {case.key for case in cases} == set(compiled)
    errors = [benchmark.predicted_bytes(case, target) / compiled[case.key] - 1 for case in cases]
    assert sum(map(abs, errors)) / len(errors) <= benchmark.MEAN_BAR
    assert min(errors) >= benchmark.UNDER_BAR and max(errors) <= target.over_bar


@pytest.mark.parametrize(
    "number",
    [pytest.param(number, marks=[] if number in (0, 6) else [pytest.mark.slow]) for number in range(7)],
)
def test_steps_of_other_sizes_are_predicted_as_well(number):
    model = benchmark.scaled("mixtral_8x7b", d_model=256, num_layers=2)
    case = [
        benchmark.case(model, (1, 2, 2), dtype="float32"),
        benchmark.case(model, (2, 1, 4)),
        benchmark.case(benchmark.scaled("arctic", d_model=256), (2, 2, 2)),
        benchmark.case(model, (2, 1, 2), schedule="zb_h1", memory_mode="stash", dtype="float32"),
        benchmark.case(
            benchmark.scaled("weak_1_7t", num_layers=8), (4, 1, 2), schedule="zb_v", dispatch_chunks=2
        ),
        benchmark.case(model, (2, 2, 2), dispatch_chunks=4),
        # If all slots were copied, this would be 40 % more than predicted.
        benchmark.case(model, (2, 1, 2), overlap=True, memory_mode="stash", seq_len=256, num_microbatches=8),
    ][number]
    backend = installed_cpu()
    error = benchmark.predicted_bytes(case, backend=backend) / benchmark.compiled_bytes(case) - 1
    # The bars are of jax 0.10, as the table is. With 0.12 the 53 steps of it in bfloat16 are 4.7 % off, -7.9 to +20 %.
    under, over = (benchmark.UNDER_BAR, benchmark.OVER_BAR) if backend == "cpu" else (-0.10, 0.131)
    assert under <= error <= over


@pytest.mark.parametrize("name", ["weak_1_7t", "deepseek_v3", "arctic", "llama4_maverick", "kimi_k2"])
@pytest.mark.parametrize("schedule", ["one_f_one_b", "zb_h1"])
def test_each_memory_mode_keeps_as_much_as_the_one_before(name, schedule):
    # Scoring leaves out the modes that follow one which has no room for what lasts.
    model = preset(name)
    common = dict(pipe=4, data=2, expert=1, schedule=schedule, num_microbatches=8, seq_len=1024)
    plan = make_plan(model, **common)
    lasting = []
    for memory_mode in MEMORY_MODES:
        memory = rank_memory(model, layout_of(replace(plan, memory_mode=memory_mode), "bfloat16"), enough=0)
        assert (
            memory.is_least
            and memory.total <= estimate_memory(model, replace(plan, memory_mode=memory_mode))[0].total
        )
        lasting.append(memory.total - memory.taps)
    assert lasting == sorted(lasting) and lasting[0] < lasting[-1]
