"""Job scripts: they parse, and a job that runs out of time saves, is requeued and goes on."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "launch").glob("*.sbatch"))

# Stands in for a training run: saves when asked and exits as train.py does, or ends by itself.
STEP = """
import signal, sys, time
def save(number, frame):
    time.sleep(0.3)
    print("saved", flush=True)
    sys.exit(128 + number)
signal.signal(signal.SIGUSR1, save)
print("started", *sys.argv[1:], flush=True)
time.sleep({seconds})
sys.exit({code})
"""


@pytest.mark.parametrize(
    "path", [*SCRIPTS, ROOT / "launch" / "requeue.sh", ROOT / ".ci" / "run"], ids=lambda p: p.name
)
def test_scripts_parse(path):
    subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_jobs_ask_for_a_signal_and_may_be_requeued(path):
    text = path.read_text()
    options = re.findall(r"^#SBATCH (\S+)", text, flags=re.MULTILINE)
    assert {"--signal=B:USR1@300", "--requeue", "--open-mode=append"} <= set(options)
    # One process for every device that the node is asked for, each of which sees all devices.
    tasks, gpus = (re.search(rf"--{name}-per-node=(\d+)", text).group(1) for name in ("ntasks", "gpus"))
    assert tasks == gpus
    assert "--gpu-bind=none" in text


def run_job(tmp_path, *, seconds, code, ask):
    """Runs a job script with stand-ins for srun and scontrol; returns its exit code and what was printed."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "step.py").write_text(STEP.format(seconds=seconds, code=code))
    stand_ins = {
        "srun": f'#!/bin/bash\nexec "{sys.executable}" step.py "$@"\n',
        "scontrol": '#!/bin/bash\necho "scontrol $*"\n',
    }
    for name, text in stand_ins.items():
        path = tmp_path / "bin" / name
        path.write_text(text)
        path.chmod(0o755)
    (tmp_path / "job").write_text(
        f'set -eo pipefail\nsource "{ROOT}/launch/requeue.sh"\nrun_and_requeue srun one "two words"\n'
    )
    environment = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SLURM_JOB_ID": "42"}
    job = subprocess.Popen(
        ["bash", "job"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    first = job.stdout.readline()
    if ask:
        time.sleep(0.1)
        job.send_signal(signal.SIGUSR1)
    rest, _ = job.communicate(timeout=30)
    return job.returncode, (first + rest).splitlines()


def test_a_job_that_runs_out_of_time_saves_and_is_requeued(tmp_path):
    code, lines = run_job(tmp_path, seconds=20, code=0, ask=True)
    assert code == 0
    assert lines == [
        "started one two words",
        "saved",
        "time is up: requeueing job 42, it goes on from its last checkpoint",
        "scontrol requeue 42",
    ]


@pytest.mark.parametrize("code", [0, 2])
def test_a_job_that_ends_by_itself_is_not_requeued(tmp_path, code):
    assert run_job(tmp_path, seconds=0, code=code, ask=False) == (code, ["started one two words"])


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ([], "submit the job from the root of the repository; there is no train.py in"),
        (["train.py"], "run 'make install EXTRA=cuda' on a login node first"),
    ],
)
def test_what_is_missing_is_said(tmp_path, files, sentence):
    for name in files:
        (tmp_path / name).touch()
    script = f'source "{ROOT}/launch/requeue.sh"; check_installed cuda'
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert sentence in done.stderr
