"""The rules of the house: what may import what, what stays free of JAX, and what no file may contain."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("models", "meshes", "piperjax")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
LONGEST_MODULE = 450

# What decides imports nothing that computes.
PURE = (
    "models/checks.py",
    "models/config.py",
    "models/presets.py",
    "models/cost.py",
    "models/query_blocks.py",
    "meshes/axes.py",
    "meshes/device.py",
    "meshes/fields.py",
    "meshes/platform.py",
    "meshes/writing.py",
    "piperjax/doctor/*.py",
    "piperjax/schedules/*.py",
    "piperjax/planner/*.py",
    "piperjax/runtime/bounded_process.py",
    "piperjax/runtime/host_memory.py",
    "piperjax/runtime/xla_flags.py",
    "piperjax/training/config.py",
    "piperjax/training/overrides.py",
    "piperjax/training/planning.py",
)
COMPUTING = ("jax", "jaxlib", "flax", "optax", "orbax", "chex", "grain")

# Imports point down.
MAY_IMPORT = {
    "models": ("models",),
    "meshes": ("meshes",),
    "piperjax.schedules": ("piperjax.schedules",),
    "piperjax.planner": ("piperjax.planner", "piperjax.schedules", *PACKAGES[:2]),
    "piperjax.runtime": ("piperjax.runtime", "piperjax.planner", "piperjax.schedules", *PACKAGES[:2]),
    "piperjax.training": tuple(f"piperjax.{part}" for part in ("training", "runtime", "planner", "schedules"))
    + PACKAGES[:2],
    "piperjax.doctor": ("piperjax.doctor", "piperjax.runtime", "meshes"),
    "piperjax": PACKAGES,
}

# Modules without a test file of their own, and the test that would fail if they were wrong.
TESTED_ELSEWHERE = {
    "piperjax/runtime/dispatch_nodes_limited.py": "tests/runtime/test_dispatch_nodes.py",
    "piperjax/runtime/dispatcher.py": "tests/runtime/test_dispatch.py",
    "piperjax/runtime/stage.py": "tests/runtime/test_executor.py",
    "piperjax/runtime/step.py": "tests/runtime/test_executor.py",
    "piperjax/runtime/varying.py": "tests/runtime/test_executor.py",
    "piperjax/runtime/vocabulary.py": "tests/runtime/test_executor.py",
}

VAGUE_NAMES = ("utils", "util", "common", "helpers", "helper", "base", "misc", "core")


def label(path):
    return path.relative_to(ROOT).as_posix()


def dotted(path):
    return label(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def pure_modules():
    return sorted(path for pattern in PURE for path in ROOT.glob(pattern))


def imports(path):
    """Yields what a module imports, in functions too; `from a import b` is "a.b"."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{label(path)}: imports are written in full, not relative"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name, packages):
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def tracked_files():
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split("\0")
    paths = [ROOT / name for name in listed if name and (ROOT / name).is_file()]
    return paths or [path for path in ROOT.rglob("*.py") if ".venv" not in path.parts]


@pytest.mark.parametrize("path", MODULES, ids=label)
def test_imports_point_down(path):
    part = max((part for part in MAY_IMPORT if within(dotted(path), [part])), key=len)
    ours = [name for name in imports(path) if within(name, PACKAGES)]
    wrong = [name for name in ours if not within(name, MAY_IMPORT[part])]
    assert not wrong, (
        f"{label(path)} imports {', '.join(wrong)}; {part} may import {', '.join(MAY_IMPORT[part])}"
    )


@pytest.mark.parametrize("path", pure_modules(), ids=label)
def test_pure_modules_import_nothing_that_computes(path):
    pure = [dotted(module) for module in pure_modules()]
    for name in imports(path):
        assert not within(name, COMPUTING), f"{label(path)} decides, so it must not import {name}"
        assert not within(name, PACKAGES) or within(name, pure), (
            f"{label(path)} must import pure modules only, not {name}"
        )


def test_every_pure_module_exists():
    assert [pattern for pattern in PURE if not list(ROOT.glob(pattern))] == []


def test_pure_modules_import_without_jax_and_quickly():
    names = [dotted(path) for path in pure_modules()]
    program = f"""
import sys, time
for name in {COMPUTING}:
    sys.modules[name] = None  # importing it now raises
start = time.process_time()
for name in {names}:
    __import__(name)
print(time.process_time() - start)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1.0, f"importing all pure modules took {done.stdout.strip()} s of CPU time"


@pytest.mark.parametrize("name", PACKAGES)
def test_packages_do_not_import_jax(name):
    program = f"import sys; sys.modules['jax'] = None; import {name}"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


@pytest.mark.parametrize("path", MODULES, ids=label)
def test_modules_are_rooms_one_can_oversee(path):
    assert path.stem not in VAGUE_NAMES, f"{label(path)}: give what is in it a noun"
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST_MODULE, f"{label(path)} has {lines} lines; find its natural cut"


@pytest.mark.parametrize("path", MODULES, ids=label)
def test_modules_begin_by_saying_what_they_are(path):
    first = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0]
    assert first.endswith("."), f"{label(path)} must begin with one sentence that says what it is"


@pytest.mark.parametrize("path", [path for path in MODULES if path.stem != "__init__"], ids=label)
def test_every_module_has_a_test(path):
    folder = label(path.parent).removeprefix("piperjax").strip("/")
    expected = ROOT / "tests" / folder / f"test_{path.stem.strip('_')}.py"
    elsewhere = TESTED_ELSEWHERE.get(label(path))
    if elsewhere:
        assert (ROOT / elsewhere).exists()
        assert not expected.exists(), f"{label(path)} has its own test now; take it out of TESTED_ELSEWHERE"
    else:
        assert expected.exists(), f"{label(path)} needs {label(expected)}"


def test_the_list_of_modules_tested_elsewhere_is_current():
    assert [name for name in TESTED_ELSEWHERE if not (ROOT / name).exists()] == []


def test_nothing_is_left_open_and_no_path_of_one_machine_is_named():
    left_open = re.compile(r"\b(TODO|FIXME|XXX|NotImplementedError)\b")
    one_machine = re.compile(r"(?<![\w.~}])/(home|Users|root|work)/\w")
    found = []
    for path in tracked_files():
        text = path.suffix in (".py", ".toml", ".md", ".sbatch", ".ipynb", ".txt") or path.name in (
            "Makefile",
            "run",
        )
        if not text or path == Path(__file__):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if left_open.search(line) or one_machine.search(line):
                found.append(f"{label(path)}:{number}: {line.strip()[:100]}")
    assert found == []
