"""Scoring: a quick price in seconds and bytes of every candidate at once.

The price of a layer depends on the expert axis, on the tokens of a microbatch on a device and on the memory mode only,
and that of a schedule on counts (`schedules.profile`). So layers are priced one by one, and candidates with the same
pipe ranks and microbatches all together, as arrays. The models are those of `timing` and `memory`, with stages divided
by FLOP and all of them as slow as the slowest; the tests compare.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import inf

import numpy as np

from models.config import ModelConfig
from piperjax.planner.candidates import (
    Mesh,
    Order,
    Question,
    Rejections,
    dispatch_ways,
    memory_modes,
    orders,
    vocabularies,
)
from piperjax.planner.cells import Cell, groups, layers_by_flop, memory_backend
from piperjax.planner.dispatchers import Way
from piperjax.planner.layer_exchanges import saved_seconds
from piperjax.planner.memory import Layout, RankMemory, estimate_memory, is_straight, rank_memory
from piperjax.planner.plan import MEMORY_MODES, RECOMPUTING_MODES, Plan
from piperjax.planner.shared_cores import fresh_seconds
from piperjax.planner.storage import most_layers_of_kind
from piperjax.schedules import registry
from piperjax.schedules.profile import Profile, profile


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Every candidate, one row each.

    Attributes:
      question: what was asked.
      meshes: the meshes that rows refer to.
      orders: the orders that rows refer to.
      ways: the dispatchers with their chunks that rows refer to.
      mesh, order, way: numbers of these, int `[rows]`.
      num_microbatches: int `[rows]`.
      memory_mode, vocabulary: positions in `memory_modes` and `vocabularies`, int `[rows]`.
      seconds: of a step, float `[rows]`.
      num_bytes: that a device needs, float `[rows]`; where `is_least`, what lasts alone, which is too much already.
      is_least: bool `[rows]`.
    """

    question: Question
    meshes: tuple[Mesh, ...]
    orders: tuple[Order, ...]
    ways: tuple[Way, ...]
    mesh: np.ndarray
    order: np.ndarray
    way: np.ndarray
    num_microbatches: np.ndarray
    memory_mode: np.ndarray
    vocabulary: np.ndarray
    seconds: np.ndarray
    num_bytes: np.ndarray
    is_least: np.ndarray

    @property
    def fits(self) -> np.ndarray:
        """Whether a device has room for it, bool `[rows]`."""
        return self.num_bytes <= capacity_bytes(self.question)

    def all_bytes(self, rows: Sequence[int]) -> np.ndarray:
        """Bytes that a device needs for some rows, everything counted, float `[rows]`."""
        return np.array([self._all_bytes(int(row)) for row in rows])

    def _all_bytes(self, row: int) -> float:
        return memory_of(self, row).total if self.is_least[row] else float(self.num_bytes[row])

    def leanest(self, among: np.ndarray) -> tuple[int, float]:
        """The row that needs least of those marked, everything counted, and its bytes."""
        found, least = -1, inf
        for row in np.argsort(np.where(among, self.num_bytes, inf), kind="stable")[: int(among.sum())]:
            if self.num_bytes[row] >= least:
                break
            num_bytes = self._all_bytes(int(row))
            if num_bytes < least:
                found, least = int(row), num_bytes
        return found, least

    def row_of(self, plan: Plan) -> int:
        """The row of a plan, however its layers are divided."""
        mesh = self.meshes.index((plan.pipe, plan.data, plan.expert))
        chunks = len(plan.layers_per_stage) // plan.pipe
        order = self.orders.index((plan.schedule, chunks, plan.overlap))
        mode = memory_modes(self.question).index(plan.memory_mode)
        vocabulary = vocabularies(self.question, plan.pipe).index(plan.vocabulary)
        way = self.ways.index((plan.dispatch, plan.dispatch_chunks))
        (found,) = np.flatnonzero(
            (self.mesh == mesh)
            & (self.order == order)
            & (self.way == way)
            & (self.num_microbatches == plan.num_microbatches)
            & (self.memory_mode == mode)
            & (self.vocabulary == vocabulary)
        )
        return int(found)

    def plan(self, row: int) -> Plan:
        """The plan of one row."""
        mesh, order = self.meshes[self.mesh[row]], self.orders[self.order[row]]
        question, way = self.question, self.ways[self.way[row]]
        return Plan(
            **mesh._asdict(),
            expert_factors=question.platform.expert_factors(**mesh._asdict()),
            schedule=order.schedule,
            num_chunks=order.asked_chunks,
            overlap=order.overlap,
            num_microbatches=int(self.num_microbatches[row]),
            layers_per_stage=layers_by_flop(question.model, question.seq_len, mesh.pipe * order.num_chunks),
            batch_size=question.batch_size,
            seq_len=question.seq_len,
            memory_mode=memory_modes(question)[self.memory_mode[row]],
            vocabulary=vocabularies(question, mesh.pipe)[self.vocabulary[row]],
            dispatch=way.dispatch,
            dispatch_chunks=way.chunks,
            capacity_factor=question.wished.get("capacity_factor", 0.0),
            overflow=question.wished.get("overflow", "drop"),
            gradient_dtype=question.wished.get("gradient_dtype", "float32"),
        )


