"""Every test sees eight simulated CPU devices, and a collective that deadlocks fails in seconds."""

import os

_FLAGS = {
    "xla_force_host_platform_device_count": 8,
    # The defaults wait for minutes before they say that not every device has reached a collective.
    "xla_cpu_collective_call_warn_stuck_timeout_seconds": 10,
    "xla_cpu_collective_call_terminate_timeout_seconds": 60,
}

# JAX reads both when it starts, which is when the first test module imports it. What the user has set stays.
_given = os.environ.get("XLA_FLAGS", "")
_added = [f"--{name}={value}" for name, value in _FLAGS.items() if name not in _given]
os.environ["XLA_FLAGS"] = " ".join([_given, *_added]).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
