"""Candidates: what is searched, what is left out and why, and that nothing better is left out."""

from dataclasses import replace

import numpy as np
import pytest

from meshes.platform import load_platform
from models.presets import preset
from piperjax.planner.candidates import (
    SEARCHED_SCHEDULES,
    Mesh,
    Order,
    Question,
    Rejections,
    check_some,
    meshes,
    microbatch_counts,
    orders,
    vocabularies,
)
from piperjax.schedules import registry
from piperjax.schedules.profile import profile


def asked(model="mixtral_8x7b", num_devices=16, batch_size=64, **options):
    return Question(
        model=preset(model),
        platform=load_platform("frontier"),
        num_devices=num_devices,
        batch_size=batch_size,
        seq_len=4096,
        **options,
    )


def test_meshes_multiply_to_the_devices_and_experts_divide():
    rejections = Rejections()
    found = meshes(asked(), rejections)
    assert {mesh.expert for mesh in found} == {1, 2, 4, 8}
    assert all(mesh.pipe * mesh.data * mesh.expert == 16 for mesh in found)
    assert len(found) == 14
    (rejection,) = rejections.listed()
    assert (rejection.reason, rejection.count) == ("the expert axis must divide the 8 experts", 1)
    assert rejection.example == "pipe=1, data=1, expert=16"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (dict(model="tiny", num_devices=8), "a pipe rank needs a layer, and there are 4"),
        (dict(batch_size=24), "the batch of 24 sequences must divide over data x expert devices"),
        (
            dict(wished={"num_microbatches": 5}),
            "a device's part of the batch must divide into the 5 microbatches",
        ),
    ],
)
def test_every_rejection_has_its_reason(options, reason):
    rejections = Rejections()
    meshes(asked(**options), rejections)
    assert reason in [rejection.reason for rejection in rejections.listed()]


def test_all_meshes_are_found_or_counted():
    for devices in (1, 7, 12, 80, 1024):
        rejections = Rejections()
        question = asked("xmoe_large", num_devices=devices, batch_size=5 * devices)
        found = meshes(question, rejections)
        ways = sum(devices % (p * e) == 0 for p in range(1, devices + 1) for e in range(1, devices + 1))
        assert len(found) + sum(rejection.count for rejection in rejections.listed()) == ways


def test_one_pipe_rank_needs_no_schedule_and_no_vocabulary_placement():
    assert orders(asked(), 1) == [Order("one_f_one_b", 1)]
    assert vocabularies(asked(), 1) == ("split",)
    assert vocabularies(asked(), 2) == ("split", "whole")


def test_orders_have_a_layer_for_every_stage():
    found = orders(asked(), 8)
    assert {order.num_chunks for order in found if order.schedule == "interleaved"} == {2, 3, 4}
    assert orders(asked(wished={"schedule": "1f1b", "overlap": False}), 8) == [Order("one_f_one_b", 1)]
    assert [
        order.num_chunks for order in orders(asked(wished={"schedule": "interleaved", "num_chunks": 4}), 8)
    ] == [
        4,
        4,
    ]
    assert orders(asked(wished={"schedule": "v_min", "overlap": True}), 8) == []


def test_microbatches_divide_a_device_part_of_the_batch():
    assert microbatch_counts(asked(), Mesh(2, 2, 4)) == [1, 2, 4, 8]
    many = microbatch_counts(asked(batch_size=5040), Mesh(16, 1, 1))
    assert len(many) == 12 and many[0] == 8 and many[-1] == 5040
    assert microbatch_counts(asked(batch_size=32), Mesh(16, 1, 1)) == [8, 16, 32]
    assert microbatch_counts(asked(batch_size=4), Mesh(16, 1, 1)) == [4]
    assert microbatch_counts(asked(wished={"num_microbatches": 4}), Mesh(2, 2, 4)) == [4]


def test_what_is_not_searched_is_never_better():
    # Whatever the costs: for each other schedule one that is searched is as quick and keeps as little.
    rng = np.random.default_rng(0)
    others = [name for name in registry.names() if name not in (*SEARCHED_SCHEDULES, "auto")]
    assert others == ["gpipe", "zb_h2", "zb_dual", "dualpipe_v"]
    forward = rng.uniform(0.5, 2.0, 50)
    inputs, weights = forward * rng.uniform(1.0, 3.0, 50), forward * rng.uniform(0.3, 1.2, 50)
    seconds = np.stack([forward, inputs + weights, inputs, weights, np.zeros(50)], axis=-1)
    for ranks, microbatches in ((2, 4), (4, 8), (4, 32), (8, 16), (8, 40)):
        searched = [(profile(name, ranks, microbatches), chunks(name)) for name in SEARCHED_SCHEDULES]
        for name in others:
            other, parts = profile(name, ranks, microbatches), chunks(name)
            better = [
                one.seconds(seconds / number) <= other.seconds(seconds / parts) * (1 + 1e-9)
                for one, number in searched
                if one.slots.stash / number <= other.slots.stash / parts
                and one.slots.taps / number <= other.slots.taps / parts
            ]
            assert np.all(np.any(better, axis=0)), f"{name} on {ranks} ranks, {microbatches} microbatches"


def chunks(name):
    return registry.chunks_of(name)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (dict(num_devices=0), "num_devices must be at least 1, got 0"),
        (dict(imbalance=0.5), "imbalance is the largest load over the mean, at least 1, got 0.5"),
        (dict(wished={"pipes": 2}), "a plan cannot be asked for 'pipes'; did you mean 'pipe'?"),
        (dict(wished={"pipe": 0}), "pipe must be at least 1, got 0"),
        (
            dict(wished={"memory_mode": "all"}),
            "memory_mode must be one of stage, layer, named, products, stash",
        ),
        (dict(wished={"vocabulary": "some"}), "vocabulary must be one of split, whole, got 'some'"),
        (
            dict(wished={"schedule": "1f1b", "num_chunks": 2}),
            "schedule 'one_f_one_b' has one stage per pipe rank, got 2",
        ),
        (
            dict(num_devices=10**6, batch_size=10**6),
            "'frontier' joins at most 78848 devices, got 1000000; use",
        ),
    ],
)
def test_a_wrong_question_is_one_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence.replace("?", r"\?").replace("(", r"\(")):
        asked(**options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            dict(wished={"pipe": 3}),
            "no mesh of 16 devices has pipe=3; the nearest that is possible is pipe=4, data=",
        ),
        (
            dict(wished={"expert": 16}),
            "no mesh of mixtral_8x7b on 16 devices with expert=16 is possible: the expert axis must divide the 8 "
            "experts, got pipe=1, data=1, expert=16; the nearest that is possible is pipe=1, data=2, expert=8",
        ),
        (
            dict(batch_size=65, num_devices=74),
            "is possible: .*; use a batch that is a multiple of 37 sequences, such as 74",
        ),
        (
            dict(batch_size=64, wished={"num_microbatches": 3}),
            "divide into the 3 microbatches, got .*; use a batch that is a multiple of 3 sequences, such as 66",
        ),
        (
            dict(batch_size=64, wished={"pipe": 2, "num_microbatches": 3}),
            "with pipe=2 is possible: .*; use a batch that is a multiple of 24 sequences, such as 72",
        ),
    ],
)
def test_nothing_possible_names_the_nearest(options, sentence):
    question, rejections = asked(**options), Rejections()
    with pytest.raises(ValueError, match=sentence):
        check_some(question, meshes(question, rejections), rejections)


def test_a_question_is_checked_when_it_is_changed():
    with pytest.raises(ValueError, match="batch_size must be at least 1, got -1"):
        replace(asked(), batch_size=-1)
