"""Lines with a marker are kept from standard error, others arrive, also the last ones of a process that is ended."""

import subprocess
import sys

PROGRAM = """
import os, sys
from piperjax.runtime.standard_error import without_lines
print("before noise", file=sys.stderr)
with without_lines({marker!r}):
    for number in range(1000):
        os.write(2, b"W heap.cc noise\\n")
    print("from Python", file=sys.stderr)
    os.write(2, b"from below\\n")
    {end}
os.write(2, b"after noise\\n")
"""


def written(marker, end="pass"):
    program = PROGRAM.format(marker=marker, end=end)
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    return found.returncode, found.stderr.splitlines()


def test_only_lines_with_the_marker_are_kept_back_and_only_meanwhile():
    assert written("heap.cc") == (0, ["before noise", "from Python", "from below", "after noise"])


def test_without_a_marker_nothing_is_kept_back():
    _, lines = written("")
    assert len(lines) == 1004


def test_last_words_arrive():
    status, lines = written("heap.cc", end="os.write(2, b'last words\\n'); os.abort()")
    assert status < 0
    assert "last words" in lines
