"""Tests of compiler flags: ours after the user's, theirs untouched, and none that XLA does not know."""

import sys

import pytest

from piperjax.runtime.bounded_process import run_bounded
from piperjax.runtime.xla_flags import (
    BESIDE_EXCHANGES,
    FLAGS,
    GONE,
    Flag,
    Trial,
    detect_backend,
    given_flags,
    options_beside_exchanges,
    parse_flags,
    read_trial,
    settle,
    trial_program,
)

HIDING = "--xla_gpu_enable_latency_hiding_scheduler"
LIMIT = "--xla_gpu_experimental_parallel_collective_overlap_limit"
BUFFER = "--xla_gpu_enable_command_buffer"


def takes_all(text):
    return Trial()


def try_for_real(text, backend="cpu"):
    """As on a machine of that backend, but with the XLA of jaxlib alone."""
    environ = {"XLA_FLAGS": text, "PATH": "", "JAX_PLATFORMS": "cpu"}
    ended = run_bounded([sys.executable, *trial_program(backend)], limit_seconds=60, environ=environ)
    return read_trial(returncode=ended.returncode, stderr=ended.stderr)


def test_what_each_backend_gets():
    assert settle("", "rocm", takes_all).text == f"{HIDING}=true {LIMIT}=1 {BUFFER}="
    assert settle("", "cuda", takes_all).text == f"{HIDING}=true {LIMIT}=4"
    settled = settle("", "cuda", takes_all)
    assert settled.lines == (f"{HIDING}=true {LIMIT}=4 added to XLA_FLAGS for cuda",)


def test_no_flag_for_the_cpu_changes_a_result():
    # Only how long a collective may wait.
    assert all(flag.name.endswith("_timeout_seconds") for flag in FLAGS["cpu"])


@pytest.mark.parametrize("backend", FLAGS)
def test_this_jaxlib_takes_every_flag_of_ours(backend):
    text = " ".join(map(str, FLAGS[backend]))
    assert try_for_real(text) == Trial()
    assert all(flag.reason and not flag.name.startswith("-") for flag in FLAGS[backend])


def test_exchanges_between_processes_have_memory_of_their_own_unless_the_user_says_else():
    found = options_beside_exchanges("cpu", "--xla_dump_to=/tmp/a", chunks=2, processes=2)
    assert found == {"xla_multiheap_size_constraint_per_heap": "1"}
    text = " ".join(map(str, BESIDE_EXCHANGES["cpu"]))
    assert try_for_real(text) == Trial()
    assert options_beside_exchanges("cpu", text, chunks=2, processes=2) == {}
    for fewer in ({"chunks": 1, "processes": 2}, {"chunks": 2, "processes": 1}):
        assert options_beside_exchanges("cpu", "", **fewer) == {}
    assert options_beside_exchanges("gpu", "", chunks=2, processes=2) == {}


def test_flags_that_are_gone_are_unknown_to_this_jaxlib():
    assert try_for_real(" ".join(f"--{name}=true" for name in GONE)).rejected == GONE


def test_what_the_user_set_stays_and_comes_first():
    given = f"--xla_dump_to=/tmp/a {HIDING}=false"
    settled = settle(given, "rocm", takes_all)
    assert settled.text == f"{given} {LIMIT}=1 {BUFFER}="
    assert [flag.name for flag in settled.added] == [LIMIT[2:], BUFFER[2:]]
    assert f"XLA_FLAGS has {HIDING}=false, which stays instead of {HIDING}=true" in settled.lines
    # The same value as ours is nothing to speak of.
    assert settle(f"{HIDING}=true", "rocm", takes_all).lines == (
        f"{LIMIT}=1 {BUFFER}= added to XLA_FLAGS for rocm",
    )


def test_a_flag_of_ours_that_is_unknown_is_left_out_with_a_line(monkeypatch):
    bogus = Flag(name="xla_no_such_flag", value="1", reason="a test")
    monkeypatch.setitem(FLAGS, "rocm", (bogus, *FLAGS["rocm"]))
    settled = settle("", "rocm", try_for_real, versions="jaxlib 0.10.2")
    assert settled.text == f"{HIDING}=true {LIMIT}=1 {BUFFER}="
    assert settled.lines[1] == "--xla_no_such_flag=1 left out: jaxlib 0.10.2 does not take it"