def capacity_bytes(question: Question) -> float:
    """Bytes that a plan may need on a device, reserve included; infinite where the platform does not say."""
    return question.platform.device.memory_bytes or inf


def score(question: Question, meshes: list[Mesh], rejections: Rejections) -> Scores:
    """Prices every plan on these meshes; what its schedule or its memory forbids is counted."""
    known = {order: number for number, order in enumerate(_all_orders(question, meshes))}
    blocks = []
    for cells in groups(question, meshes):
        blocks += [
            _block(question, cells, order, number=known[order])
            for order in orders(question, cells[0].mesh.pipe)
            if _exists(question, cells, order, rejections)
        ]
    columns = {
        name: np.concatenate([block[name] for block in blocks]) for name in (blocks[0] if blocks else ())
    }
    if not blocks:
        columns = {name: np.zeros(0, int) for name in ("mesh", "order", "way", "num_microbatches")}
        columns |= {name: np.zeros(0, int) for name in ("memory_mode", "vocabulary", "seconds", "num_bytes")}
        columns["is_least"] = np.zeros(0, bool)
    scores = Scores(
        question=question,
        meshes=tuple(meshes),
        orders=tuple(known),
        ways=dispatch_ways(question),
        **columns,
    )
    _count_unfit(scores, rejections)
    return scores


def _all_orders(question: Question, meshes: list[Mesh]) -> list[Order]:
    pipes = dict.fromkeys(mesh.pipe for mesh in meshes)
    return list(dict.fromkeys(order for pipe in pipes for order in orders(question, pipe)))


def _count_unfit(scores: Scores, rejections: Rejections) -> None:
    unfit = ~scores.fits
    if unfit.any():
        nearest, needed = scores.leanest(unfit)
        room = capacity_bytes(scores.question)
        rejections.add(
            "a device must have room for the plan",
            f"{scores.meshes[scores.mesh[nearest]]}: {needed / 2**30:.1f} of {room / 2**30:.1f} GiB",
            what="plans",
            count=int(unfit.sum()),
        )


def _exists(question: Question, cells: list[Cell], order: Order, rejections: Rejections) -> bool:
    """Whether there is such a schedule for so many microbatches."""
    pipe, number = cells[0].mesh.pipe, cells[0].num_microbatches
    try:
        registry.check(order.schedule, pipe, number, order.asked_chunks)
    except ValueError:
        plans = len(cells) * len(memory_modes(question)) * len(vocabularies(question, pipe))
        reason = f"{order.schedule} does not exist for every number of microbatches"
        example = f"{number} microbatch{'es' * (number > 1)} on {pipe} pipe ranks"
        rejections.add(reason, example, what="plans", count=plans)
        return False
    return True


