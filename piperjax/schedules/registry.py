"""Schedules by name or from a file: what `--schedule` accepts."""

from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path

from piperjax.schedules.auto import auto
from piperjax.schedules.named import NAMED, Entry, Placement
from piperjax.schedules.schedule import Schedule, parse

FILE_ENDINGS = (".txt", ".csv")
ENTRIES = {**NAMED, "auto": Entry(auto, num_chunks=2, takes_chunks=True, placement=None)}
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
    return ENTRIES[name].build(num_ranks, num_microbatches, num_chunks)


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
