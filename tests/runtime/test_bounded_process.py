"""Tests of processes that end in time."""

import sys
import time

from piperjax.runtime.bounded_process import run_bounded


def python(program, **kwargs):
    return run_bounded([sys.executable, "-c", program], **{"limit_seconds": 20, **kwargs})


def test_what_it_printed_and_how_it_ended():
    ended = python("import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)")
    assert (ended.returncode, ended.stdout, ended.stderr) == (3, "out\n", "err\n")


def test_it_has_no_input_and_the_environment_it_is_given():
    ended = python("import os, sys; print(repr(sys.stdin.read()), os.environ['A'])", environ={"A": "b"})
    assert ended.stdout == "'' b\n"


def test_an_abort_is_the_number_of_its_signal():
    assert python("import os; os.abort()").returncode == -6


def test_what_hangs_is_killed_with_its_children_and_what_it_printed_is_kept():
    program = """
import subprocess, sys, time
print("begun", flush=True)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
time.sleep(60)
"""
    start = time.monotonic()
    ended = python(program, limit_seconds=1)
    assert time.monotonic() - start < 10
    assert ended.returncode is None and ended.stdout == "begun\n"


def test_a_child_that_outlives_it_does_not_delay_us():
    program = (
        "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    )
    start = time.monotonic()
    python(program, limit_seconds=2)
    assert time.monotonic() - start < 10


def test_a_program_that_is_not_there():
    ended = run_bounded(["no-such-program"], limit_seconds=1)
    assert ended.returncode is None and ended.stderr == "no-such-program: No such file or directory"