def _block(question: Question, cells: list[Cell], order: Order, *, number: int) -> dict[str, np.ndarray]:
    """Columns of all candidates of these cells with this order."""
    pipe, microbatches = cells[0].mesh.pipe, cells[0].num_microbatches
    modes, placed = memory_modes(question), vocabularies(question, pipe)
    known_ways = dispatch_ways(question)
    partition = layers_by_flop(question.model, question.seq_len, pipe * order.num_chunks)
    # Tick tables are laid out for backwards that recompute, or for those that do not.
    recomputing = np.array([mode in RECOMPUTING_MODES for mode in modes])[:, None]
    priced = {}
    for recomputes in set(recomputing.ravel().tolist()):
        sizes = (order.schedule, pipe, microbatches, order.asked_chunks, order.layout)
        counted = profile(*sizes, recomputes=recomputes)
        seconds = _seconds(question, cells, order, counted, partition)
        alike = [
            mode for mode in modes if (mode in RECOMPUTING_MODES) == recomputes and _goes_with(order, mode)
        ]
        num_bytes, taken, is_least = _num_bytes(question, cells, order, counted, partition, alike)
        seconds = seconds + fresh_seconds(question.platform, question.num_devices, taken)
        priced[recomputes] = seconds, num_bytes, is_least
    some = next(iter(priced.values()))
    seconds, num_bytes, is_least = (
        np.where(recomputing, *both)
        for both in zip(priced.get(True, some), priced.get(False, some), strict=True)
    )
    shape = (len(cells), len(modes), len(placed))

    def column(values, axis: int) -> np.ndarray:
        values = np.asarray(values).reshape([-1 if i == axis else 1 for i in range(3)])
        return np.broadcast_to(values, shape)

    columns = {
        "mesh": column([cell.index for cell in cells], 0),
        "way": column([known_ways.index(cell.way) for cell in cells], 0),
        "order": column([number], 0),
        "num_microbatches": column([microbatches], 0),
        "memory_mode": column(range(len(modes)), 1),
        "vocabulary": column(range(len(placed)), 2),
        "seconds": seconds,
        "num_bytes": num_bytes,
        "is_least": is_least,
    }
    possible = np.array([_goes_with(order, mode) for mode in modes])
    return {name: values[:, possible].ravel() for name, values in columns.items()}


def _goes_with(order: Order, memory_mode: str) -> bool:
    """Overlap goes through the passes layer by layer, which mode "stage" does not."""
    return not (order.overlap and memory_mode == "stage")


def _seconds(
    question: Question, cells: list[Cell], order: Order, counted: Profile, partition: tuple[int, ...]
) -> np.ndarray:
    """Seconds of a step, `[cells, modes, vocabularies]`."""
    number = cells[0].num_microbatches
    held, whole = _stage_kinds(question.model, partition)
    layers = np.stack([cell.layers for cell in cells])
    cut = _are_cut(question.model, partition, cells[0].mesh.pipe)
    layers = layers[..., :6] + (cut[:, None] * layers[..., 6:]) * np.array([1, 1, 1, 0, 0, 0])
    stages = np.einsum("sk,nmkj->nmsj", held, layers)
    pace = stages[..., :4] + stages[..., [4, 5, 5, 5]] * np.array([1, 1, 1, 0])
    kinds = [0, 2, 3] if counted.splits_backward else [0, 1]
    slowest = pace[..., kinds].sum(-1).argmax(-1)
    pace = np.take_along_axis(pace, slowest[..., None, None], axis=2)[:, :, 0]
    saved = np.zeros(pace.shape[:2])
    device = question.platform.device
    if order.overlap:
        forward, backward, sent, returned = (stages[..., i] for i in (0, 1, 4, 5))
        platform = question.platform
        saved = saved_seconds(platform, sent, backward) + saved_seconds(platform, returned, forward)
        saved = saved.min(-1)
    seconds = counted.seconds(np.concatenate([pace, saved[..., None]], axis=-1))
    transfers = counted.num_ticks * np.array([cell.transfer for cell in cells])
    outer = number * np.stack([cell.outer for cell in cells])
    seconds = (seconds + transfers[:, None])[..., None] + outer[:, None]
    if device.concurrent_devices is not None:
        work = np.einsum("k,nmkj->nmj", whole, layers) / cells[0].mesh.pipe
        seconds = np.maximum(
            seconds, _on_shared_cores(question, cells, work, kinds) + transfers[:, None, None]
        )
    return seconds + np.array([cell.step_end for cell in cells])[:, None, None]


