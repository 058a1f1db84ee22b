"""Zero-bubble schedules drawn out, and the wave with weight gradients in its slack."""

from piperjax.schedules.ticks import pack
from piperjax.schedules.zero_bubble import zb_dual, zb_h1, zb_h2


def test_zb_h1_drawn_out():
    assert str(zb_h1(3, 4)) == (
        "rank 0 | 0F0 0F1 0F2 0I0 0W0 0F3 0I1 0W1 0I2 0W2 0I3 0W3\n"
        "rank 1 | 1F0 1F1 1I0 1F2 1I1 1W0 1F3 1I2 1W1 1I3 1W2 1W3\n"
        "rank 2 | 2F0 2I0 2F1 2I1 2F2 2I2 2W0 2F3 2I3 2W1 2W2 2W3"
    )


def test_zb_h2_never_waits_at_equal_times():
    assert str(pack(zb_h2(2, 4))) == (
        "rank 0 | 0F0 0F1 0F2 0I0 0W0 0F3 0I1 0W1 0I2 0W2 0I3 0W3 .  \n"
        "rank 1 | .   1F0 1I0 1F1 1I1 1F2 1I2 1W0 1F3 1I3 1W1 1W2 1W3"
    )  # fmt: skip


def test_zb_dual_in_ticks_drawn_out():
    assert str(pack(zb_dual(3, 5))) == (
        "rank 0 | 0F0 0F1 0F2     0F3     0F4+0I0 0I1+0W0 0I2+0W1+0W2 0I3+0W3 0I4+0W4\n"
        "rank 1 | .   1F0 1F1     1F2+1I0 1F3+1I1 1F4+1I2 1I3+1W0+1W1 1I4+1W2 1W3+1W4\n"
        "rank 2 | .   .   2F0+2I0 2F1+2I1 2F2+2I2 2F3+2I3 2F4+2I4+2W0 2W1+2W2 2W3+2W4"
    )


def test_zb_dual_keeps_the_wave():
    for P, M in ((2, 3), (3, 5), (4, 8), (7, 16), (8, 64)):
        ticks = pack(zb_dual(P, M)).tick_of()
        for (kind, stage, m), tick in ticks.items():
            if kind != "W":
                assert tick == m + (stage if kind == "F" else 2 * (P - 1) - stage)


def test_packing_zb_h1_gives_the_table_of_zb_dual():
    assert pack(zb_h1(4, 9)).ticks == pack(zb_dual(4, 9)).ticks


def test_too_few_microbatches_to_fill_the_wave_begin_with_one_action_per_tick():
    def most_per_tick(table):
        return [max(sum(a.kind != "W" for a in actions) for actions in row) for row in table.ticks]

    assert set(most_per_tick(pack(zb_dual(8, 8)))) == {0, 1}
    assert most_per_tick(pack(zb_dual(8, 12)))[:23] == [1] * 23 and 2 in most_per_tick(pack(zb_dual(8, 12)))
    assert most_per_tick(pack(zb_dual(8, 15)))[8:14] == [2] * 6