def test_a_value_that_xla_cannot_read_is_left_out_too(monkeypatch):
    bad = Flag(name=LIMIT[2:], value="many", reason="a test")
    monkeypatch.setitem(FLAGS, "cuda", (bad, *FLAGS["cuda"][:1]))
    assert settle("", "cuda", try_for_real).text == f"{HIDING}=true"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            "--xla_no_such_flag=1",
            "has --xla_no_such_flag=1, which is not known, or not with this value, to jaxlib 1",
        ),
        (
            "--xla_gpu_enable_async_collectives",
            "=true, which was removed from XLA and would end the process; take it",
        ),
        (f"{LIMIT}=many", "overlap_limit=many, which is not known, or not with this value"),
        (
            "flags.txt",
            "XLA_FLAGS names the file flags.txt, since it does not begin with --, but that cannot be read",
        ),
        ("--xla_dump_to='/tmp", "a quotation mark that is not closed"),
    ],
)
def test_a_mistake_of_the_user_is_one_sentence(given, words):
    with pytest.raises(ValueError) as caught:
        settle(given, "cpu", try_for_real, versions="jaxlib 1")
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_nothing_is_added_where_nothing_can_be_tried():
    settled = settle("--xla_dump_to=/tmp/a", "rocm", lambda text: Trial(failure="it hung"))
    assert settled.text == "--xla_dump_to=/tmp/a" and settled.added == ()
    assert settled.lines == ("nothing added to XLA_FLAGS: it hung",)
    theirs = " ".join(map(str, FLAGS["rocm"]))
    settled = settle(theirs, "rocm", lambda text: Trial(failure="it hung"))
    assert settled.text == theirs and settled.lines == ("no trial of XLA_FLAGS: it hung",)


def test_flags_in_a_file(tmp_path):
    path = tmp_path / "flags"
    path.write_text("--xla_a=1\n--xla_b=2\n")
    assert given_flags(str(path)) == "--xla_a=1 --xla_b=2"
    assert settle(str(path), "cuda", takes_all).text == f"--xla_a=1 --xla_b=2 {HIDING}=true {LIMIT}=4"
    assert given_flags("  --xla_a=1 ") == "--xla_a=1" and given_flags("") == ""


def test_flags_are_read_as_xla_reads_them():
    text = "--xla_a=1 --xla_b --xla_a=2 --xla_c='' --xla_d='x y'"
    assert parse_flags(text) == {"xla_a": "2", "xla_b": "true", "xla_c": "", "xla_d": "x y"}


def test_what_a_trial_tells():
    unknown = "F1 parse_flags_from_env.cc:234] Unknown flags in XLA_FLAGS: --xla_a=1 -xla_b --xla_c=''\n"
    assert read_trial(returncode=-6, stderr=unknown).rejected == {"xla_a", "xla_b", "xla_c"}
    # An error of Python came after the flags were read: no device, for example.
    assert read_trial(returncode=1, stderr="RuntimeError: no device") == Trial()
    assert "did not end in time" in read_trial(returncode=None, stderr="").failure
    assert "signal 11" in read_trial(returncode=-11, stderr="").failure
    assert (
        "Could not open"
        in read_trial(returncode=1, stderr="parse_flags_from_env.cc:1] Could not open").failure
    )


def test_the_backend_is_known_before_jax_starts(tmp_path):
    rocm, cuda = {"jax-rocm7-plugin": "0.10.2"}, {"jax-cuda12-plugin": "0.10.2"}
    assert detect_backend({}, {}, tmp_path) == "cpu"
    assert detect_backend({}, rocm, tmp_path) == "cpu"  # no device
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/kfd").touch()
    (tmp_path / "dev/nvidiactl").touch()
    assert detect_backend({}, rocm, tmp_path) == "rocm"
    assert detect_backend({}, cuda, tmp_path) == "cuda"
    assert detect_backend({"JAX_PLATFORMS": "cpu"}, rocm, tmp_path) == "cpu"
    assert detect_backend({"JAX_PLATFORMS": "rocm,cpu"}, {}, tmp_path) == "rocm"
