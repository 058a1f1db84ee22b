"""Candidates: which meshes, schedules and microbatches a search looks at, and why it leaves out the others."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from math import log2
from typing import Any, NamedTuple

from meshes.axes import divisors
from meshes.platform import Platform
from models.config import ModelConfig
from piperjax.planner.dispatchers import SEARCHED_DISPATCH_CHUNKS, Way, check_overflow, named, ways
from piperjax.planner.plan import GRADIENT_DTYPES, MEMORY_MODES, VOCABULARY
from piperjax.planner.timing import Conditions
from piperjax.schedules import registry

# In lockstep the others are never better than one of these, which a test checks: gpipe is one_f_one_b with more in
# flight, zb_dual is the table of zb_h1, zb_h2 takes as long with as much kept, and dualpipe_v is zb_v with more bubble.
SEARCHED_SCHEDULES = ("one_f_one_b", "interleaved", "zb_h1", "zb_v", "v_half", "v_min")
SEARCHED_CHUNKS = (2, 3, 4, 6, 8)
OVERLAPPED = ("one_f_one_b", "interleaved", "zb_h1", "zb_v")
MOST_MICROBATCH_CHOICES = 12

WISHES = (
    "pipe",
    "data",
    "expert",
    "schedule",
    "num_chunks",
    "num_microbatches",
    "memory_mode",
    "dispatch",
    "dispatch_chunks",
    "capacity_factor",
    "overflow",
    "vocabulary",
    "overlap",
    "gradient_dtype",
)
AXES = ("pipe", "data", "expert")


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a search is asked.

    Attributes:
      model: what is trained.
      platform: what it runs on.
      num_devices: devices of the mesh.
      batch_size: sequences per step over all devices.
      seq_len: tokens per sequence.
      dtype: of activations and matrix products.
      wished: fields of the plan that are given, by name; the others are searched.
      dispatchers: names of the dispatchers that may be chosen.
      imbalance: rows of the most loaded expert device over the mean.
    """

    model: ModelConfig
    platform: Platform
    num_devices: int
    batch_size: int
    seq_len: int
    dtype: str = "bfloat16"
    wished: Mapping[str, Any] = field(default_factory=dict)
    dispatchers: tuple[str, ...] = ("flat",)
    imbalance: float = 1.0

    def __post_init__(self):
        for name in ("num_devices", "batch_size", "seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.imbalance < 1:
            raise ValueError(f"imbalance is the largest load over the mean, at least 1, got {self.imbalance}")
        for name in self.wished:
            if name not in WISHES:
                near = get_close_matches(name, WISHES, n=1, cutoff=0.0)[0]
                raise ValueError(f"a plan cannot be asked for {name!r}; did you mean {near!r}?")
        self._check_choices()
        self._check_devices()

    @property
    def conditions(self) -> Conditions:
        """Under which its plans are timed."""
        return Conditions(dtype=self.dtype, imbalance=self.imbalance)

    def _check_choices(self):
        choices = {
            "memory_mode": MEMORY_MODES,
            "vocabulary": VOCABULARY,
            "gradient_dtype": GRADIENT_DTYPES,
        }
        for name, allowed in choices.items():
            if name in self.wished and self.wished[name] not in allowed:
                near = get_close_matches(str(self.wished[name]), allowed, n=1)
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}, got {self.wished[name]!r}"
                    + (f"; did you mean {near[0]!r}?" if near else "")
                )
        for name in (*AXES, "num_microbatches", "dispatch_chunks"):
            if self.wished.get(name, 1) < 1:
                raise ValueError(f"{name} must be at least 1, got {self.wished[name]}")
        check_overflow(self.wished.get("overflow", "drop"), self.wished.get("capacity_factor", 0.0))
        for name in self.dispatchers:
            named(name)
        if "dispatch" in self.wished:
            named(self.wished["dispatch"])
        if "num_chunks" in self.wished and "schedule" in self.wished:
            registry.chunks_of(self.wished["schedule"], self.wished["num_chunks"])

    def _check_devices(self):
        reach = self.platform.links[-1].devices if self.platform.links else self.platform.devices_per_node
        if self.num_devices > reach:
            raise ValueError(
                f"platform {self.platform.name!r} joins at most {reach} devices, got {self.num_devices}; use --devices "
                f"{reach} or fewer, or describe a larger machine in a .toml file"
            )

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a step over all devices."""
        return self.batch_size * self.seq_len


class Mesh(NamedTuple):
    """Sizes of the mesh axes."""

    pipe: int
    data: int
    expert: int

    def __str__(self) -> str:
        return f"pipe={self.pipe}, data={self.data}, expert={self.expert}"

    def distance(self, other: Mapping[str, int]) -> float:
        """How many doublings of an axis lie between this mesh and sizes that were wished for."""
        return sum(abs(log2(getattr(self, axis) / size)) for axis, size in other.items())


class Order(NamedTuple):
    """In which order a pipe rank works: schedule, stages per rank, and whether F and B of a tick overlap."""

    schedule: str
    num_chunks: int
    overlap: bool = False

    def __str__(self) -> str:
        chunks = f" x{self.num_chunks}" if self.asked_chunks else ""
        return f"{self.schedule}{chunks}{' overlapped' if self.overlap else ''}"

    @property
    def layout(self) -> str | None:
        """How `ticks.pack` lays the schedule out."""
        return "overlap" if self.overlap else None

    @property
    def asked_chunks(self) -> int:
        """What a plan says of the stages per rank: 0 where the schedule has its own number."""
        is_chosen = self.schedule in registry.ENTRIES and registry.ENTRIES[self.schedule].takes_chunks
        return self.num_chunks if is_chosen else 0


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """Why candidates were left out.

    Attributes:
      reason: what must hold and did not.
      count: how many.
      what: of what: "meshes" or "plans".
      example: one of them.
    """

    reason: str
    count: int
    what: str
    example: str


class Rejections:
    """Counts what is left out, by reason."""

    def __init__(self):
        self._found: dict[tuple[str, str], list] = {}

    def copy(self) -> "Rejections":
        """Counts of its own that begin with these."""
        copied = Rejections()
        copied._found = {key: [count, example] for key, (count, example) in self._found.items()}
        return copied

    def add(self, reason: str, example: Any, *, what: str = "meshes", count: int = 1) -> None:
        """Counts `count` candidates under a reason; the first example is kept."""
        entry = self._found.setdefault((what, reason), [0, str(example)])
        entry[0] += count

    def listed(self) -> tuple[Rejection, ...]:
        """All reasons, meshes first, then by count."""
        found = [
            Rejection(reason=reason, count=count, what=what, example=example)
            for (what, reason), (count, example) in self._found.items()
        ]
        return tuple(sorted(found, key=lambda r: (r.what, -r.count)))


def meshes(question: Question, rejections: Rejections) -> list[Mesh]:
    """Every mesh of the devices that the model and the batch allow and that has the wished sizes."""
    wanted = {axis: question.wished[axis] for axis in AXES if axis in question.wished}
    found = []
    for mesh in _factorisations(question.num_devices):
        if any(getattr(mesh, axis) != size for axis, size in wanted.items()):
            continue
        reason = _impossible(question, mesh)
        if reason:
            rejections.add(reason, mesh)
        else:
            found.append(mesh)
    return found


def _factorisations(num_devices: int) -> Iterator[Mesh]:
    for pipe in divisors(num_devices):
        for expert in divisors(num_devices // pipe):
            yield Mesh(pipe, num_devices // (pipe * expert), expert)


def _impossible(question: Question, mesh: Mesh) -> str | None:
    """Why a mesh cannot be, whatever else is chosen."""
    model = question.model
    shards = mesh.data * mesh.expert
    if mesh.pipe > model.num_layers:
        return f"a pipe rank needs a layer, and there are {model.num_layers}"
    if mesh.expert > 1 and not model.num_experts:
        return "the model has no experts to divide"
    if mesh.expert > 1 and model.num_experts % mesh.expert:
        return f"the expert axis must divide the {model.num_experts} experts"
    if question.batch_size % shards:
        return f"the batch of {question.batch_size} sequences must divide over data x expert devices"
    wished = question.wished.get("num_microbatches")
    if wished and question.batch_size % (shards * wished):
        return f"a device's part of the batch must divide into the {wished} microbatches"
    return None


def orders(question: Question, pipe: int) -> list[Order]:
    """Schedules for a number of pipe ranks: searched ones, or the wished one.

    One pipe rank needs no schedule: it is 1F1B, which runs F and B of one microbatch after the other.
    """
    wished = question.wished
    schedule = registry.canonical(wished["schedule"]) if "schedule" in wished else None
    if schedule is None and pipe == 1:
        return [Order("one_f_one_b", 1)]
    found = []
    for name in (schedule,) if schedule else SEARCHED_SCHEDULES:
        for chunks in _chunk_counts(name, wished.get("num_chunks", 0), searched=schedule is None):
            if pipe * chunks <= question.model.num_layers:
                found += [Order(name, chunks, overlap) for overlap in _overlaps(question, name, pipe)]
    return found


def _chunk_counts(name: str, wished: int, *, searched: bool) -> tuple[int, ...]:
    if registry.is_file(name):
        return (registry.chunks_of(name, wished),)
    entry = registry.ENTRIES[name]
    if not entry.takes_chunks:
        return (entry.num_chunks,) if wished in (0, entry.num_chunks) else ()
    if wished:
        return (wished,)
    return SEARCHED_CHUNKS if searched or name == "interleaved" else (entry.num_chunks,)


def _overlaps(question: Question, name: str, pipe: int) -> tuple[bool, ...]:
    if "overlap" in question.wished:
        asked = bool(question.wished["overlap"])
        return (asked,) if not asked or name in OVERLAPPED or registry.is_file(name) else ()
    return (False, True) if name in OVERLAPPED and pipe > 1 else (False,)


def microbatch_counts(question: Question, mesh: Mesh) -> list[int]:
    """Numbers of microbatches that divide a device's part of the batch and fill the pipeline; of many, some evenly."""
    if "num_microbatches" in question.wished:
        return [question.wished["num_microbatches"]]
    schedule = question.wished.get("schedule", "")
    if registry.is_file(schedule):
        return [registry.read(schedule).num_microbatches]
    counts = divisors(question.batch_size // (mesh.data * mesh.expert))
    # With less than half a microbatch per pipe rank, ranks idle most of the time.
    counts = [count for count in counts if 2 * count >= mesh.pipe] or counts[-1:]
    if len(counts) <= MOST_MICROBATCH_CHOICES:
        return counts
    step = (len(counts) - 1) / (MOST_MICROBATCH_CHOICES - 1)
    return sorted({counts[round(i * step)] for i in range(MOST_MICROBATCH_CHOICES)})


def dispatch_ways(question: Question) -> tuple[Way, ...]:
    """Dispatchers to try, with numbers of chunks."""
    wished = question.wished
    dispatchers = (wished["dispatch"],) if "dispatch" in wished else question.dispatchers
    chunks = (wished["dispatch_chunks"],) if "dispatch_chunks" in wished else SEARCHED_DISPATCH_CHUNKS
    return ways(dispatchers, chunks)


def memory_modes(question: Question) -> tuple[str, ...]:
    """Memory modes to try, that which keeps least first."""
    return (question.wished["memory_mode"],) if "memory_mode" in question.wished else MEMORY_MODES


def vocabularies(question: Question, pipe: int) -> tuple[str, ...]:
    """Placements of embedding and head to try; with one pipe rank both are the same."""
    if "vocabulary" in question.wished:
        return (question.wished["vocabulary"],)
    return VOCABULARY if pipe > 1 else VOCABULARY[:1]


def nearest_mesh(question: Question) -> Mesh | None:
    """The possible mesh of these devices that is closest to the wished sizes; None if there is none at all."""
    wanted = {axis: question.wished[axis] for axis in AXES if axis in question.wished}
    possible = [mesh for mesh in _factorisations(question.num_devices) if not _impossible(question, mesh)]
    return min(possible, key=lambda mesh: (mesh.distance(wanted), mesh), default=None)


def check_some(question: Question, found: list[Mesh], rejections: Rejections) -> None:
    """Says what is wrong if no mesh is possible, and what the nearest possible one is.

    Raises:
      ValueError: if there is no mesh.
    """
    if found:
        return
    wanted = {axis: question.wished[axis] for axis in AXES if axis in question.wished}
    sizes = ", ".join(f"{axis}={size}" for axis, size in wanted.items())
    reasons = rejections.listed()
    asked = f"{question.model.name} on {question.num_devices} devices"
    if not reasons:
        problem = f"no mesh of {question.num_devices} devices has {sizes}"
    else:
        with_sizes = f" with {sizes}" if sizes else ""
        problem = f"no mesh of {asked}{with_sizes} is possible: {reasons[0].reason}, got {reasons[0].example}"
    near = nearest_mesh(question)
    if near is not None:
        raise ValueError(f"{problem}; the nearest that is possible is {near}")
    number = question.wished.get("num_microbatches", 1)
    larger = replace(question, batch_size=question.num_devices * number)
    divided = [mesh for mesh in _factorisations(question.num_devices) if not _impossible(larger, mesh)]
    asked_for = [
        mesh for mesh in divided if all(getattr(mesh, axis) == size for axis, size in wanted.items())
    ]
    least = number * min(mesh.data * mesh.expert for mesh in asked_for or divided)
    batch = -(-question.batch_size // least) * least
    raise ValueError(f"{problem}; use a batch that is a multiple of {least} sequences, such as {batch}")
