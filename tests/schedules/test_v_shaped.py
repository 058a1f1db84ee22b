"""V-shaped schedules drawn out, and the building blocks of V-Half and V-Min."""

from collections import Counter

from piperjax.schedules.ticks import pack
from piperjax.schedules.v_shaped import v_half, v_min, zb_v


def test_v_min_drawn_out():
    assert str(v_min(2, 3)) == (
        "rank 0 | 0F0 3F0 3I0 0F1 3W0 0I0 0W0 3F1 3I1 0F2 3W1 0I1 0W1 3F2 3I2 3W2 0I2 0W2\n"
        "rank 1 | 1F0 2F0 2I0 1I0 1F1 2F1 2W0 1W0 2I1 1I1 1F2 2F2 2W1 1W1 2I2 1I2 2W2 1W2"
    )


def test_v_half_drawn_out():
    assert str(v_half(2, 3)) == (
        "rank 0 | 0F0 3F0 0F1 3I0 3W0 3F1 0F2 0I0 3I1 0W0 3W1 3F2 0I1 3I2 0W1 3W2 0I2 0W2\n"
        "rank 1 | 1F0 2F0 1F1 2F1 2I0 1I0 2W0 1F2 1W0 2F2 2I1 1I1 2W1 1W1 2I2 1I2 2W2 1W2"
    )


def test_zb_v_in_ticks_drawn_out():
    assert str(pack(zb_v(2, 4))) == (
        "rank 0 | 0F0 0F1 0F2 3F0 3I0 3F1+3W0     0F3+3I1+3W1 3F2+0I0 3I2+0W0+3W2 3F3+0I1+0W1 3I3+3W3 "
        "0I2 0W2 0I3+0W3\n"
        "rank 1 | .   1F0 2F0 1F1 2F1 1F2+2I0+2W0 2F2+1I0+1W0 1F3+2I1 2F3+1I1+2W1 2I2+1W1+2W2 1I2+1W2 "
        "2I3 1I3 2W3+1W3"
    )


def test_the_middle_of_a_long_run_repeats_every_six_units():
    for schedule in (v_half(4, 64), v_min(4, 64), v_half(5, 64), v_min(6, 64)):
        ticks = pack(schedule, "single").tick_of()
        steps = Counter(
            ticks[action._replace(microbatch=action.microbatch + 1)] - tick
            for action, tick in ticks.items()
            if action.kind in "FI" and 20 <= action.microbatch < 40
        )
        assert set(steps) == {6}
