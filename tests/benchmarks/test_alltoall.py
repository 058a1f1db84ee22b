"""The all-to-all benchmark without a network: what its processes print, how its bars are judged, and what it skips."""

import sys
from statistics import median

import pytest

from benchmarks import alltoall
from benchmarks import alltoall_model as model
from benchmarks.alltoall_cells import (
    ALGORITHMS,
    CELLS,
    SWEEP,
    Exchange,
    Layer,
    NodeExchange,
    Sample,
    Variant,
    merge,
    paired_ratio,
    read_samples,
)
from piperjax.planner.network import all_to_all, simulate_all_to_all

SHAPE = model.Shape(nodes=4, local=8, bytes_per_second=25e6, cores=2)
CELLS_OF_TEST = (
    NodeExchange(pair_bytes=4),
    NodeExchange(pair_bytes=1000),
    NodeExchange(pair_bytes=1000, where="between"),
    Exchange(pair_bytes=256),
    Exchange(pair_bytes=65_536),
    Layer(
        num_experts=64,
        experts_per_token=6,
        tokens=16,
        d_model=1024,
        ways=(
            Variant("flat"),
            Variant("halo2_dedup"),
            Variant("halo2_dedup", chunks=2),
            Variant("halo2_dedup", 3.0, overflow="passes"),
            Variant("flat", 1.5),
        ),
    ),
)
IN_PASSES = "halo2_dedup capacity 3 in passes"


def made_up(**layer):
    """Seconds in which nothing surprises: a message costs a device 1 ms, wires are as fast as they are alone."""
    platform = model.shaped_platform(
        SHAPE,
        inside_bytes_per_second=7e6,
        between_bytes_per_second=3e6,
        message_seconds=1e-3,
        latency_seconds=2e-3,
    )
    # An empty message takes 2 ms, six more 1 ms each; 7 kB more inside, or 3 kB between nodes, 1 ms.
    times = (8e-3, 9e-3, 9e-3)
    seconds = {cell.label: {"node": [one] * 2} for cell, one in zip(CELLS_OF_TEST, times, strict=False)}
    for cell in CELLS_OF_TEST[3:5]:
        seconds[cell.label] = {
            name: [simulate_all_to_all(platform, 4, cell.pair_bytes * 32, name, near_beside=False)] * 2
            for name in ALGORITHMS
        }
    times = {
        "flat": 4.0,
        "halo2_dedup": 1.0,
        "halo2_dedup x2": 1.01,
        IN_PASSES: 1.02,
        "flat capacity 1.5": 1.5,
    }
    times |= layer
    seconds[CELLS_OF_TEST[5].label] = {name: [value, value * 1.1] for name, value in times.items()}
    return seconds


def test_samples_survive_being_printed_among_other_lines():
    samples = [Sample("256 B per pair", "flat", 1.25, 2.5), Sample("256 B per pair", "halo2", 3.0, 3.125)]
    printed = "[Gloo] Rank 0 is connected\n" + "\n".join(sample.line() for sample in samples) + "\nbye\n"
    assert read_samples(printed) == samples


def test_a_time_is_from_the_last_beginning_to_the_last_end():
    early = [Sample("a", "flat", 0.0, 5.0), Sample("a", "halo2", 10.0, 11.0), Sample("a", "flat", 20.0, 21.0)]
    late = [Sample("a", "flat", 2.0, 4.0), Sample("a", "halo2", 10.5, 12.0), Sample("a", "flat", 20.0, 22.0)]
    assert merge([early, late]) == {"a": {"flat": [3.0, 2.0], "halo2": [1.5]}}
    with pytest.raises(ValueError, match="same times in the same order"):
        merge([early, [late[1], late[0], late[2]]])


def test_ratios_are_of_pairs():
    # A machine that becomes slower in the middle does not change them.
    assert paired_ratio([2.0, 20.0, 200.0], [1.0, 10.0, 100.0]) == 2.0


