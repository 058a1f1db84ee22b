"""Tests of the run directory and its lock."""

import gc

import pytest

from piperjax.training.run_directory import RunLock, make_run_directory


def test_parents_are_made(tmp_path):
    make_run_directory(tmp_path / "a/b/c")
    make_run_directory(tmp_path / "a/b/c")
    assert (tmp_path / "a/b/c").is_dir()


def test_a_file_in_the_way_is_explained(tmp_path):
    (tmp_path / "a").write_text("")
    for path in (tmp_path / "a", tmp_path / "a/b"):
        with pytest.raises(ValueError, match=r"cannot make the run directory .*; choose another --out"):
            make_run_directory(path)


def test_one_run_at_a_time(tmp_path):
    first = RunLock(tmp_path)
    with pytest.raises(
        ValueError, match=r"is in use by process \d+ on .*; wait for it, or choose another --out"
    ):
        RunLock(tmp_path)
    first.close()
    second = RunLock(tmp_path)
    second.close()
    second.close()
    gc.collect()
