"""Tests of the checks of a SLURM job."""

import pytest

from piperjax.doctor.slurm import distribution, gpu_binding, step

STEP = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "16",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
}


@pytest.mark.parametrize(
    ("change", "level", "words"),
    [
        ({}, "ok", "process 9 of 16 on 2 nodes"),
        (
            {"SLURM_STEP_NUM_TASKS": "1"},
            "note",
            "the job has 16 tasks, but this is one process outside srun; start",
        ),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"}, "ok", "job 7, one process"),
        (
            {"SLURM_LOCALID": None},
            "error",
            "a step of 16 tasks without SLURM_LOCALID; pass SLURM's variables on",
        ),
        ({"SLURM_PROCID": "one"}, "error", "SLURM_PROCID=one is not a number"),
        ({"SLURM_NTASKS": "8"}, "error", "SLURM_NTASKS=8 and SLURM_PROCID=9 do not fit a step of 16 tasks"),
        ({"SLURM_PROCID": "16"}, "error", "SLURM_PROCID=16 do not fit a step of 16 tasks"),
    ],
)
def test_numbers_of_a_step(machine, change, level, words):
    environ = {name: value for name, value in (STEP | change).items() if value is not None}
    (finding,) = step(machine(environ=environ))
    assert finding.level == level and words in finding.sentence


def test_outside_slurm(machine):
    env = machine()
    assert step(env) == distribution(env) == gpu_binding(env) == []


def test_consecutive_processes_fill_a_node(machine):
    assert distribution(machine(environ=STEP | {"SLURM_DISTRIBUTION": "block:cyclic"})) == []
    (finding,) = distribution(machine(environ=STEP | {"SLURM_DISTRIBUTION": "cyclic"}))
    assert finding.level == "warning" and "--distribution=block:block" in finding.advice


@pytest.mark.parametrize(
    ("change", "level", "words"),
    [
        ({}, None, ""),
        (
            {"ROCR_VISIBLE_DEVICES": "0"},
            "error",
            "process 1 of this node sees 1 GPU, but JAX gives it GPU 1",
        ),
        (
            {"SLURM_STEP_NUM_TASKS": "8"},
            "warning",
            "4 processes per node leave 4 of 8 GPUs idle; start one process",
        ),
        ({"ROCR_VISIBLE_DEVICES": "0", "SLURM_LOCALID": "0"}, None, ""),
    ],
)
def test_each_process_sees_its_gpu(machine, change, level, words):
    files = {f"sys/bus/pci/devices/0000:{number}1:00.0/vendor": "0x1002" for number in range(8)}
    files |= {f"sys/bus/pci/devices/0000:{number}1:00.0/class": "0x038000" for number in range(8)}
    findings = gpu_binding(machine.rocm(files=files, environ=STEP | change))
    assert [finding.level for finding in findings] == ([level] if level else [])
    assert all(words in finding.sentence for finding in findings)