def test_labels_tell_cells_and_variants_apart():
    for cells in CELLS.values():
        assert len({cell.label for cell in cells}) == len(cells)
        assert all(len(set(cell.variants)) == len(cell.variants) for cell in cells)
    assert str(Variant("flat", 1.5)) == "flat capacity 1.5"
    assert str(Variant("halo2_dedup", chunks=4)) == "halo2_dedup x4"
    assert str(Variant("halo2_dedup", 3.0, overflow="passes")) == IN_PASSES


def test_what_travels_later_is_not_dropped():
    assert Variant("flat", 1.5).drops and not Variant("flat").drops
    assert not Variant("flat", 1.5, overflow="passes").drops
    assert set(CELLS_OF_TEST[5].lossless) == {"flat", "halo2_dedup", "halo2_dedup x2", IN_PASSES}


def test_the_sweep_asks_what_the_bars_need():
    raw = [cell for cell in SWEEP if isinstance(cell, Exchange)]
    assert (raw[0].pair_bytes, raw[-1].pair_bytes) == (256, 65_536)
    layers = [cell for cell in SWEEP if isinstance(cell, Layer)]
    asked = {
        (cell.num_experts, cell.experts_per_token, other)
        for cell in layers
        for other in cell.variants
        if "halo2_dedup" in cell.variants
    }
    assert {(64, 6, "flat"), (64, 6, "flat capacity 1.5"), (256, 8, "flat capacity 1.5")} <= asked


def test_one_number_is_fitted_and_to_one_point():
    seconds = made_up()
    platform = model.platform_of(SHAPE, CELLS_OF_TEST, seconds)
    inside, wire = platform.links
    assert inside.bytes_per_second == pytest.approx(7 * 1000 / 1e-3)
    assert wire.bytes_per_second == pytest.approx(3 * 1000 / 1e-3)
    assert wire.message_seconds == pytest.approx((median(seconds["256 B per pair"]["flat"]) - 8e-3) / 24)
    assert inside.latency_seconds == pytest.approx(2e-3, rel=0.2)
    assert model.message_cpu_seconds(platform, SHAPE) == pytest.approx(1e-3 * 2 / 32, rel=0.1)
    points = model.simulated(platform, SHAPE, CELLS_OF_TEST, seconds)
    assert [point[:2] for point in points] == [(size, name) for size in (256, 65_536) for name in ALGORITHMS]
    assert model.geometric_mean_error(points) < 1.05
    slower = [point._replace(measured_seconds=2 * point.simulated_seconds) for point in points]
    assert model.geometric_mean_error(slower) == pytest.approx(2.0)


def test_choices_are_those_of_the_planner():
    seconds = made_up()
    platform = model.platform_of(SHAPE, CELLS_OF_TEST, seconds)
    found = model.choices(platform, SHAPE, CELLS_OF_TEST, seconds)
    assert [choice.cell for choice in found] == [cell.label for cell in CELLS_OF_TEST[3:]]
    costs = {n: all_to_all(platform, (1, 4, 8), 256.0 * 32, algorithm=n).seconds for n in ALGORITHMS}
    assert found[0].chosen == min(costs, key=costs.get) != "flat"
    # The quickest that drops nothing, though something that drops is quicker.
    seconds = made_up(**{"flat capacity 1.5": 0.1, "halo2_dedup": 1.0, "halo2_dedup x2": 1.0, IN_PASSES: 1.0})
    layer = model.choices(platform, SHAPE, CELLS_OF_TEST, seconds)[-1]
    assert layer.chosen.startswith("halo2_dedup") and layer.fraction == 1.0


@pytest.mark.parametrize(
    ("layer", "missed"),
    [
        ({}, []),
        ({"flat": 1.9}, ["halo2_dedup over flat, E=64 k=6, 16 tokens of 4096 B a device"]),
        (
            {"flat capacity 1.5": 1.1},
            ["halo2_dedup over flat capacity 1.5, E=64 k=6, 16 tokens of 4096 B a device"],
        ),
    ],
)
def test_bars(layer, missed, capsys):
    seconds = made_up(**layer)
    platform = model.platform_of(SHAPE, CELLS_OF_TEST, seconds)
    found = model.choices(platform, SHAPE, CELLS_OF_TEST, seconds)
    error = model.geometric_mean_error(model.simulated(platform, SHAPE, CELLS_OF_TEST, seconds))
    bars = alltoall.sweep_bars(CELLS_OF_TEST, seconds, found, error)
    assert [bar[0] for bar in bars if not alltoall.judge(*bar)] == missed
    out = capsys.readouterr().out
    assert out.count("MISSED") == len(missed) and out.count(" met\n") == len(bars) - len(missed)


