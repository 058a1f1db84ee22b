"""Explanations: why a mesh lost, checked against the two plans, and single choices."""

from dataclasses import replace
from functools import lru_cache

import pytest

from meshes.platform import load_platform
from models.presets import preset
from piperjax.planner.cells import ways_on
from piperjax.planner.dispatchers import Way
from piperjax.planner.explain import explain, variations
from piperjax.planner.search import priced, priced_as_it_is, search


@lru_cache(maxsize=2)
def found(capacity_factor=None):
    wished = {"capacity_factor": capacity_factor}
    platform = load_platform("frontier")
    return search(preset("mixtral_8x7b"), platform, 64, batch_size=256, seq_len=4096, wished=wished)


def test_a_slower_mesh_is_compared_part_by_part():
    result = found()
    asked = {"pipe": 16, "expert": 4}
    explanation = explain(result, asked)
    assert explanation.candidate.mesh == (16, 1, 4)
    best, this = result.best.time, explanation.candidate.time
    assert sum(part[1] for part in explanation.parts) == pytest.approx(best.step_seconds)
    assert sum(part[2] for part in explanation.parts) == pytest.approx(this.step_seconds)
    assert f"{this.step_seconds / best.step_seconds - 1:.1%} longer: most of it is " in explanation.sentence
    name, before, after = max(explanation.parts, key=lambda part: part[2] - part[1])
    assert f"{after:.4g} s instead of {before:.4g}" in explanation.sentence, name


def test_a_difference_within_the_uncertainty_is_said_to_be_one():
    result = found(capacity_factor=0)
    runner_up = result.ranked[1]
    explanation = explain(result, runner_up.mesh._asdict())
    assert explanation.candidate.plan == runner_up.plan
    assert "a difference that only a measurement decides" in explanation.sentence


def test_the_best_mesh_is_the_best():
    assert explain(found(), found().best.mesh._asdict()).sentence == "this is the best plan"


def test_what_does_not_fit_is_told_in_bytes_with_what_would():
    explanation = explain(found(), {"pipe": 1, "expert": 1})
    assert explanation.candidate is None and explanation.parts == ()
    assert "more than a device has; largest: " in explanation.sentence
    assert explanation.sentence.endswith(" fits")


def test_what_is_impossible_is_told_as_such():
    assert "must divide the 8 experts" in explain(found(), {"expert": 16}).sentence
    with pytest.raises(ValueError, match="did you mean 'pipe'"):
        explain(found(), {"pip": 2})


def test_single_choices_are_the_best_plan_but_for_one():
    result = found()
    plan, scores = result.best.plan, result.scores
    seconds = scores.seconds[scores.row_of(plan)]
    options = variations(result)
    assert {one.choice for one in options} == {
        "schedule",
        "microbatches",
        "memory mode",
        "vocabulary",
        "dispatch",
        "gradients",
    }
    # Narrow gradients are no matter of seconds.
    searched = [one for one in options if one.choice != "gradients"]
    assert not any(one.fits and one.slower < -0.02 for one in searched), "the search would have taken it"
    for one in options:
        if one.choice == "memory mode":
            other = priced(result.question, replace(plan, memory_mode=one.value))
            assert other.time.step_seconds == pytest.approx(seconds * (1 + one.slower), rel=0.03)
            assert one.num_bytes == pytest.approx(other.peak_bytes, rel=0.02)


def test_every_dispatcher_with_every_number_of_chunks_is_an_alternative():
    result = found()
    best = result.best.plan
    tried = ways_on(result.question, result.best.mesh, best.tokens_per_device)
    options = {one.value: one for one in variations(result) if one.choice == "dispatch"}
    assert len(tried) > 2
    assert {str(way) for way in tried} == {*options, str(Way(best.dispatch, best.dispatch_chunks))}
    for way in tried:
        if str(way) in options:
            plan = replace(best, dispatch=way.dispatch, dispatch_chunks=way.chunks)
            other = priced_as_it_is(result.question, plan)
            assert options[str(way)].num_bytes == other.peak_bytes
            assert options[str(way)].slower == other.time.step_seconds / result.best.time.step_seconds - 1
