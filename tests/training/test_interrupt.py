"""Tests of signals: the first is remembered, the second ends the process, and handlers are given back."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from piperjax.training.interrupt import HANDLED, Interrupt

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("number", HANDLED)
def test_the_first_signal_is_remembered(number, capfd):
    before = [signal.getsignal(handled) for handled in HANDLED]
    with Interrupt() as interrupt:
        assert interrupt.signal is None and interrupt.name == ""
        os.kill(os.getpid(), number)
        assert interrupt.signal == number and interrupt.name == signal.Signals(number).name
    assert [signal.getsignal(handled) for handled in HANDLED] == before
    assert f"{interrupt.name}: saving after this step; once more to stop at once" in capfd.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_second_signal_ends_the_process_at_once(number, code):
    program = (
        "import time\n"
        "from piperjax.training.interrupt import Interrupt\n"
        "with Interrupt() as interrupt:\n"
        "    print('ready', flush=True)\n"
        "    while True:\n"
        "        time.sleep(0.01)\n"
        "        if interrupt.signal: print('heard', flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.stdout.readline() == "heard\n"
    process.send_signal(number)
    _, error = process.communicate(timeout=20)
    assert process.returncode == code and "stopped at once; the last complete checkpoint is kept" in error


def test_elsewhere_than_in_the_main_thread_signals_stay_as_they_are():
    before = [signal.getsignal(handled) for handled in HANDLED]
    seen = []

    def enter():
        with Interrupt():
            seen.extend(signal.getsignal(handled) for handled in HANDLED)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == before
