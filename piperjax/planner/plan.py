"""A plan: which mesh, schedule and partition a model is trained with. Immutable, and valid if it exists."""

from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from meshes.platform import Platform
from models import cost
from models.config import ModelConfig
from piperjax.planner.dispatchers import check_chunks, check_overflow, check_pipe
from piperjax.planner.partition import partition_model
from piperjax.schedules import registry
from piperjax.schedules.filling import RECOMPUTING_UNITS, UNITS
from piperjax.schedules.profile import Profile, profile
from piperjax.schedules.schedule import Schedule
from piperjax.schedules.ticks import TickTable, pack

VOCABULARY = ("split", "whole")
# In which gradients of large parameters are added up; "float32" is whatever parameters have that is wider.
GRADIENT_DTYPES = ("float32", "bfloat16")
MEMORY_MODES = ("stage", "layer", "named", "products", "stash")
# Their backwards run most of a forward again; where there is a choice of tick tables it is made for such times.
RECOMPUTING_MODES = ("stage", "layer", "named")
# A stage is run again for the inputs of its layers, so its last layer runs as often as where each layer keeps its own.
LAST_LAYER_MODES = {"stage": "layer"}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a model of `sum(layers_per_stage)` layers is laid out over devices and microbatches.

    Attributes:
      pipe: pipe ranks.
      data: data-parallel replicas of the experts.
      expert: devices that share the experts of a layer.
      expert_factors: the expert axis as (group, node, local), outermost first; their product is `expert`.
      schedule: name of the pipeline schedule, or the path of a schedule file.
      num_chunks: stages per pipe rank; 0 for the schedule's own number.
      num_microbatches: microbatches per step.
      layers_per_stage: layers held by each stage, in layer order.
      batch_size: sequences per step over all devices.
      seq_len: tokens per sequence.
      memory_mode: what a forward keeps for its backward: the input of the "stage" only, the input of every
        "layer", also what dispatch brings to the experts ("named"), the results of all matrix products but those
        inside attention, and of attention in blocks its result ("products"), or every intermediate result
        ("stash").
      dispatch: name of the dispatcher.
      dispatch_chunks: parts in which the tokens of a microbatch travel to their experts, so that one is on its way
        while another is at its experts.
      capacity_factor: rows per destination over the balanced number that buffers have places for; 0 means for all.
      overflow: what becomes of rows for which there is no place: "drop" them, or let them travel in later "passes".
      vocabulary: embedding, head and loss "split" over the pipe ranks, or "whole" on the ranks of the first and last
        stage. Split stores 1 / pipe of them and makes no stage slower, for four exchanges of activations.
      overlap: run the forward and the backward of a tick in one loop, so that the compiler can hide the all-to-all of
        one behind the products of the other; costs one tick.
      gradient_dtype: in which gradients are added up over microbatches and devices. In "bfloat16", half the memory, of
        every sum 8 bits remain; norms, biases, routers and the embedding keep "float32".
    """

    pipe: int
    data: int
    expert: int
    expert_factors: tuple[int, int, int]
    schedule: str
    num_microbatches: int
    layers_per_stage: tuple[int, ...]
    batch_size: int
    seq_len: int
    memory_mode: str = "layer"
    dispatch: str = "flat"
    dispatch_chunks: int = 1
    capacity_factor: float = 0.0
    overflow: str = "drop"
    num_chunks: int = 0
    overlap: bool = False
    vocabulary: str = "split"
    gradient_dtype: str = "float32"

    def __post_init__(self):
        for name in ("pipe", "data", "expert", "num_microbatches", "batch_size", "seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        group, node, local = self.expert_factors
        if group * node * local != self.expert:
            raise ValueError(f"expert_factors {self.expert_factors} must multiply to expert = {self.expert}")
        if min(self.layers_per_stage) < 1:
            raise ValueError(
                f"every stage needs at least one layer, got layers_per_stage = {self.layers_per_stage}"
            )
        if self.memory_mode not in MEMORY_MODES:
            raise ValueError(
                f"memory_mode must be one of {', '.join(MEMORY_MODES)}, got {self.memory_mode!r}"
            )
        if self.vocabulary not in VOCABULARY:
            raise ValueError(f"vocabulary must be one of {', '.join(VOCABULARY)}, got {self.vocabulary!r}")
        if self.gradient_dtype not in GRADIENT_DTYPES:
            raise ValueError(
                f"gradient_dtype must be one of {', '.join(GRADIENT_DTYPES)}, got {self.gradient_dtype!r}"
            )
        check_overflow(self.overflow, self.capacity_factor)
        self._check_batch()
        check_chunks(self.dispatch, self.dispatch_chunks, self.tokens_per_device)
        check_pipe(self.dispatch, self.pipe)
        # The schedule is built where it is used: searching looks at more plans than it builds.
        chunks = registry.check(self.schedule, self.pipe, self.num_microbatches, self.num_chunks)
        if chunks * self.pipe != len(self.layers_per_stage):
            raise ValueError(
                f"schedule {self.schedule!r} has {chunks * self.pipe} stages over pipe = {self.pipe}, but "
                f"layers_per_stage names {len(self.layers_per_stage)}"
            )
        self._check_overlap()

    def _check_overlap(self):
        if self.overlap and self.build_schedule().clock != "dual":
            raise ValueError(
                f"overlap needs ticks with a forward and a backward, but schedule {self.schedule!r} runs one action "
                "after the other; use one_f_one_b, interleaved, zb_h1 or zb_v, or leave overlap off"
            )
        if self.overlap and self.memory_mode == "stage":
            raise ValueError(
                "overlap goes through forward and backward layer by layer, which memory_mode 'stage' cannot; "
                "use 'layer' or a mode that keeps more"
            )

    def _check_batch(self):
        shards = self.data * self.expert
        if self.batch_size % (shards * self.num_microbatches):
            choices = [m for m in range(1, self.batch_size + 1) if self.batch_size % (shards * m) == 0]
            advice = (
                f"use one of {_listed(choices)} microbatches"
                if choices
                else f"use a batch that is a multiple of {shards * self.num_microbatches}"
            )
            raise ValueError(
                f"the batch of {self.batch_size} sequences must divide into {self.num_microbatches} microbatches x "
                f"{self.data} data x {self.expert} expert devices = {shards * self.num_microbatches}; {advice}"
            )

    @property
    def num_devices(self) -> int:
        """Devices in the mesh."""
        return self.pipe * self.data * self.expert

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return sum(self.layers_per_stage)

    @property
    def layer_modes(self) -> tuple[str, ...]:
        """The memory mode as which every layer counts, in layer order: how often its forward and exchanges run."""
        last = LAST_LAYER_MODES.get(self.memory_mode, self.memory_mode)
        stages = ((*(self.memory_mode,) * (layers - 1), last) for layers in self.layers_per_stage)
        return tuple(mode for stage in stages for mode in stage)

    @property
    def microbatch_size(self) -> int:
        """Sequences of one microbatch over all devices."""
        return self.batch_size // self.num_microbatches

    @property
    def tokens_per_device(self) -> int:
        """Tokens of one microbatch on one device."""
        return self.microbatch_size // (self.data * self.expert) * self.seq_len

    def build_schedule(self) -> Schedule:
        """The schedule as a value."""
        return registry.build(self.schedule, self.pipe, self.num_microbatches, self.num_chunks)

    @property
    def stages_of_rank(self) -> tuple[tuple[int, ...], ...]:
        """Stages of each pipe rank, in chunk order."""
        return registry.placement(self.schedule, self.pipe, self.num_microbatches, self.num_chunks)

    def profile(self) -> Profile:
        """Counts of the schedule, without building it at its full size."""
        slots, recomputes = "overlap" if self.overlap else None, self.memory_mode in RECOMPUTING_MODES
        sizes = (self.pipe, self.num_microbatches, self.num_chunks)
        return profile(self.schedule, *sizes, slots, recomputes=recomputes)

    def tick_table(self) -> TickTable:
        """The table that is executed."""
        units = RECOMPUTING_UNITS if self.memory_mode in RECOMPUTING_MODES else UNITS
        return pack(self.build_schedule(), "overlap" if self.overlap else None, units)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Plan":
        """Reads what `to_dict` wrote.

        Raises:
          ValueError: if a field is missing or unknown.
        """
        known = {field.name for field in fields(cls)}
        missing = {field.name for field in fields(cls) if field.default is MISSING} - set(values)
        if missing or set(values) - known:
            raise ValueError(
                f"a plan has the fields {', '.join(sorted(known))}; missing: {', '.join(sorted(missing)) or 'none'}, "
                f"unknown: {', '.join(sorted(set(values) - known)) or 'none'}"
            )
        as_tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**as_tuples)


def _listed(numbers: list[int]) -> str:
    if len(numbers) > 8:
        return ", ".join(map(str, numbers[:8])) + ", ..."
    return ", ".join(map(str, numbers))


MEMORY_FRACTION_FOR_STATE = 0.6
STATE_BYTES_PER_PARAMETER = 16


def default_plan(
    model: ModelConfig,
    platform: Platform,
    num_devices: int,
    *,
    batch_size: int,
    seq_len: int,
    pipe: int | None = None,
    data: int | None = None,
    expert: int | None = None,
    schedule: str = "one_f_one_b",
    num_microbatches: int | None = None,
    memory_mode: str = "layer",
    dispatch: str = "flat",
    dispatch_chunks: int = 1,
    capacity_factor: float = 0.0,
    overflow: str = "drop",
    num_chunks: int = 0,
    overlap: bool = False,
    vocabulary: str = "split",
    gradient_dtype: str = "float32",
) -> Plan:
    """Completes a plan by a simple rule; sizes that are given (not None) are kept.

    Expert: the most devices of one node that divide the experts, so that all-to-alls stay inside the node.
    Pipe: as few stages as hold the training state (16 bytes per parameter) in 60 % of device memory.
    Data: the devices that remain. Microbatches: up to four per pipe rank, as many as divide the batch and as the
    schedule can have.

    Raises:
      ValueError: if the sizes do not fit the devices, the model or the batch.
    """
    expert = expert or _default_expert(model, platform, num_devices, taken=(pipe or 1) * (data or 1))
    pipe = pipe or _default_pipe(model, platform, num_devices // expert, data=data, expert=expert)
    data = data or max(1, num_devices // (pipe * expert))
    if pipe * data * expert != num_devices:
        raise ValueError(
            f"pipe x data x expert must be the {num_devices} devices, got {pipe} x {data} x {expert} = "
            f"{pipe * data * expert}; give -1 to one of them to fill it"
        )
    _check_expert(model, expert)
    schedule = registry.canonical(schedule)
    chunks = registry.chunks_of(schedule, num_chunks)
    num_stages = pipe * chunks
    if chunks > 1 and num_stages > model.num_layers:
        raise ValueError(
            f"schedule {schedule!r} splits the model into {pipe} pipe ranks x {chunks} = {num_stages} stages, but "
            f"{model.name} has {model.num_layers} layers; use --pipe {max(1, model.num_layers // chunks)} or fewer"
        )
    num_microbatches = num_microbatches or _default_microbatches(
        batch_size, pipe, data * expert, schedule, num_chunks
    )
    layers_per_stage = partition_model(
        model,
        num_stages,
        seq_len,
        vocabulary,
        stages_of_rank=registry.placement(schedule, pipe, num_microbatches, num_chunks),
        recomputes=memory_mode in RECOMPUTING_MODES,
    )
    return Plan(
        pipe=pipe,
        data=data,
        expert=expert,
        expert_factors=platform.expert_factors(expert=expert, pipe=pipe, data=data),
        schedule=schedule,
        num_microbatches=num_microbatches,
        layers_per_stage=layers_per_stage,
        batch_size=batch_size,
        seq_len=seq_len,
        memory_mode=memory_mode,
        dispatch=dispatch,
        dispatch_chunks=dispatch_chunks,
        capacity_factor=capacity_factor,
        overflow=overflow,
        num_chunks=num_chunks,
        overlap=overlap,
        vocabulary=vocabulary,
        gradient_dtype=gradient_dtype,
    )


def _check_expert(model: ModelConfig, expert: int):
    experts = model.num_experts
    if not experts and expert > 1:
        raise ValueError(f"{model.name} has no experts to divide, got expert = {expert}; use --expert 1")
    if experts and experts % expert:
        raise ValueError(
            f"the expert axis must divide the {experts} experts of {model.name}, got {expert}; "
            f"use one of {_listed(_divisors(experts))}"
        )


def _default_expert(model: ModelConfig, platform: Platform, num_devices: int, *, taken: int) -> int:
    room = num_devices // taken
    fits = [
        d for d in _divisors(max(1, room)) if d <= platform.devices_per_node and model.num_experts % d == 0
    ]
    return max(fits) if model.num_experts else 1


def _default_pipe(
    model: ModelConfig, platform: Platform, remaining: int, *, data: int | None, expert: int
) -> int:
    if data is not None:
        return max(1, remaining // data)
    memory_bytes = platform.device.memory_bytes
    if not memory_bytes:
        return 1
    state_bytes = STATE_BYTES_PER_PARAMETER * cost.parameters(model).total / expert
    choices = [d for d in _divisors(max(1, remaining)) if d <= model.num_layers]
    fits = [d for d in choices if state_bytes / d <= MEMORY_FRACTION_FOR_STATE * memory_bytes]
    return min(fits) if fits else max(choices)


def _default_microbatches(batch_size: int, pipe: int, shards: int, schedule: str, num_chunks: int) -> int:
    if registry.is_file(schedule):
        return registry.read(schedule).num_microbatches
    if pipe == 1:
        return 1
    refused = None
    for number in range(4 * pipe, 0, -1):
        if batch_size % (number * shards) == 0:
            try:
                registry.build(schedule, pipe, number, num_chunks)
            except ValueError as error:  # Such as an interleaved schedule, which needs a multiple of pipe.
                refused = refused or error
            else:
                return number
    if refused:
        raise refused
    return 1


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
