"""This file is the machine description: devices, the levels of the network between them, and how fast they are."""

import re
import tomllib
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import lru_cache
from math import gcd
from pathlib import Path
from typing import Any, Literal, get_args

from meshes.device import Attention, Device, Products
from meshes.fields import (
    Provenance,
    check_count,
    check_fraction,
    check_provenance,
    check_range,
    check_rate,
    check_size,
    check_text,
    checked_fields,
    within_range,
)

__all__ = [
    "Attention",
    "Device",
    "Link",
    "Platform",
    "Products",
    "detect_platform",
    "known_platforms",
    "load_platform",
]

Medium = Literal["wire", "memory"]
Network = Literal["", "ethernet", "infiniband", "slingshot"]


@dataclass(frozen=True, kw_only=True)
class Link:
    """One level of the network.

    Attributes:
      name: what people who run the machine call it.
      devices: number of devices that one instance of this link joins, those of the inner levels included.
      bytes_per_second: peak rate per device and direction, when few devices talk. Where devices share a network
        interface it is a device's share of it.
      latency_seconds: time for an empty message of a collective.
      medium: "wire", or "memory" between devices that one process simulates: they meet, and copy.
      message_seconds: what each further message costs a device that posts several, as a flat all-to-all does; in
        memory what each further member costs that has to come.
      efficiency: part of `bytes_per_second` that collectives reach with large messages.
      taper_fraction: part of `bytes_per_second` that is left to each device when all of them talk at once.
      smallest_bytes: smallest message that was measured; None where no range is known.
      largest_bytes: largest.
      provenance: where the numbers come from.
    """

    name: str
    devices: int
    bytes_per_second: float
    latency_seconds: float
    medium: Medium = "wire"
    message_seconds: float = 0.0
    efficiency: float = 1.0
    taper_fraction: float = 1.0
    smallest_bytes: float | None = None
    largest_bytes: float | None = None
    provenance: Provenance = "assumed"

    def __post_init__(self) -> None:
        check_text("link.name", self.name)
        where = f"link '{self.name}':"
        check_count(f"{where} devices", self.devices)
        check_rate(f"{where} bytes_per_second", self.bytes_per_second)
        check_rate(f"{where} latency_seconds", self.latency_seconds)
        if self.medium not in get_args(Medium):
            raise ValueError(
                f"{where} medium must be one of {', '.join(get_args(Medium))}, got {self.medium!r}"
            )
        check_size(f"{where} message_seconds", self.message_seconds)
        check_fraction(f"{where} efficiency", self.efficiency)
        check_fraction(f"{where} taper_fraction", self.taper_fraction)
        # A message takes between 10 ns and 1 s on anything that deserves the name; outside it the unit is wrong.
        if not 1e-8 <= self.latency_seconds <= 1:
            raise ValueError(
                f"{where} latency_seconds must lie between 1e-8 and 1, got {self.latency_seconds!r}; "
                "write it in seconds (2 microseconds are 2e-6)"
            )
        check_range(f"{where} the range of bytes", self.smallest_bytes, self.largest_bytes)
        check_provenance(where, self.provenance)

    def covers(self, num_bytes: Any) -> Any:
        """Whether a message of `num_bytes` lies in the measured range; True where no range is known."""
        return within_range(num_bytes, self.smallest_bytes, self.largest_bytes)


