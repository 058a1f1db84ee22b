"""Remedies: the least change under which something fits comes first."""

import re
from dataclasses import replace

import numpy as np
import pytest

from meshes.platform import load_platform
from models.presets import preset
from piperjax.planner.candidates import Question, Rejections, meshes
from piperjax.planner.memory import RankMemory
from piperjax.planner.remedies import (
    NARROW_GRADIENTS,
    check_room,
    largest_terms,
    least_bytes,
    nearest_that_fits,
)
from piperjax.planner.scoring import capacity_bytes, memory_of, score

FRONTIER = load_platform("frontier")


def asked(model="mixtral_8x7b", num_devices=64, platform=FRONTIER, **wished):
    return Question(
        model=preset(model),
        platform=platform,
        num_devices=num_devices,
        batch_size=4 * num_devices,
        seq_len=4096,
        wished=wished,
    )


def scored(question):
    rejections = Rejections()
    return score(question, meshes(question, rejections), rejections)


@pytest.mark.parametrize(
    ("wished", "advice"),
    [
        # Other sizes near those that were wished for, with the rest as it is.
        (dict(pipe=2, expert=2, memory_mode="layer"), "pipe=4, data="),
        # The sizes as they are, without the rest.
        (
            dict(pipe=4, expert=8, memory_mode="stash"),
            "without memory_mode=stash, pipe=4, data=2, expert=8 fits",
        ),
    ],
)
def test_the_nearest_keeps_what_it_can(wished, advice):
    found = nearest_that_fits(asked(**wished))
    assert found.startswith(advice) and found.endswith(" fits")


def test_more_devices_are_proposed_last():
    found = nearest_that_fits(asked("deepseek_v3", 256))
    flags = "--capacity-factor 1.25 --overflow passes( --gradient-dtype bfloat16)?"
    assert re.match(rf"\d+ devices with {flags} are enough \(pipe=", found)
    huge = replace(FRONTIER, device=replace(FRONTIER.device, memory_bytes=2**30))
    assert nearest_that_fits(asked("deepseek_v3", 8, huge)) == (
        "use a smaller model, shorter sequences or devices with more memory"
    )


def test_room_is_checked_against_the_leanest_plan():
    question = asked(pipe=1, expert=1)
    scores = scored(question)
    row, num_bytes = scores.leanest(~scores.fits)
    assert num_bytes == pytest.approx(scores.all_bytes(np.arange(len(scores.seconds))).min())
    lacking = (num_bytes - capacity_bytes(question)) / 2**30
    with pytest.raises(ValueError, match=f"{lacking:.1f} more than a device has; largest: "):
        check_room(question, [scores])
    assert memory_of(scores, row).total == pytest.approx(num_bytes)
    fitting = asked()
    check_room(fitting, [scored(fitting)])


def test_the_leanest_plan_may_give_something_up():
    question = asked("xmoe_large", 40)
    with pytest.raises(ValueError) as plain:
        check_room(question, [scored(question)], advise=False)
    leaner = asked("xmoe_large", 40, **NARROW_GRADIENTS)
    with pytest.raises(ValueError) as given_up:
        check_room(question, [scored(question), scored(leaner)], advise=False)
    sentences = [str(raised.value) for raised in (plain, given_up)]
    needed = [float(re.search(r"needs ([\d.]+) GiB", sentence)[1]) for sentence in sentences]
    assert needed[1] < needed[0]
    assert "--" not in sentences[0] and ", --gradient-dtype bfloat16) needs" in sentences[1]


@pytest.mark.parametrize(
    "question",
    [
        asked("deepseek_v3", 256),
        asked("mixtral_8x7b", 16, capacity_factor=1.0),
        replace(asked("small", 8, load_platform("cpu8")), batch_size=16, seq_len=256, dtype="float32"),
    ],
    ids=lambda question: question.model.name,
)
def test_least_bytes_are_less_than_any_plan_needs_and_rule_out_what_is_far_too_small(question):
    scores = scored(question)
    for number, mesh in enumerate(scores.meshes):
        needed = scores.num_bytes[scores.mesh == number].min(initial=np.inf)
        assert needed / 4 < least_bytes(question, mesh) < needed, mesh


def test_largest_terms_are_in_words():
    names = RankMemory.__dataclass_fields__
    memory = RankMemory(
        **dict.fromkeys(names, 0.0) | {"stash": 3 * 2.0**30, "gradients": 2.0**30, "logits": 1.0}
    )
    assert largest_terms(memory, count=2) == "activations in flight 3.0, gradients 1.0"
