"""Tests of findings."""

import pytest

from piperjax.doctor.finding import Finding, error, note, ok, warning


def test_a_finding_is_one_sentence():
    assert error("disk", "0 MiB free", "choose another --out").sentence == "0 MiB free; choose another --out"
    assert ok("disk", "9 GiB free").sentence == "9 GiB free" == note("disk", "9 GiB free").sentence
    assert (warning("a", "b", "c").level, warning("a", "b", "c").check) == ("warning", "a")


def test_what_is_wrong_says_what_to_do():
    for level in ("error", "warning"):
        with pytest.raises(ValueError, match=f"an {level} must say what to do, but 'full' does not"):
            Finding(check="disk", level=level, found="full")
    with pytest.raises(ValueError, match="level must be one of error, warning, note, ok, got 'bad'"):
        Finding(check="disk", level="bad", found="full")