@dataclass(frozen=True, kw_only=True)
class Platform:
    """A machine.

    Attributes:
      name: the file's name.
      description: one line about the machine.
      device: one of its devices; all are alike.
      devices_per_node: devices of one host, or of a larger domain of fast links that joins several hosts.
      links: levels of the network, innermost first; each joins a whole number of instances of the one before.
      devices_per_nic: consecutive devices of a node that share one network interface; None where there is no network.
      network: what joins the nodes, "ethernet", "infiniband" or "slingshot"; "" where nobody said.
    """

    name: str
    description: str
    device: Device
    devices_per_node: int
    links: tuple[Link, ...] = ()
    devices_per_nic: int | None = None
    network: Network = ""

    def __post_init__(self) -> None:
        check_text("name", self.name)
        check_text("description", self.description)
        check_count("devices_per_node", self.devices_per_node)
        if self.devices_per_nic is not None:
            check_count("devices_per_nic", self.devices_per_nic)
            if self.devices_per_node % self.devices_per_nic:
                raise ValueError(
                    f"devices_per_nic must divide the {self.devices_per_node} devices of a node, "
                    f"got {self.devices_per_nic}"
                )
        if self.network not in get_args(Network):
            known = ", ".join(filter(None, get_args(Network)))
            raise ValueError(f"network must be one of {known}, got {self.network!r}")
        for inner, outer in zip(self.links, self.links[1:], strict=False):
            if outer.devices <= inner.devices or outer.devices % inner.devices:
                raise ValueError(
                    f"links must be listed innermost first, each joining a multiple of the devices of the one before, "
                    f"but '{inner.name}' joins {inner.devices} and then '{outer.name}' joins {outer.devices}"
                )
        for link in self.links:
            small, large = sorted((link.devices, self.devices_per_node))
            if large % small:
                raise ValueError(
                    f"link '{link.name}' joins {link.devices} devices, which is neither a part nor a multiple of "
                    f"the {self.devices_per_node} devices of a node; correct devices_per_node or the link"
                )

    def __hash__(self) -> int:
        # Prices are remembered by platform; equal platforms have equal names.
        return hash((self.name, self.devices_per_node))

    @property
    def switch_devices(self) -> int | None:
        """Devices joined by the first link that leaves the node; None if no link does."""
        return next((link.devices for link in self.links if link.devices > self.devices_per_node), None)

    @property
    def nics_per_node(self) -> int | None:
        """Network interfaces of a node; None where there is no network."""
        return None if self.devices_per_nic is None else self.devices_per_node // self.devices_per_nic

    def rated(self, dtype: str) -> bool:
        """Whether the file says enough of products, attention and memory in `dtype` to predict seconds."""
        device = self.device
        if device.matmul is None or device.grouped_matmul is None or device.attention is None:
            return False
        tables = (
            device.peak_flop_per_second,
            device.matmul.efficiency,
            device.grouped_matmul.efficiency,
            device.attention.forward_efficiency,
            device.attention.backward_efficiency,
        )
        return device.memory_bytes_per_second is not None and all(dtype in table for table in tables)

    def expert_factors(self, expert: int, pipe: int, data: int) -> tuple[int, int, int]:
        """Splits the expert axis into (group, node, local) by where its devices sit.

        The mesh counts devices pipe outermost, then data, then expert, so that experts occupy blocks of consecutive
        devices. `local` is the largest divisor of `expert` whose blocks never straddle two nodes, `local * node` the
        largest whose blocks never straddle two instances of the first link beyond the node; `group` is the rest.
        Over boundaries at multiples of `n` devices the largest block that never straddles is gcd(expert, n), and all
        of `expert` if there are at most `n` devices.

        Returns:
          Three factors whose product is `expert`.
        """
        num_devices = pipe * data * expert

        def largest_block(boundary: int | None) -> int:
            return expert if boundary is None or num_devices <= boundary else gcd(expert, boundary)

        local = largest_block(self.devices_per_node)
        switch = largest_block(self.switch_devices)
        return expert // switch, switch // local, local


