"""This file is the machine description: devices, the levels of the network between them, and how fast they are."""

import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from difflib import get_close_matches
from math import gcd, isfinite
from pathlib import Path
from typing import Any, Literal, get_args

Provenance = Literal["measured", "published", "vendor", "assumed"]


@dataclass(frozen=True, kw_only=True)
class Device:
    """One device, as JAX sees it.

    Attributes:
      memory_bytes: memory of one device; None where unknown.
      memory_bytes_per_second: peak rate of that memory; None where unknown.
      peak_flop_per_second: peak rate of matrix products by dtype name; empty where unknown.
      provenance: where the numbers come from.
    """

    memory_bytes: int | None = None
    memory_bytes_per_second: float | None = None
    peak_flop_per_second: Mapping[str, float] = field(default_factory=dict, hash=False)
    provenance: Provenance = "assumed"

    def __post_init__(self) -> None:
        if self.memory_bytes is not None:
            _check_count("device.memory_bytes", self.memory_bytes)
        if self.memory_bytes_per_second is not None:
            _check_rate("device.memory_bytes_per_second", self.memory_bytes_per_second)
        if not isinstance(self.peak_flop_per_second, Mapping):
            raise ValueError(
                "device.peak_flop_per_second must give a rate for each dtype, such as { bfloat16 = 191.5e12 }, "
                f"got {self.peak_flop_per_second!r}"
            )
        for dtype, rate in self.peak_flop_per_second.items():
            _check_rate(f"device.peak_flop_per_second.{dtype}", rate)
        _check_provenance("device", self.provenance)


@dataclass(frozen=True, kw_only=True)
class Link:
    """One level of the network.

    Attributes:
      name: what people who run the machine call it.
      devices: number of devices that one instance of this link joins, those of the inner levels included.
      bytes_per_second: peak rate per device and direction, when few devices talk.
      latency_seconds: time for an empty message of a collective.
      taper_fraction: part of `bytes_per_second` that is left to each device when all of them talk at once.
      provenance: where the numbers come from.
    """

    name: str
    devices: int
    bytes_per_second: float
    latency_seconds: float
    taper_fraction: float = 1.0
    provenance: Provenance = "assumed"

    def __post_init__(self) -> None:
        _check_text("link.name", self.name)
        where = f"link '{self.name}':"
        _check_count(f"{where} devices", self.devices)
        _check_rate(f"{where} bytes_per_second", self.bytes_per_second)
        _check_rate(f"{where} latency_seconds", self.latency_seconds)
        _check_rate(f"{where} taper_fraction", self.taper_fraction)
        # A message takes between 10 ns and 1 s on anything that deserves the name; outside it the unit is wrong.
        if not 1e-8 <= self.latency_seconds <= 1:
            raise ValueError(
                f"{where} latency_seconds must lie between 1e-8 and 1, got {self.latency_seconds!r}; "
                "write it in seconds (2 microseconds are 2e-6)"
            )
        if self.taper_fraction > 1:
            raise ValueError(f"{where} taper_fraction must be at most 1, got {self.taper_fraction!r}")
        _check_provenance(where, self.provenance)


@dataclass(frozen=True, kw_only=True)
class Platform:
    """A machine.

    Attributes:
      name: the file's name.
      description: one line about the machine.
      device: one of its devices; all are alike.
      devices_per_node: devices of one host.
      links: levels of the network, innermost first; each joins a whole number of instances of the one before.
    """

    name: str
    description: str
    device: Device
    devices_per_node: int
    links: tuple[Link, ...] = ()

    def __post_init__(self) -> None:
        _check_text("name", self.name)
        _check_text("description", self.description)
        _check_count("devices_per_node", self.devices_per_node)
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

    @property
    def switch_devices(self) -> int | None:
        """Devices joined by the first link that leaves the node; None if no link does."""
        return next((link.devices for link in self.links if link.devices > self.devices_per_node), None)

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


def load_platform(name_or_path: str) -> Platform:
    """Reads a machine description: a name from `known_platforms`, or the path of a TOML file.

    Raises:
      ValueError: if there is no such machine or its file is wrong; the sentence names the file and the field.
    """
    text = str(name_or_path)
    if text in known_platforms():
        return _read(Path(__file__).parent / f"{text}.toml")
    if text.endswith(".toml") or "/" in text:
        return _read(Path(text))
    near = get_close_matches(text, known_platforms(), n=1)
    hint = f", did you mean '{near[0]}'?" if near else ";"
    raise ValueError(
        f"no platform named '{text}'{hint} meshes/ describes {', '.join(known_platforms())}, "
        "and a path that ends in .toml names a file of your own"
    )


# What JAX calls a kind of device, in lower case, and the file that describes machines made of it; the first word
# found decides. ROCm names MI250X devices "AMD Instinct MI250X/MI250".
_KINDS = {
    "mi250x": "frontier",
    "mi300x": "mi300x_node",
    "h200": "h200_node",
    "h100": "h100_node",
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
        return replace(load_platform("cpu"), devices_per_node=devices_per_process, links=())
    for word, name in _KINDS.items():
        if word in device_kind.lower():
            return load_platform(name)
    return Platform(
        name="generic",
        description=f"{device_kind}: no file in meshes/ describes it, so its peak is unknown and no MFU is given",
        device=Device(memory_bytes=memory_bytes),
        devices_per_node=devices_per_process,
    )


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
        parts["device"] = Device(**_checked_fields(Device, parts["device"], "[device]"))
    links = parts.get("links", [])
    if not isinstance(links, list) or not all(isinstance(link, dict) for link in links):
        raise ValueError("links must be a list of tables, each headed [[links]]")
    parts["links"] = tuple(Link(**_checked_fields(Link, link, "[[links]]")) for link in links)
    parts = _checked_fields(Platform, parts, "the top level")
    if not isinstance(parts["device"], Device):
        raise ValueError(f"device must be a table headed [device], got {parts['device']!r}")
    return Platform(**parts)


def _checked_fields(cls: type, values: dict[str, Any], where: str) -> dict[str, Any]:
    known = {entry.name: entry for entry in fields(cls)}
    for key in values:
        if key not in known:
            near = get_close_matches(key, known, n=1)
            hint = f", did you mean {near[0]}?" if near else ";"
            raise ValueError(f"{where} has no field '{key}'{hint} its fields are {', '.join(known)}")
    for key, entry in known.items():
        if key not in values and entry.default is MISSING and entry.default_factory is MISSING:
            raise ValueError(f"{where} needs the field {key}")
    return values


def _check_count(name: str, value: Any) -> None:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


def _check_rate(name: str, value: Any) -> None:
    if type(value) not in (int, float) or not isfinite(value) or value <= 0:
        raise ValueError(
            f"{name} must be a positive number in base units (bytes, seconds, FLOP), got {value!r}"
        )


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} must be a non-empty text, got {value!r}")


def _check_provenance(where: str, value: Any) -> None:
    if value not in get_args(Provenance):
        raise ValueError(
            f"{where} provenance must be one of {', '.join(get_args(Provenance))}, got {value!r}"
        )
