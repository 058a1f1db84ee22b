"""Schedules by name or from a file: what `--schedule` accepts.

A builder is a function `(num_ranks, num_microbatches) -> Schedule`, with `num_chunks` as a third argument if
the number of stages per pipe rank is a choice. Adding one means adding an entry to `ENTRIES`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path

from piperjax.schedules.auto import auto
from piperjax.schedules.classic import gpipe, one_f_one_b
from piperjax.schedules.dualpipe import check as check_dualpipe_v
from piperjax.schedules.dualpipe import dualpipe_v
from piperjax.schedules.interleaved import check as check_interleaved
from piperjax.schedules.interleaved import interleaved
from piperjax.schedules.schedule import Schedule, loop_placement, parse, v_placement
from piperjax.schedules.v_shaped import v_half, v_min, zb_v
from piperjax.schedules.zero_bubble import zb_dual, zb_h1, zb_h2

FILE_ENDINGS = (".txt", ".csv")
Placement = tuple[tuple[int, ...], ...]


def _on_a_v(num_ranks: int, num_chunks: int) -> Placement:
    del num_chunks  # Down the ranks and back up: always 2.
    return v_placement(num_ranks)


@dataclass(frozen=True)
class Entry:
    """One named schedule.

    Attributes:
      builder: builds it.
      num_chunks: stages per pipe rank, or the default if they can be chosen.
      takes_chunks: whether the number can be chosen.
      check: refuses numbers `(num_ranks, num_microbatches, num_chunks)` that the builder cannot build.
      placement: stages of each rank by `(num_ranks, num_chunks)`; None where only the builder knows.
    """

    builder: Callable[..., Schedule]
    num_chunks: int = 1
    takes_chunks: bool = False
    check: Callable[[int, int, int], None] | None = None
    placement: Callable[[int, int], Placement] | None = loop_placement


ENTRIES = {
    "gpipe": Entry(gpipe),
    "one_f_one_b": Entry(one_f_one_b),
    "interleaved": Entry(interleaved, num_chunks=2, takes_chunks=True, check=check_interleaved),
    "zb_h1": Entry(zb_h1),
    "zb_h2": Entry(zb_h2),
    "zb_dual": Entry(zb_dual),
    "zb_v": Entry(zb_v, num_chunks=2, placement=_on_a_v),
    "v_half": Entry(v_half, num_chunks=2, placement=_on_a_v),
    "v_min": Entry(v_min, num_chunks=2, placement=_on_a_v),
    "dualpipe_v": Entry(dualpipe_v, num_chunks=2, check=check_dualpipe_v, placement=_on_a_v),
    "auto": Entry(auto, num_chunks=2, takes_chunks=True, placement=None),
}
ALIASES = {
    "1f1b": "one_f_one_b",
    "interleaved_1f1b": "interleaved",
    "zbh1": "zb_h1",
    "zbh2": "zb_h2",
    "zbdual": "zb_dual",
    "zbv": "zb_v",
    "vhalf": "v_half",
    "vmin": "v_min",
    "dualpipev": "dualpipe_v",
}


def names() -> tuple[str, ...]:
    """Names of all schedules that are built."""
    return tuple(ENTRIES)


def is_file(name: str) -> bool:
    """Whether a name means a schedule file: it ends in .txt or .csv, or holds a slash."""
    return name.endswith(FILE_ENDINGS) or "/" in name


def canonical(name: str) -> str:
    """The name itself, without aliases; a file's path stays as it is.

    Raises:
      ValueError: if no schedule has that name.
    """
    if is_file(name):
        return name
    plain = name.lower().replace("-", "_")
    plain = ALIASES.get(plain, plain)
    if plain not in ENTRIES:
        known = [*ENTRIES, *ALIASES]
        near = get_close_matches(plain, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"no schedule named {name!r}; schedules are {', '.join(ENTRIES)}, "
            f"or a file that ends in {' or '.join(FILE_ENDINGS)}{hint}"
        )
    return plain


def chunks_of(name: str, num_chunks: int = 0) -> int:
    """Stages per pipe rank of a schedule, before it is built; 0 asks for its own number.

    Raises:
      ValueError: if there is no such schedule or it has another number.
    """
    if is_file(name):
        return _agreed(name, read(name).num_chunks, num_chunks)
    name = canonical(name)
    entry = ENTRIES[name]
    if entry.takes_chunks:
        return num_chunks or entry.num_chunks
    return _agreed(name, entry.num_chunks, num_chunks)


def check(name: str, num_ranks: int, num_microbatches: int, num_chunks: int = 0) -> int:
    """Refuses what `build` would refuse, without building it; returns the stages per pipe rank.

    Raises:
      ValueError: if no schedule has that name, it does not exist for these numbers, or the file is broken.
    """
    if is_file(name):
        return _read_for(name, num_ranks, num_microbatches, num_chunks).num_chunks
    chunks, entry = chunks_of(name, num_chunks), ENTRIES[canonical(name)]
    if entry.check:
        entry.check(num_ranks, num_microbatches, chunks)
    return chunks


def placement(name: str, num_ranks: int, num_microbatches: int, num_chunks: int = 0) -> Placement:
    """Stages of each pipe rank in chunk order, without building the schedule where that can be known."""
    chunks = check(name, num_ranks, num_microbatches, num_chunks)
    entry = None if is_file(name) else ENTRIES[canonical(name)]
    if entry and entry.placement:
        return entry.placement(num_ranks, chunks)
    return build(name, num_ranks, num_microbatches, num_chunks).stage_of_chunk


def build(name: str, num_ranks: int, num_microbatches: int, num_chunks: int = 0) -> Schedule:
    """Builds a schedule by its name, or reads it from a file.

    Raises:
      ValueError: if no schedule has that name, it does not exist for these numbers, or the file is broken.
    """
    if is_file(name):
        return _read_for(name, num_ranks, num_microbatches, num_chunks)
    return _built(canonical(name), num_ranks, num_microbatches, chunks_of(name, num_chunks))


@lru_cache(maxsize=64)
def _built(name: str, num_ranks: int, num_microbatches: int, num_chunks: int) -> Schedule:
    # A plan asks for its schedule more than once, and `auto` takes seconds for hundreds of microbatches.
    entry = ENTRIES[name]
    if entry.takes_chunks:
        return entry.builder(num_ranks, num_microbatches, num_chunks)
    return entry.builder(num_ranks, num_microbatches)


def read(path: str) -> Schedule:
    """Reads a schedule file: one line of actions per pipe rank, separated by spaces or commas.

    Raises:
      ValueError: if the file cannot be read or holds no valid schedule.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(
            f"cannot read the schedule file {path}: {error.strerror}; built in are {', '.join(ENTRIES)}"
        ) from None
    except UnicodeDecodeError:
        raise ValueError(
            f"{path} is not text; a schedule file has one line of actions per pipe rank"
        ) from None
    return parse(text, name=path)


def _read_for(path: str, num_ranks: int, num_microbatches: int, num_chunks: int) -> Schedule:
    schedule = read(path)
    found = (schedule.num_ranks, schedule.num_microbatches)
    if found != (num_ranks, num_microbatches):
        raise ValueError(
            f"schedule {path!r} is for {found[0]} pipe ranks and {found[1]} microbatches, but the run has "
            f"{num_ranks} and {num_microbatches}; change the run or the file"
        )
    _agreed(path, schedule.num_chunks, num_chunks)
    return schedule


def _agreed(name: str, own: int, asked: int) -> int:
    if asked not in (0, own):
        stages = "one stage" if own == 1 else f"{own} stages"
        raise ValueError(f"schedule {name!r} has {stages} per pipe rank, got {asked}; leave the number out")
    return own
