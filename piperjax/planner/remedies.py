"""Remedies: what to say when nothing fits, and the nearest that does."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import product
from math import inf
from typing import Any

import numpy as np

from models.config import ModelConfig
from piperjax.planner.candidates import AXES, Mesh, Question, Rejections, meshes, orders, vocabularies
from piperjax.planner.cells import layers_by_flop, memory_backend
from piperjax.planner.kept import Share
from piperjax.planner.memory import Layout, RankMemory, rank_memory
from piperjax.planner.scoring import Scores, capacity_bytes, memory_of, score
from piperjax.schedules.profile import Slots

GIB = 2**30
# A usual factor of buffers that are too small for some routings: rows that find no room travel later.
USUAL_CAPACITY_FACTOR = 1.25
SMALLER_BUFFERS = {"capacity_factor": USUAL_CAPACITY_FACTOR, "overflow": "passes"}
NARROW_GRADIENTS = {"gradient_dtype": "bfloat16"}
MOST_DOUBLINGS = 7
WORDS = {
    "compute_copy": "compute copy",
    "pipeline_buffers": "pipeline buffers",
    "stash": "activations in flight",
    "taps": "inputs kept for weight gradients",
    "dispatch": "dispatch buffers",
    "batch": "tokens of the step",
}


def concessions(wished: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """What is given up where nothing fits, that which costs least first; nothing that is wished for otherwise.

    Rows that travel later are lost no less than others. Sums of gradients in 16 bits are less exact, and so come after.
    """
    buffers = {} if "capacity_factor" in wished else SMALLER_BUFFERS
    gradients = {} if "gradient_dtype" in wished else NARROW_GRADIENTS
    found = (buffers, gradients, buffers | gradients)
    return tuple(one for number, one in enumerate(found) if one and one not in found[:number])


def check_room(question: Question, tried: Sequence[Scores], *, advise: bool = True) -> None:
    """Says how much the leanest plan lacks and what would fit, if nothing does.

    Args:
      question: what was asked.
      tried: scores of that, then of questions in which more and more was given up.
      advise: look for the nearest that fits.

    Raises:
      ValueError: if no candidate fits.
    """
    if any(scores.fits.any() for scores in tried):
        return
    advice = f"; {nearest_that_fits(question)}" if advise else ""
    asked = ", ".join(f"{name}={value}" for name, value in question.wished.items())
    devices = f"device{'s' * (question.num_devices > 1)}"
    where = f"{question.num_devices:,} {question.platform.name} {devices}" + (
        f" with {asked}" if asked else ""
    )
    if not any(len(scores.seconds) for scores in tried):
        chunks = (
            ", or dispatch_chunks does not divide the tokens" if "dispatch_chunks" in question.wished else ""
        )
        raise ValueError(
            f"no plan for {question.model.name} on {where} exists: its schedule does not fit the pipe ranks and "
            f"microbatches, or has more stages than the {question.model.num_layers} layers{chunks}{advice}"
        )
    found = [(scores, *scores.leanest(~scores.fits)) for scores in tried]
    scores, row, _ = min(found, key=lambda one: one[2])
    memory = memory_of(scores, row)
    lacking = memory.total - capacity_bytes(question)
    conceded = {name: scores.question.wished.get(name) for name in SMALLER_BUFFERS | NARROW_GRADIENTS}
    given_up = _flags({name: value for name, value in conceded.items() if value != question.wished.get(name)})
    words = f"the leanest plan ({', '.join(filter(None, [str(scores.meshes[scores.mesh[row]]), given_up]))})"
    raise ValueError(
        f"{question.model.name} does not fit {where}: {words} needs "
        f"{memory.total / GIB:.1f} GiB, {lacking / GIB:.1f} more than a device has; largest: {largest_terms(memory)}"
        f"{advice}"
    )


def largest_terms(memory: RankMemory, *, count: int = 3) -> str:
    """The largest parts in words."""
    terms = sorted(memory.terms.items(), key=lambda item: -item[1])[:count]
    return ", ".join(f"{WORDS.get(name, name)} {num_bytes / GIB:.1f}" for name, num_bytes in terms)


def nearest_that_fits(question: Question) -> str:
    """Advice: the least change of the question under which something fits."""
    for changed, words in _relaxed(question):
        mesh = _leanest_mesh(changed, near=question)
        if mesh is not None:
            return f"{words.format(mesh=mesh)} fits"
    reach = question.platform.links[-1].devices if question.platform.links else question.num_devices
    given = _given_up(question.wished)
    for doubling in range(1, MOST_DOUBLINGS + 1):
        devices = question.num_devices * 2**doubling
        if devices > reach:
            break
        more = replace(question, num_devices=devices, batch_size=question.batch_size * 2**doubling, wished={})
        for wished in ({}, *given):
            mesh = _leanest_mesh(replace(more, wished=wished), near=question)
            if mesh is not None:
                words = f" with {_flags(wished)}" if wished else ""
                return f"{devices:,} devices{words} are enough ({mesh})"
    return "use a smaller model, shorter sequences or devices with more memory"


def _relaxed(question: Question) -> Iterator[tuple[Question, str]]:
    """Questions with less wished for, or with something given up, and words for each."""
    axes = {name: value for name, value in question.wished.items() if name in AXES}
    others = _without_axes(question)
    conceded = SMALLER_BUFFERS | NARROW_GRADIENTS
    dropped = ", ".join(f"{name}={value}" for name, value in others.items() if name not in conceded)
    given = _given_up(others)
    if dropped:
        yield replace(question, wished=axes), f"without {dropped}, {{mesh}}"
    if axes:
        yield replace(question, wished=others), "{mesh}"
    for change in given:
        words = f"with {_flags(change)}, {{mesh}}"
        if change.items() - others.items():
            yield replace(question, wished=dict(question.wished) | change), words
            if axes:
                yield replace(question, wished=others | change), words
        if dropped and axes:
            yield replace(question, wished=change), f"without {dropped}, {words}"


def _given_up(wished: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """What may be given up, with what is given up already; a wish for float32, or for no capacity limit, is as well."""
    kept = {}
    if wished.get("capacity_factor"):
        kept |= {name: wished[name] for name in SMALLER_BUFFERS if name in wished}
    if wished.get("gradient_dtype", "float32") != "float32":
        kept["gradient_dtype"] = wished["gradient_dtype"]
    return tuple(kept | one for one in concessions(kept)) or (kept,)


def _flags(limit: dict) -> str:
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in limit.items())


def least_bytes(question: Question, mesh: Mesh) -> float:
    """Bytes on a device that no plan on a mesh does without: its parameters, their moments, copies and gradients.

    What does not even hold these need not be searched, and that is most of what is too small by far.
    """
    stages = frozenset(mesh.pipe * order.num_chunks for order in orders(question, mesh.pipe))
    lasting = _least_lasting(
        question.model,
        mesh,
        (question.seq_len, question.dtype, question.wished.get("gradient_dtype", "float32")),
        stages,
        tuple(vocabularies(question, mesh.pipe)),
        memory_backend(question),
    )
    return lasting + question.platform.device.reserve_bytes


@lru_cache(maxsize=4096)
def _least_lasting(
    model: ModelConfig,
    mesh: Mesh,
    numbers: tuple[int, str, str],
    stages: frozenset[int],
    placed: tuple[str, ...],
    backend: str,
) -> float:
    """Least bytes over numbers of stages and vocabularies, given sequence length, dtype, and dtype of gradients."""
    seq_len, dtype, gradient_dtype = numbers
    share = Share(sequences=0, seq_len=seq_len, expert=mesh.expert, dtype=dtype)
    least = inf
    for num_stages, vocabulary, is_straight in product(
        stages, placed, (False, True) if mesh.pipe == 1 else (False,)
    ):
        layout = Layout(
            **mesh._asdict(),
            layers_per_stage=layers_by_flop(model, seq_len, num_stages),
            num_microbatches=1,
            share=share,
            slots=Slots(0, 0, 0, 0),
            vocabulary=vocabulary,
            gradient_dtype=gradient_dtype,
            is_straight=is_straight,
        )
        memory = rank_memory(model, layout, backend=backend, enough=0.0)
        least = min(least, memory.parameters + memory.moments + memory.compute_copy + memory.gradients)
    return least


def _without_axes(question: Question) -> dict:
    return {name: value for name, value in question.wished.items() if name not in AXES}


def _leanest_mesh(question: Question, *, near: Question) -> Mesh | None:
    """Of the meshes on which something fits, the one closest to the wished sizes."""
    rejections, room = Rejections(), capacity_bytes(question)
    possible = [mesh for mesh in meshes(question, rejections) if least_bytes(question, mesh) <= room]
    if not possible:
        return None
    scores = score(question, possible, rejections)
    if not scores.fits.any():
        return None
    wanted = {axis: near.wished[axis] for axis in AXES if axis in near.wished}
    rows = np.flatnonzero(scores.fits)
    quickest: dict[int, float] = {}
    for index, seconds in zip(scores.mesh[rows], scores.seconds[rows], strict=True):
        quickest[index] = min(seconds, quickest.get(index, seconds))
    best = min(quickest, key=lambda index: (scores.meshes[index].distance(wanted), quickest[index]))
    return scores.meshes[best]
