"""Every test sees eight simulated CPU devices, a deadlock ends in minutes, and compiled programs are remembered."""

import os
from importlib.metadata import version
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
_FLAGS = {
    "xla_force_host_platform_device_count": 8,
    # A collective that not every device reaches ends the process; late enough for a machine that is shared and busy.
    "xla_cpu_collective_call_warn_stuck_timeout_seconds": 30,
    "xla_cpu_collective_call_terminate_timeout_seconds": 180,
    # Machine code that is not optimised is half the time of compiling; what XLA makes of the program is the same.
    "xla_backend_optimization_level": 0,
}
if version("jaxlib").startswith("0.10."):
    # Kernels written straight into LLVM's form compile in less than half the time of those that pass through MLIR.
    # Later releases know no such flag, and XLA ends the process over one that it does not know.
    _FLAGS["xla_cpu_use_fusion_emitters"] = "false"

# JAX reads these when it is imported, which the first test module does. What the user has set stays.
_given = os.environ.get("XLA_FLAGS", "")
_added = [f"--{name}={value}" for name, value in _FLAGS.items() if name not in _given]
os.environ["XLA_FLAGS"] = " ".join([_given, *_added]).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Nearly all the time of a test goes into compiling programs that did not change since the last run. Tests which start
# processes of their own pass this on to them. A test that measures compiling must turn the cache off.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_ROOT / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
