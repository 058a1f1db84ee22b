"""This file is the installer behind the Makefile: it creates .venv, and installs only when the requirements changed.

    python3.11 launch/install.py [extra ...]

Runs on whatever Python a machine has, so it is written in what every Python 3 understands and needs no package.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
LOG = VENV / "install.log"
RECORD = VENV / "installed.json"
REQUIREMENTS = ("pyproject.toml", "constraints.txt")
OLDEST = (3, 11)


def main(extras):
    """Brings .venv up to date with the project and `extras`; returns the exit code."""
    known = ("cpu", "cuda", "rocm", "dev")
    for extra in extras:
        if extra not in known:
            return complain("there is no extra '%s'; choose from %s" % (extra, ", ".join(known)))
    problem = python_problem(sys.version_info, sys.executable)
    if problem:
        return complain(problem)
    record = read_record()
    wanted = sorted(set(extras) | set(record.get("extras", [])))
    state = {"python": list(sys.version_info[:2]), "requirements": digest(), "extras": wanted}
    if record == state and venv_python().exists():
        return 0
    code = 0
    if record.get("python") != state["python"] or not venv_python().exists():
        state["extras"] = sorted(set(extras))
        code = create_venv()
    code = code or install(state["extras"])
    if code == 0:
        RECORD.write_text(json.dumps(state))
    return code


def complain(sentence):
    """Prints what is wrong; returns the exit code."""
    print(sentence, file=sys.stderr)
    return 2


def python_problem(version, executable):
    """Returns why this Python cannot be used, or an empty string."""
    if tuple(version[:2]) < OLDEST:
        return "PiperJAX needs Python %d.%d or newer, but %s is %d.%d; install a newer one and name it: %s" % (
            OLDEST + (executable,) + tuple(version[:2]) + ("make train PYTHON=python3.12",)
        )
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        return (
            "%s cannot create virtual environments, because its modules venv and ensurepip are missing; install them "
            "(Debian and Ubuntu: apt install python3-venv) or name another Python: make train PYTHON=python3.12"
        ) % executable
    return ""


def read_record():
    """Returns what was installed last, or an empty dict."""
    try:
        return json.loads(RECORD.read_text())
    except (OSError, ValueError):
        return {}


def digest():
    """Returns a fingerprint of the files that say what to install."""
    content = b"".join((ROOT / name).read_bytes() for name in REQUIREMENTS)
    return hashlib.sha256(content).hexdigest()


def venv_python():
    """Returns the path of the Python inside .venv."""
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def create_venv():
    """Makes an empty .venv in place of what was there; returns the exit code."""
    print("Creating .venv with Python %d.%d ..." % sys.version_info[:2], flush=True)
    command = [sys.executable, "-m", "venv", "--clear", str(VENV)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
    if done.returncode:
        return complain("cannot create %s: %s" % (VENV, " ".join(done.stdout.split())))
    return 0


def install(extras):
    """Installs the project, its dependencies and `extras` with pip; returns the exit code."""
    target = "%s[%s]" % (ROOT, ",".join(extras)) if extras else str(ROOT)
    print("Installing JAX and what else PiperJAX needs (a few minutes, once; log in %s) ..." % LOG.relative_to(ROOT))
    sys.stdout.flush()
    command = [str(venv_python()), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off"]
    command += ["-c", str(ROOT / "constraints.txt"), "-e", target]
    with open(str(LOG), "w") as log:
        pip = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
        errors = show_progress(pip.stdout, log)
        code = pip.wait()
    if code:
        return complain("pip could not install PiperJAX: %s; all of its output is in %s" % (errors, LOG))
    print("Installed.", flush=True)
    return 0


def show_progress(lines, log):
    """Copies pip's output to the log and one changing line to a terminal; returns pip's errors as one text.

    Without a terminal only the packages of 10 MB and more are named.
    """
    terminal = sys.stdout.isatty()
    errors = []
    count = 0
    for line in lines:
        log.write(line)
        words = line.split()
        if line.startswith("ERROR:"):
            errors.append(line[len("ERROR:") :].strip())
        elif words[:1] in (["Collecting"], ["Downloading"], ["Using"]) or line.startswith("Installing collected"):
            count += words[0] == "Collecting"
            text = describe(words, count)
            if terminal:
                sys.stdout.write("\r  " + text[:76].ljust(76))
            elif "MB" in text and float(text.split("(")[1].split()[0]) >= 10:
                print("  " + text)
            sys.stdout.flush()
    if terminal:
        sys.stdout.write("\r" + " " * 78 + "\r")
    return " ".join(errors[:2]) or "it gave no reason"


def describe(words, count):
    """Returns what a line of pip's output means to someone who waits."""
    if words[0] == "Installing":
        return "unpacking %d packages" % (len(words) - 3)
    if words[0] == "Collecting":
        return "package %d: %s" % (count, words[1])
    name = words[1].rsplit("/", 1)[-1] if words[0] == "Downloading" else words[-3].rsplit("/", 1)[-1]
    return "package %d: %s %s" % (count, name.split("-")[0], " ".join(words[-2:]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
