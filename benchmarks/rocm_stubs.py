"""Stand-ins for the libraries of ROCm, so that JAX's plugin loads, and XLA compiles for AMD GPUs, where ROCm is not.

    pip install --no-deps jax-rocm7-pjrt jax-rocm7-plugin              # of the version of jax
    python -m benchmarks.rocm_stubs build/rocm                         # needs gcc and readelf
    LD_LIBRARY_PATH=build/rocm python -m benchmarks.memory --gpu mi250x

Every function returns an error: nothing that a compiler asks of a GPU, such as which kernel is quickest, is answered,
and nothing runs. With ROCm installed none of this is needed.
"""

import argparse
import importlib.util
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

# Of the system, or of Python.
PRESENT = ("librt", "libdl", "libm.", "libpthread", "libstdc", "libc.", "ld-linux", "libgcc")
OF_ROCM = re.compile(r"(__hip|hip|roc|miopen|amdsmi|hsa|nccl|rccl|_ZN.*(hip|roc))")
# What has no version may be looked for in any library; this one the plugin itself links to.
ANY_LIBRARY = "librocblas"
NO_DEVICE = 100


class Symbol(NamedTuple):
    """A function that is not there; version "" if it has none."""

    name: str
    version: str


class Needs(NamedTuple):
    """What a shared object wants: libraries, and functions by library, "" where it does not say which."""

    libraries: frozenset[str]
    symbols: dict[str, set[Symbol]]


def needs(dynamic: str, versions: str, symbols: str) -> Needs:
    """Reads what `readelf -d`, `readelf -V` and `readelf --dyn-syms` print, all wide."""
    libraries = {
        name for name in re.findall(r"\(NEEDED\).*\[(.+?)\]", dynamic) if not name.startswith(PRESENT)
    }
    library_of, current = {}, ""
    for line in versions.splitlines():
        if found := re.search(r"File: (\S+)", line):
            current = found[1]
        if found := re.search(r"Name: (\S+)\s+Flags", line):
            library_of[found[1]] = current
    wanted = defaultdict(set)
    for fields in map(str.split, symbols.splitlines()):
        if len(fields) < 8 or fields[6] != "UND":
            continue
        name, _, version = fields[7].partition("@")
        library = library_of.get(version.lstrip("@"), "")
        if library in libraries:
            wanted[library].add(Symbol(name, version.lstrip("@")))
        elif not version and OF_ROCM.match(name):
            wanted[""].add(Symbol(name, ""))
    return Needs(frozenset(libraries), dict(wanted))


def source(symbols: Iterable[Symbol]) -> str:
    """C that has them."""
    lines = [f"int {one.name}() {{ return {NO_DEVICE}; }}" for one in sorted(symbols)]
    return "\n".join(lines or ["int stand_in;"]) + "\n"


def version_script(symbols: Iterable[Symbol]) -> str:
    """What tells the linker their versions; "" if there are none."""
    by_version = defaultdict(list)
    for one in sorted(symbols):
        if one.version:
            by_version[one.version].append(one.name)
    return "".join(f"{version} {{ global: {'; '.join(names)}; }};\n" for version, names in by_version.items())


def shared_objects() -> Sequence[Path]:
    """Those of JAX's ROCm plugin.

    Raises:
      ValueError: if it is not installed.
    """
    specs = [importlib.util.find_spec(name) for name in ("jax_plugins.xla_rocm7", "jax_rocm7_plugin")]
    if None in specs:
        raise ValueError(
            "install JAX's plugin for ROCm first: pip install --no-deps jax-rocm7-pjrt jax-rocm7-plugin"
        )
    return [path for spec in specs for path in sorted(Path(spec.origin).parent.glob("*.so"))]


def build(directory: Path) -> list[str]:
    """Compiles the stand-ins into a directory; returns their names."""
    libraries, wanted = set(), defaultdict(set)
    for path in shared_objects():
        told = [
            subprocess.run(
                ["readelf", "-W", *flags, str(path)], capture_output=True, text=True, check=True
            ).stdout
            for flags in (["-d"], ["-V"], ["--dyn-syms"])
        ]
        found = needs(*told)
        libraries |= found.libraries
        for library, symbols in found.symbols.items():
            wanted[library] |= symbols
    directory.mkdir(parents=True, exist_ok=True)
    for library in sorted(libraries):
        symbols = wanted[library] | (wanted[""] if library.startswith(ANY_LIBRARY) else set())
        (directory / "stub.c").write_text(source(symbols), encoding="utf-8")
        (directory / "stub.map").write_text(version_script(symbols), encoding="utf-8")
        versions = ["-Wl,--version-script=stub.map"] if version_script(symbols) else []
        command = ["gcc", "-w", "-fno-builtin", "-shared", "-fPIC", "-o", library, "stub.c", *versions]
        subprocess.run([*command, f"-Wl,-soname,{library}"], check=True, cwd=directory)
    return sorted(libraries)


def main() -> int:
    """Builds them and says how to use them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    args = parser.parse_args()
    try:
        names = build(args.directory)
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{len(names)} libraries; start Python with LD_LIBRARY_PATH={args.directory}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
