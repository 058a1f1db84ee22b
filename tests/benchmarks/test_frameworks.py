"""Habits of other frameworks by their laws: hosts, small kernels, bubbles, layers of stages, gradients that show."""

from dataclasses import replace

import pytest

from benchmarks.frameworks import BUBBLES, Run, Software, predict
from benchmarks.validate import GOLDEN, load
from meshes.platform import load_platform
from models import cost
from models.presets import preset
from piperjax.planner.network import Group, all_gather

MIXTRAL = preset("mixtral_8x22b")


def run(**changes):
    options = dict(
        devices=64, expert=8, global_batch=512, software=Software(), platform=load_platform("h100_pod")
    )
    return Run(model=MIXTRAL, **options | changes)


def test_a_slow_host_bounds_a_layer_of_few_tokens():
    slow = Software(host_seconds=1.0)
    few, many = (predict(run(software=slow, microbatch=size)) for size in (1, 8))
    assert few.step_seconds == pytest.approx(8 * MIXTRAL.num_layers, rel=0.02)
    assert many.step_seconds == pytest.approx(MIXTRAL.num_layers, rel=0.2)


def test_an_activation_of_many_kernels_passes_over_hidden_rows():
    plain, eager = (predict(run(eager_passes=passes)).layer.streams for passes in (0.0, 10.0))
    ffn = MIXTRAL.layers[0].ffn
    hidden = 2 * 4096 * ffn.experts_per_token * ffn.d_ff
    device = load_platform("h100_pod").device
    assert eager - plain == pytest.approx(MIXTRAL.num_layers * device.stream_seconds(10 * hidden))


@pytest.mark.parametrize("schedule", BUBBLES)
def test_bubbles_are_those_of_the_literature(schedule):
    """Where all three passes take as long: (P - 1) / v of 1F1B, a third of that with H1, none with H2."""
    times = BUBBLES[schedule]
    waits = (8 - times.directions) / times.directions
    waits *= max(0.0, times.forward + times.input_gradient + times.weight_gradient)
    expected = {"interleaved": 21, "zb_h1": 7, "zb_h2": 0, "zb_2p": 0, "zb_v": 0, "dualpipe": 6}
    assert waits == expected[schedule]


def test_schedules_wait_in_their_order():
    seconds = [predict(run(pipe=8, schedule=name)).step_seconds for name in ("interleaved", "zb_h1", "zb_2p")]
    assert seconds == sorted(seconds, reverse=True) and seconds[0] > seconds[2]
    assert predict(run(pipe=8, schedule="zb_2p")).bubble_fraction == 0


def test_layers_are_divided_evenly_where_their_number_allows_it():
    """The last of 8 ranks has 7 of 56 layers, and the head; a step lasts as long as on it."""
    pipelined, alone = predict(run(pipe=8)), predict(run())
    M, per_layer = 512 // 8, alone.step_seconds / 8 / MIXTRAL.num_layers
    assert pipelined.step_seconds * (1 - pipelined.bubble_fraction) > M * 7 * per_layer


def test_gradients_show_where_few_microbatches_hide_them():
    """Their exchange in 32 bits behind two thirds of a microbatch, that of parameters in 16 behind one third."""
    platform = replace(load_platform("h100_pod"), name="slow")
    links = tuple(replace(link, bytes_per_second=link.bytes_per_second / 50) for link in platform.links)
    platform = replace(platform, links=links)
    one, many = (predict(run(platform=platform, global_batch=64 * n)).step_seconds for n in (1, 9))
    microbatch = (many - one) / 8
    counted = cost.parameters(MIXTRAL)
    sizes = {Group(64, 1, 64): counted.total - counted.experts, Group(8, 8, 64): counted.experts / 8}
    once = sum(all_gather(platform, group, 2 * size).seconds for group, size in sizes.items())
    update = platform.device.stream_seconds(28 * counted.total / 64)
    assert once > microbatch
    assert one == pytest.approx(microbatch + update + 3 * once - microbatch, rel=1e-6)


@pytest.mark.parametrize(
    ("pipe", "virtual", "outer"), [(8, 1, False), (29, 1, True), (29, 2, True), (5, 1, False)]
)
def test_embedding_and_head_are_layers_where_only_so_stages_are_even(pipe, virtual, outer):
    """56 layers are 8 x 7, and with two more 29 x 2 and 58 x 1; 5 ranks have them by their seconds."""
    assert run(devices=8 * pipe, pipe=pipe, virtual=virtual).outer_layers == outer
    if outer and virtual == 2:
        with pytest.raises(ValueError, match="56 layers are fewer than pipe 57"):
            run(devices=8 * 57, pipe=57)


def test_no_measurement_is_there_twice():
    found = [
        (row["source"], row["platform"], row["model"], row["tokens_per_second_per_device"])
        for row in (line.row for line in load(GOLDEN))
        if "tokens_per_second_per_device" in row
    ]
    assert len(found) == len(set(found))
