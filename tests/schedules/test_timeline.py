"""Both clocks against published formulas, and the tick table against the ideal."""

import pytest

from piperjax.schedules.classic import forward_only, gpipe, one_f_one_b
from piperjax.schedules.dualpipe import dualpipe_v
from piperjax.schedules.ticks import pack
from piperjax.schedules.timeline import ActionCosts, lockstep, simulate

GRID = [(P, M) for P in (1, 2, 3, 4, 7, 8, 16) for M in (1, 2, 5, 8, 33, 64)]


@pytest.mark.parametrize("builder", [gpipe, one_f_one_b])
@pytest.mark.parametrize(("forward", "backward"), [(1.0, 1.0), (1.0, 2.0), (1.2, 2.4)])
def test_asynchronous_bubble_is_the_published_one(builder, forward, backward):
    for P, M in GRID:
        timeline = simulate(builder(P, M), ActionCosts(forward=forward, backward=backward))
        assert timeline.bubble_seconds == pytest.approx((P - 1) * (forward + backward))
        assert timeline.bubble_fraction == pytest.approx((P - 1) / (M + P - 1))


def test_in_flight_is_the_published_one():
    for P, M in GRID:
        assert simulate(one_f_one_b(P, M), ActionCosts()).peak_in_flight() == tuple(
            min(P - r, M) for r in range(P)
        )
        assert simulate(gpipe(P, M), ActionCosts()).peak_in_flight() == (M,) * P


def test_transfers_delay_the_first_and_last_microbatch():
    timeline = simulate(gpipe(4, 3), ActionCosts(forward=1.0, backward=1.0, transfer=0.25))
    assert timeline.step_seconds == pytest.approx(2 * (3 + 3) + 2 * 3 * 0.25)


def test_unequal_stages_cost_their_slowest():
    timeline = simulate(one_f_one_b(2, 50), ActionCosts(forward=(1.0, 3.0), backward=(2.0, 6.0)))
    assert timeline.step_seconds == pytest.approx(1.0 + 50 * 9.0 + 2.0)


@pytest.mark.parametrize("builder", [gpipe, one_f_one_b])
def test_lockstep_reaches_the_ideal(builder):
    for P, M in GRID:
        table = pack(builder(P, M))
        for costs in (
            ActionCosts(),
            ActionCosts(forward=1.0, backward=1.0),
            ActionCosts(forward=1.5, backward=1.0),
        ):
            expected = (M + P - 1) * (costs.forward + costs.backward)
            assert lockstep(table, costs).step_seconds == pytest.approx(expected)


def test_forward_only_passes_through():
    assert lockstep(pack(forward_only(4, 6)), ActionCosts()).step_seconds == pytest.approx(9.0)


def test_every_rank_is_timed_from_its_own_first_action():
    timeline = simulate(gpipe(3, 4), ActionCosts(forward=1.0, backward=2.0))
    assert timeline.rank_bubble_seconds == timeline.bubble_seconds == 6.0
    evaluation = simulate(forward_only(4, 6), ActionCosts())
    assert evaluation.bubble_seconds == 3.0 and evaluation.rank_bubble_seconds == 0.0


def test_exposed_communication_lengthens_f_and_b():
    costs = ActionCosts(
        forward=1.0, backward=2.0, exposed_forward=0.5, exposed_backward=(0.25, 0.0, 0.0, 0.0)
    )
    for timeline in (simulate(one_f_one_b(4, 20), costs), lockstep(pack(one_f_one_b(4, 20)), costs)):
        assert max(timeline.busy_seconds) == pytest.approx(20 * 3.75)
        assert min(timeline.busy_seconds) == pytest.approx(20 * 3.5)


def test_embedding_and_head_are_of_the_edges_asynchronously_and_of_everybody_in_lockstep():
    costs = ActionCosts(forward=1.0, backward=2.0, embedding=0.5, head=1.5, embedding_gradient=0.25)
    M = 6
    alone = simulate(one_f_one_b(1, M), costs).step_seconds
    assert alone == lockstep(pack(one_f_one_b(1, M)), costs).step_seconds == pytest.approx(M * 5.25)
    ends = simulate(one_f_one_b(3, M), costs).busy_seconds
    assert ends == pytest.approx((M * 3.75, M * 3.0, M * 4.5))
    together = lockstep(pack(one_f_one_b(3, M)), costs)
    assert together.busy_seconds == pytest.approx((M * 3.0,) * 3)
    assert together.step_seconds == pytest.approx((M + 2) * 3.0 + M * 2.25)


def test_no_backward_of_a_tick_starts_before_its_head():
    costs = ActionCosts(forward=(1.0, 5.0), backward=2.0, head=1.0)
    timeline = lockstep(pack(one_f_one_b(2, 2)), costs)
    assert str(timeline.schedule.ranks[0][-1]) == "0B1"
    assert timeline.step_seconds == pytest.approx(1 + 2 * (5 + 1 + 2) + 2)


def test_overlap_is_saved_where_forward_and_backward_do_not_need_each_other():
    costs = ActionCosts(forward=1.0, backward=2.0, overlap=0.5)
    # Every forward and backward of a single rank are of the same microbatch.
    assert simulate(one_f_one_b(1, 4), costs).step_seconds == 12.0
    assert lockstep(pack(one_f_one_b(1, 4)), costs).step_seconds == 12.0
    # In lockstep the last stage runs both of the same microbatch, so nobody is faster for the others' overlap.
    assert lockstep(pack(one_f_one_b(2, 4)), costs).step_seconds == 15.0
    whole = dualpipe_v(4, 64)
    plain, paired = (simulate(whole, ActionCosts(overlap=seconds)).step_seconds for seconds in (0.0, 0.5))
    assert plain - paired == pytest.approx(0.5 * (2 * (64 - 8) + 4), abs=3.0)


def test_costs_are_one_number_or_one_per_stage():
    with pytest.raises(
        ValueError, match="forward seconds must be one number or one per stage, got 2 for 3 stages"
    ):
        simulate(gpipe(3, 4), ActionCosts(forward=(1.0, 2.0)))


def test_negative_costs_are_refused():
    with pytest.raises(ValueError, match="forward seconds must not be negative, got -1.0"):
        ActionCosts(forward=-1.0)