def _on_shared_cores(question: Question, cells: list[Cell], work: np.ndarray, kinds: list[int]) -> np.ndarray:
    """Seconds that the cores of a host need for all its devices (`shared_cores`), `[cells, modes, vocabularies]`.

    Args:
      question: what is asked.
      cells: the cells.
      work: seconds of F, B, I, W and of the exchanges in F and B of a rank on average, `[cells, modes, 6]`.
      kinds: which of the first four a schedule has.
    """
    number, pipe = cells[0].num_microbatches, cells[0].mesh.pipe
    everybody = np.array([1 if place == "split" else 1 / pipe for place in vocabularies(question, pipe)])
    exchange = np.stack([cell.outer_exchange for cell in cells])
    outer = np.stack([cell.outer for cell in cells]) - exchange
    computed = work[..., kinds].sum(-1)[..., None] + (outer * everybody)[:, None]
    at_once = question.platform.device.together_seconds(0.0, question.num_devices * computed)
    return number * (at_once + work[..., 4:].sum(-1)[..., None] + exchange[:, None])


def _num_bytes(
    question: Question, cells: list[Cell], order: Order, counted: Profile, partition: tuple[int, ...], modes
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bytes that a device needs, and that a step takes, `[cells, modes, vocabularies]`; 0 in other modes.

    The third says where only what lasts was counted, since that does not fit.
    """
    pipe, number = cells[0].mesh.pipe, cells[0].num_microbatches
    placed = vocabularies(question, pipe)
    num_bytes = np.zeros((len(cells), len(memory_modes(question)), len(placed)))
    taken, is_least = np.zeros_like(num_bytes), np.zeros(num_bytes.shape, bool)
    options = dict(backend=memory_backend(question), reserve_bytes=question.platform.device.reserve_bytes)
    options["enough"] = capacity_bytes(question)
    common = dict(
        layers_per_stage=partition,
        num_microbatches=number,
        slots=counted.slots,
        overlap=order.overlap,
        gradient_dtype=question.wished.get("gradient_dtype", "float32"),
        is_straight=pipe == 1 and is_straight(order.schedule, number, order.asked_chunks),
    )
    positions = {mode: memory_modes(question).index(mode) for mode in sorted(modes, key=MEMORY_MODES.index)}
    for (i, cell), (k, vocabulary) in product(enumerate(cells), enumerate(placed)):
        sizes = dict(**cell.mesh._asdict(), share=cell.share, vocabulary=vocabulary, **common)
        least = 0.0
        for mode, j in positions.items():
            if least <= options["enough"]:
                memory = rank_memory(question.model, Layout(**sizes, memory_mode=mode), **options)
                num_bytes[i, j, k], taken[i, j, k] = memory.total, memory.taken
                # Modes from here on keep as much for backwards or more, but may leave less for weight gradients.
                least = memory.total - memory.taps if memory.is_least else 0.0
                is_least[i, j, k] = memory.is_least
            else:
                num_bytes[i, j, k], is_least[i, j, k] = least, True
    return num_bytes, taken, is_least


def memory_of(scores: Scores, row: int) -> RankMemory:
    """Bytes of a row on the rank that needs most."""
    question = scores.question
    ranks = estimate_memory(
        question.model,
        scores.plan(row),
        dtype=question.dtype,
        backend=memory_backend(question),
        reserve_bytes=question.platform.device.reserve_bytes,
    )
    return max(ranks, key=lambda rank: rank.total)


@lru_cache(maxsize=1024)
def _are_cut(model: ModelConfig, partition: tuple[int, ...], pipe: int) -> np.ndarray:
    """Whether a device has several layers of a kind, whose weights are slices, bool `[2 kinds]` as in `Cell.layers`."""
    most, chunks = most_layers_of_kind(model, partition), len(partition) // pipe
    return np.array([chunks * most[kind] > 1 for kind in (*model.kinds, *model.kinds)])


@lru_cache(maxsize=1024)
def _stage_kinds(model: ModelConfig, partition: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Layers of each kind on every different stage, `[stages, 2 kinds]`, and of the whole model, `[2 kinds]`.

    Those that are the last of their stage are counted apart, after all others.
    """
    names, kinds = model.kind_of_layer, list(model.kinds)
    held = np.zeros((len(partition), 2 * len(kinds)))
    layer = 0
    for stage, count in enumerate(partition):
        *others, last = names[layer : layer + count]
        for name in others:
            held[stage, kinds.index(name)] += 1
        held[stage, len(kinds) + kinds.index(last)] += 1
        layer += count
    held[-1, kinds.index(names[-1])] += model.prediction_layers
    return np.unique(held, axis=0), held.sum(0)
