"""Times given on the command line; what `show` prints is tested in test_main."""

import pytest

from piperjax.schedules.show import parse_costs
from piperjax.schedules.timeline import ActionCosts


def test_left_out_times_follow_from_the_others():
    assert parse_costs([]) == ActionCosts()
    assert parse_costs(["backward=3"]).input_gradient == parse_costs(["backward=3"]).weight_gradient == 1.5
    costs = parse_costs(["backward=3,4", "input-gradient=2"])
    assert costs.weight_gradient == (1.0, 2.0) and costs.forward == 1.0
    assert parse_costs(["input_gradient=2,1"]).weight_gradient == (0.0, 1.0)


def test_every_cost_can_be_given():
    costs = parse_costs(
        ["head=0.5", "embedding=0.25", "embedding_gradient=0.125", "overlap=0.1", "transfer=1"]
    )
    assert (costs.head, costs.embedding, costs.embedding_gradient) == (0.5, 0.25, 0.125)
    assert (costs.overlap, costs.transfer) == (0.1, 1.0)


def test_what_is_no_cost_is_one_sentence():
    with pytest.raises(ValueError, match="no cost named 'heads'; .*; did you mean 'head'?"):
        parse_costs(["heads=1"])
    with pytest.raises(ValueError, match="--cost takes forward=SECONDS, or one number per stage with commas"):
        parse_costs(["forward=1,,2"])
