"""Machines made up for tests: files under a folder, variables, and what processes answer."""

import json
from pathlib import Path

import pytest

from piperjax.doctor.environment import Environment
from piperjax.runtime.bounded_process import Ended

VERSIONS = {
    "jax": "0.10.2",
    "jaxlib": "0.10.2",
    "flax": "0.12.8",
    "optax": "0.2.8",
    "orbax-checkpoint": "0.12.8",
}
ROCM = {**VERSIONS, "jax-rocm7-plugin": "0.10.2", "jax-rocm7-pjrt": "0.10.2"}
REQUIREMENTS = {
    "python": ">=3.11",
    "jax": ">=0.10,<0.13",
    "flax": ">=0.12",
    "optax": ">=0.2.5",
    "orbax-checkpoint": ">=0.11.25",
}


def answer(*lines, returncode=0, stderr=""):
    """What the probe of devices ends with after it printed these objects."""
    return Ended(returncode=returncode, stdout="\n".join(map(json.dumps, lines)), stderr=stderr)


class Machines:
    """Builds environments; `asked` holds the commands that were run."""

    VERSIONS, ROCM, answer = VERSIONS, ROCM, staticmethod(answer)

    def __init__(self, root):
        self.root = root
        self.asked = []

    def __call__(self, *, files=(), links=(), probe=None, trial=None, **fields):
        """A machine with empty or given files, whose probe of devices and trial of flags end as given."""
        for name, text in files.items() if isinstance(files, dict) else ((name, "") for name in files):
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

        def run(command, environ, seconds):
            self.asked.append(command)
            is_probe = "piperjax.runtime.device_probe" in command
            return (probe or answer({"backend": "cpu", "kinds": ["cpu"] * 2}, {"exchange_seconds": 0.001})
                    if is_probe else trial or Ended(returncode=0))  # fmt: skip

        fields = {"versions": VERSIONS, "requirements": REQUIREMENTS, "addresses": ("10.0.0.1",)} | fields
        return Environment(root=self.root, run=run, out=Path("runs"), **fields)

    def rocm(self, *, files=(), kind="AMD Instinct MI250X/MI250", count=8, **fields):
        """A node of MI250X with the plugin, and ROCm 7 with RCCL."""
        library = {
            "dev/kfd": "",
            "opt/rocm/.info/version": "7.0.2-56",
            "opt/rocm/lib/libamdhip64.so.7": "",
            "opt/rocm/lib/librccl.so.1": "",
        }
        more = files if isinstance(files, dict) else dict.fromkeys(files, "")
        told = {"backend": "rocm", "kinds": [kind] * count, "memory_bytes": 60 * 2**30}
        probe = answer(told, *([{"exchange_seconds": 0.002}] if count > 1 else []))
        return self(files=library | more, versions=ROCM, **({"probe": probe} | fields))


@pytest.fixture
def machine(tmp_path):
    return Machines(tmp_path)


@pytest.fixture
def told():
    """Levels and sentences of findings, to compare with."""
    return lambda findings: [(finding.level, finding.sentence) for finding in findings]
