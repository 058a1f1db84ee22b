"""Tests of how much memory a process may use."""

from piperjax.runtime.host_memory import host_memory_bytes


def test_a_container_may_have_less_memory_than_the_computer(tmp_path):
    whole = host_memory_bytes([])
    assert whole is None or whole > 2**28
    limit, none = tmp_path / "limit", tmp_path / "none"
    limit.write_text("268435456\n")
    none.write_text("max\n")
    assert host_memory_bytes([str(limit)]) == 2**28
    assert host_memory_bytes([str(none), str(tmp_path / "missing")]) == whole
