"""This file is the cost of collectives between simulated devices: threads of one process that meet, and copy.

Nothing is sent. A collective begins when the last member has come, and then every member copies whole buffers, its own
part too, through the memory that all share:

    seconds = latency + (members - 1) message + passes * bytes / rate

| collective | members | bytes | passes |
|---|---|---|---|
| permute | all devices of the mesh, however many groups they form | of the message | 1 |
| all-gather, reduce-scatter | of the group | of the full buffer | 1 |
| all-reduce | of the group | of the full buffer | 3 (n - 1) / n |
| all-to-all | of the group | to all members, itself included | 2: parts are cut out and put together |

Measured with XLA's CPU collectives (jax 0.10.2), groups of 2, 4 and 8 of eight devices on two cores: 45, 77 and 115
microseconds for small buffers whatever the collective, 113 for a permute in groups of any size, and for 1 MiB further
0.3 ms in one pass.
"""

from collections.abc import Sequence
from typing import Any

from meshes.platform import Link

PASSES_OF_PERMUTE, PASSES_OF_GATHER, PASSES_OF_ALL_TO_ALL = 1.0, 1.0, 2.0


def passes_of_all_reduce(members: int) -> float:
    """How often an all-reduce moves its buffer through the memory."""
    return 3 * (members - 1) / members


def shared_link(links: Sequence[Link], sent: Sequence[float]) -> Link | None:
    """The furthest link that something is sent over, if it is memory."""
    used = [link for link, part in zip(links, sent, strict=True) if part]
    return used[-1] if used and used[-1].medium == "memory" else None


def meeting_seconds(link: Link, members: float, num_bytes: Any, *, passes: float) -> Any:
    """Seconds of a collective of so many members."""
    rate = link.bytes_per_second * link.efficiency
    return link.latency_seconds + (members - 1) * link.message_seconds + passes * num_bytes / rate