def known_platforms() -> list[str]:
    """Names of the machines that are described beside this file."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.toml"))


@lru_cache(maxsize=64)
def _shipped(name: str) -> Platform:
    # The same object every time: what is remembered by platform need not compare tables.
    return _read(Path(__file__).parent / f"{name}.toml")


def load_platform(name_or_path: str) -> Platform:
    """Reads a machine description: a name from `known_platforms`, or the path of a TOML file.

    Raises:
      ValueError: if there is no such machine or its file is wrong; the sentence names the file and the field.
    """
    text = str(name_or_path)
    if text in known_platforms():
        return _shipped(text)
    if text.endswith(".toml") or "/" in text:
        return _read(Path(text))
    near = get_close_matches(text, known_platforms(), n=1)
    hint = f", did you mean '{near[0]}'?" if near else ";"
    raise ValueError(
        f"no platform named '{text}'{hint} meshes/ describes {', '.join(known_platforms())}, "
        "and a path that ends in .toml names a file of your own"
    )


# Words of what JAX calls a kind of device, in lower case, and the file that describes machines made of it; the first
# whose words are all there decides. ROCm names MI250X devices "AMD Instinct MI250X/MI250". A100 differ by their memory.
_KINDS = {
    "mi250x": "frontier",
    "mi300a": "el_capitan",
    "mi300x": "mi300x_node",
    "mi355x": "mi355x_node",
    "a100 40gb": "perlmutter",
    "a100 64gb": "leonardo",
    "a100": "a100_pod",
    "gh200": "alps",
    "h200": "h200_pod",
    "h100": "h100_pod",
    "h800": "h800_pod",
    "b200": "b200_pod",
    "b300": "b300_pod",
    "gb200": "gb200_nvl72",
    "gb300": "gb300_nvl72",
}


def detect_platform(
    backend: str,
    device_kind: str,
    *,
    num_devices: int,
    devices_per_process: int,
    memory_bytes: int | None = None,
) -> Platform:
    """Recognises the machine by what JAX says of its devices.

    Eight CPU devices of one process are `cpu8`, the simulated cluster; other CPU devices are `cpu`. An accelerator
    that no file describes is `generic`: nothing is known of its speed, so no MFU can be given for it.

    Args:
      backend: "cpu", "gpu", ..., as `jax.default_backend` tells.
      device_kind: `device.device_kind`.
      num_devices: devices of all processes.
      devices_per_process: devices of this process, taken for a node where no file says otherwise.
      memory_bytes: memory of one device where the backend tells; used where no file says otherwise.
    """
    if backend == "cpu":
        if num_devices == devices_per_process == 8:
            return load_platform("cpu8")
        return _computers(num_devices, devices_per_process)
    words = set(re.split("[^a-z0-9]+", device_kind.lower()))
    for kind, name in _KINDS.items():
        if words.issuperset(kind.split()):
            return load_platform(name)
    return Platform(
        name="generic",
        description=f"{device_kind}: no file in meshes/ describes it, so its peak is unknown and no MFU is given",
        device=Device(memory_bytes=memory_bytes),
        devices_per_node=devices_per_process,
    )


def _computers(num_devices: int, devices_per_process: int) -> Platform:
    """One computer of as many simulated devices as a process has, or several on a network."""
    cpu = load_platform("cpu")
    memory, network = cpu.links
    links = [replace(memory, devices=devices_per_process)]
    if num_devices > devices_per_process:
        links.append(replace(network, devices=-(-num_devices // devices_per_process) * devices_per_process))
    return replace(cpu, devices_per_node=devices_per_process, links=tuple(links))


def _read(path: Path) -> Platform:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read platform file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"platform file {path} is not text; it must be TOML in UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"platform file {path} is not valid TOML: {error}") from None
    try:
        return _build_platform(path.stem, values)
    except ValueError as error:
        raise ValueError(f"platform file {path}: {error}") from None


def _build_platform(name: str, values: dict[str, Any]) -> Platform:
    parts = {"name": name, **values}
    if isinstance(parts.get("device"), dict):
        parts["device"] = _build_device(parts["device"])
    links = parts.get("links", [])
    if not isinstance(links, list) or not all(isinstance(link, dict) for link in links):
        raise ValueError("links must be a list of tables, each headed [[links]]")
    parts["links"] = tuple(Link(**checked_fields(Link, link, "[[links]]")) for link in links)
    parts = checked_fields(Platform, parts, "the top level")
    if not isinstance(parts["device"], Device):
        raise ValueError(f"device must be a table headed [device], got {parts['device']!r}")
    return Platform(**parts)


def _build_device(values: dict[str, Any]) -> Device:
    values = checked_fields(Device, values, "[device]")
    for name, cls in (("matmul", Products), ("grouped_matmul", Products), ("attention", Attention)):
        if name in values:
            where = f"[device.{name}]"
            if not isinstance(values[name], dict):
                raise ValueError(f"device.{name} must be a table headed {where}, got {values[name]!r}")
            parts = checked_fields(cls, values[name], where)
            try:
                values[name] = cls(**parts)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
    return Device(**values)