def test_passes_are_chosen_where_one_is_expected_to_be_enough():
    seconds = made_up()
    platform = model.platform_of(SHAPE, CELLS_OF_TEST, seconds)
    ways = [Variant("halo2_dedup", size, overflow="passes") for size in (1.25, 3.0)]
    few = Layer(
        num_experts=256, experts_per_token=8, tokens=32, d_model=1024, ways=(Variant("halo2_dedup"), *ways)
    )
    seconds[few.label] = {name: [1.0] for name in few.variants}
    # With 1.25 times the balanced rows of 32 tokens some buffer of 1,024 overflows, and everything travels twice.
    (choice,) = model.choices(platform, SHAPE, [few], seconds)
    assert choice.chosen == IN_PASSES


def test_a_wrong_choice_misses_its_bar():
    seconds = made_up(flat=0.9)
    platform = model.platform_of(SHAPE, CELLS_OF_TEST, seconds)
    layer = model.choices(platform, SHAPE, CELLS_OF_TEST, seconds)[-1]
    assert layer.best == "flat" and 0.88 < layer.fraction < 0.92


def test_what_is_hidden_is_what_the_layer_is_shorter_by():
    times = {"wire": [6.0, 60.0], "products": [2.0, 20.0], "x1": [8.0, 80.0], "x4": [6.5, 65.0]}
    assert alltoall.hidden_fraction(times, 1) == 0.0
    assert alltoall.hidden_fraction(times, 4) == 0.75
    # 1.5 and 15 seconds were saved: 8.25 +- 6.75 of 11.
    assert alltoall.hidden_error(times, 4) == pytest.approx(6.75 / 11)


def test_the_table_and_the_picture_show_every_time():
    seconds = made_up()
    lines = alltoall.table(CELLS_OF_TEST, seconds)
    assert len(lines) == 1 + sum(len(variants) for variants in seconds.values())
    assert next(line for line in lines if "halo2_dedup x2" in line).endswith("3.96x")
    rows = alltoall.rows_of(CELLS_OF_TEST, seconds)
    assert len(rows) == len(lines) and '"256 B per pair",halo2,' in "\n".join(rows)
    platform = model.platform_of(SHAPE, CELLS_OF_TEST, seconds)
    text = alltoall.chart(model.simulated(platform, SHAPE, CELLS_OF_TEST, seconds))
    assert text.count("measured") >= 6 and text.count("<circle") == 6


def test_where_it_is_not_permitted_it_is_skipped_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(alltoall, "reason_to_skip", lambda: "network namespaces need root; run it as root")
    monkeypatch.setattr(sys, "argv", ["alltoall", "sweep", "overlap"])
    assert alltoall.main() == 0
    assert (
        capsys.readouterr().out == "skipped sweep and overlap: network namespaces need root; run it as root\n"
    )


def test_a_network_that_fails_is_one_sentence(monkeypatch, capsys):
    def fails(*_, **__):
        raise alltoall.NetworkError("'ip netns add pj7n0' failed: no reason given")

    monkeypatch.setattr(alltoall, "reason_to_skip", lambda: None)
    monkeypatch.setattr(alltoall, "measure", fails)
    monkeypatch.setattr(sys, "argv", ["alltoall", "sweep"])
    assert alltoall.main() == 2
    assert capsys.readouterr().err == "error: 'ip netns add pj7n0' failed: no reason given\n"


def test_parts_are_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["alltoall", "swep"])
    with pytest.raises(SystemExit):
        alltoall.main()
    assert "there are bytes, sweep, overlap, schedule, got 'swep'" in capsys.readouterr().err
