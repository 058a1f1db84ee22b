"""Tests of the checks of software on machines that are made up."""

import pytest

from piperjax.doctor import software
from piperjax.doctor.software import release, satisfies


def all_of(env):
    return [finding for check in software.CHECKS for finding in check(env)]


def bad(env):
    return [f"{finding.level}: {finding.sentence}" for finding in all_of(env) if finding.level != "ok"]


def test_a_good_machine(machine):
    assert bad(machine()) == ["note: no plugin for a GPU is installed: JAX runs on the CPU"]
    assert bad(machine.rocm()) == []


def test_python(machine):
    assert bad(machine(python=(3, 10, 4)))[0] == (
        "error: Python 3.10.4 is outside >=3.11; make .venv with another, make train PYTHON=..."
    )


def test_packages(machine):
    versions = {**machine.VERSIONS, "jax": "0.13.0", "optax": "0.2.4"}
    del versions["flax"]
    words = bad(machine(versions=versions))
    assert words[:3] == [
        "error: jax 0.13.0 is outside >=0.10,<0.13; run make install, or pip install -c constraints.txt",
        "error: flax is not installed; run make install",
        "error: optax 0.2.4 is outside >=0.2.5; run make install, or pip install -c constraints.txt",
    ]
    assert "error: jax 0.13.0 and jaxlib 0.10.2 are of different releases; install jaxlib==0.13.0" in words[3]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"jax-rocm7-plugin": "0.9.1"},
            "jax-rocm7-plugin 0.9.1 is not of the release of jaxlib 0.10.2; install jax",
        ),
        ({"jax-rocm7-pjrt": "0.10.1"}, "jax-rocm7-pjrt 0.10.1 is not of the release of jaxlib 0.10.2"),
        (
            {"jax-rocm7-pjrt": None},
            "jax-rocm7-plugin is installed without jax-rocm7-pjrt; run make install EXTRA=rocm",
        ),
        (
            {"jax-rocm60-plugin": "0.10.2"},
            "jax-rocm7-plugin and jax-rocm60-plugin are both installed; pip uninstall",
        ),
        (
            {"tensorflow": "2.19"},
            "warning: tensorflow is installed beside jax-rocm7-plugin; pip uninstall it",
        ),
    ],
)
def test_plugins_that_do_not_fit(machine, change, words):
    env = machine.rocm()
    versions = {name: version for name, version in (env.versions | change).items() if version}
    found = bad(machine(versions=versions))
    assert any(words in line for line in found), found


def test_a_later_build_of_a_release_fits(machine):
    versions = {**machine.ROCM, "jaxlib": "0.12.0.1", "jax": "0.12.0.1"}
    versions |= {"jax-rocm7-plugin": "0.12.0", "jax-rocm7-pjrt": "0.12.0.post2"}
    machine.rocm()
    assert bad(machine(versions=versions)) == []


def test_a_gpu_without_a_plugin_and_a_plugin_without_a_gpu(machine):
    versions = {**machine.VERSIONS, "jax-cuda12-plugin": "0.10.2", "jax-cuda12-pjrt": "0.10.2"}
    assert bad(machine(versions=versions)) == [
        "warning: jax-cuda12-plugin is installed but there is no /dev/nvidiactl, so no GPU; run this on a compute "
        "node, and in a container pass its devices (--device=/dev/kfd --device=/dev/dri, or --gpus all)"
    ]
    assert bad(machine(files=["dev/kfd"])) == [
        "warning: there is a GPU (/dev/kfd) but none of jax-rocm7-plugin, jax-rocm60-plugin is installed; run make "
        "install EXTRA=rocm, or JAX trains on the CPU"
    ]


def test_a_device_that_may_not_be_opened(machine, monkeypatch):
    monkeypatch.setattr(software.os, "access", lambda path, mode: False)
    assert bad(machine.rocm()) == [
        "error: /dev/kfd may not be opened by this user; add the user to the groups render and video"
    ]


def test_rocm_libraries(machine):
    files = {"opt/rocm-6.4.1/.info/version": "6.4.1-83", "opt/rocm-6.4.1/lib/libamdhip64.so.6": ""}
    machine(files=["dev/kfd"])
    env = machine(files=files, versions=machine.ROCM, environ={"ROCM_PATH": "/opt/rocm-6.4.1"})
    assert bad(env) == [
        "error: no librccl.so on LD_LIBRARY_PATH, in ROCM_PATH or /opt/rocm; load a ROCm 7 module, or set ROCM_PATH or "
        "LD_LIBRARY_PATH to where it is",
        "error: ROCm is 6.4.1-83, but jax-rocm7-plugin was built for ROCm 7; load a ROCm 7 module",
    ]


def test_versions():
    assert release("0.12.0.1") == release("0.12.0.post3") == release("0.12") == (0, 12, 0)
    assert satisfies("3.11.7", ">=3.11") and satisfies("1.0", "") and satisfies("0.10.2", ">=0.10,<0.13")
    assert (
        not satisfies("0.13.1", ">=0.10,<0.13")
        and not satisfies("1.0", "==1.1")
        and not satisfies("1", "!=1.0")
    )
    assert not satisfies("1", ">1.0") and satisfies("2.1", "~=2.0") and not satisfies("2.1", "<=2.0")
