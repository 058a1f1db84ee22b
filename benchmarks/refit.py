"""How well rows are predicted that nothing was fitted to: constants fitted again without them, from plain beginnings.

    python -m benchmarks.refit                          two random halves, each predicted by the other
    python -m benchmarks.refit --without model          each model predicted by the others; also release
    python -m benchmarks.refit --seed 1 FILE.jsonl ...  other halves, of other rows

The fit knows the rows that `benchmarks.validate` compares, and data sheets. It begins from the same constants for all
platforms and stays near them unless rows say otherwise: how much of their peaks products, attention, memory and
links reach and how many rows a product needs, by platform; what is no product, by release of Megatron Bridge and for
other frameworks; what exchanges show. A release without rows is as fast as the last one before it, or as the first.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from math import exp, log
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.frameworks import predict
from benchmarks.record import Record, UnknownRowError
from benchmarks.records import BRIDGE_HOPPER_RELEASE, DROPPING, bridge_release, read
from benchmarks.validate import GOLDEN, load, rank_correlation
from meshes.platform import Platform

# Where the fit begins, for every platform and framework.
BEGINNING = {"products": 0.7, "attention": 0.45, "memory": 0.85, "links": 0.8, "rows": 256.0}
BEGINNING |= {"streams": 2.0, "exposed": 0.9, "host": 5e-3}
# Usual distance, in logarithms, of a constant from there, which counts as much as such an error of one row. Of rows and
# of the host's seconds only the order of magnitude is known.
USUAL_ERROR, USUAL_DISTANCE = 0.1, 0.5
WIDE = {"rows": 2.0, "host": 2.0}
STEPS = (1.0, 0.3, 0.3, 0.1, 0.1, 0.03)
SWEEPS = 3
LEAST_ROWS = 4

Constants = dict[tuple[str, str], float]  # By platform, release or framework, and name.
_variants = count()


@dataclass(frozen=True, kw_only=True)
class Row:
    """A measurement and what it may be grouped by.

    Attributes:
      record: what was measured.
      framework: who ran it.
      release: of Megatron Bridge, or what replaces it: habits that share one number.
    """

    record: Record
    framework: str
    release: str

    @property
    def keys(self) -> list[tuple[str, str]]:
        """Constants that its prediction needs."""
        keys = [(self.record.platform, name) for name in ("products", "attention", "memory", "links", "rows")]
        software = self.record.run.software
        keys.append((self.release, "streams"))
        if software.exposed < 1:  # Frameworks that hide nothing of their exchanges have nothing to fit.
            keys.append((f"{self.framework} on {self.record.platform}", "exposed"))
        return [*keys, (self.framework, "host")] if software.host_seconds else keys


def rows_of(given: Sequence[Any]) -> Iterator[Row]:
    """Rows of throughput with known parallelism."""
    for row in given:
        try:
            record = read(row)
        except (UnknownRowError, AttributeError):
            continue
        source = str(row.get("source") or row.get("src") or "")
        release, software = bridge_release(source), record.run.software
        if record.platform.startswith("h"):
            release = min(release, BRIDGE_HOPPER_RELEASE)
        framework = "Bridge" if release else source.split(",", maxsplit=1)[0]
        waits = "waits for counts" if software.streams > 1 else "does not wait"
        habits = f"Bridge {release}" if release and software != DROPPING else f"{framework}, {waits}"
        yield Row(record=record, framework=framework, release=habits)


class Parts(NamedTuple):
    """Parts of a step, over its published seconds, by the constants of the beginning that they are proportional to.

    Attributes:
      products: products as if they had all the rows that they need; `rows` is what they lack of that.
      rows, attention, memory, links: parts by these.
      rest: what depends on nothing that is fitted.
      host_rest, host: of a step that waits for the host in every layer: what does not depend on it, and what does.
    """

    products: float
    rows: float
    attention: float
    memory: float
    links: float
    rest: float
    host_rest: float
    host: float


def parts(row: Row) -> Parts:
    """Parts of a row, from what changes when a constant does."""

    def seconds(**changes: float) -> float:
        constants = {key: BEGINNING[key[1]] * changes.get(key[1], 1.0) for key in row.keys}
        return row.record.published / predicted(row, constants)

    def device(**changes: float) -> float:
        return seconds(host=1e-6, **changes)

    # At half the rate a part is there twice.
    at, rows = device(), device(rows=2.0) - device()
    part = {name: device(**{name: 0.5}) - at for name in ("products", "attention", "memory", "links")}
    waits, longer = (seconds(host=host) for host in (1e3, 2e3))
    is_bound = row.record.run.software.host_seconds > 0
    return Parts(
        **part | {"products": part["products"] - rows},
        rows=rows,
        rest=at - sum(part.values()),
        host_rest=(2 * waits - longer) * is_bound,
        host=(longer - waits) / 1e3,
    )


def fitted(rows: Sequence[Row], known: Mapping[int, Parts]) -> Constants:
    """Constants that predict the rows best, by coordinates, each a little further from where all begin."""
    constants = {key: BEGINNING[key[1]] for row in rows for key in row.keys}
    cost = _cost(rows, known, constants)
    for step in STEPS * SWEEPS:
        for key in list(constants):
            for factor in (exp(step), exp(-step)):
                tried = constants | {key: constants[key] * factor}
                found = _cost(rows, known, tried)
                if found < cost:
                    constants, cost = tried, found
                    break
    return constants


def _cost(rows: Sequence[Row], known: Mapping[int, Parts], constants: Constants) -> float:
    distances = sum(
        (log(v / BEGINNING[name]) / WIDE.get(name, USUAL_DISTANCE)) ** 2 for (_, name), v in constants.items()
    )
    errors = sum(abs(log(_seconds(row, known[id(row)], constants))) for row in rows)
    return errors / USUAL_ERROR + distances


def _seconds(row: Row, part: Parts, constants: Constants) -> float:
    """Seconds of a step over the published ones, by its parts."""
    over = {name: constants[owner, name] / BEGINNING[name] for owner, name in row.keys}
    whole = {
        name: min(over[name], 1 / BEGINNING[name]) for name in ("products", "attention", "memory", "links")
    }
    device = (
        (part.products + part.rows * over["rows"]) / whole["products"]
        + part.attention / whole["attention"]
        + part.memory * over["streams"] / whole["memory"]
        + part.links * over.get("exposed", 1.0) / whole["links"]
        + part.rest
    )
    return max(device, part.host_rest + part.host * over.get("host", 0.0))


def predicted(row: Row, constants: Constants) -> float:
    """Predicts a row, in its unit; a constant that no row was fitted to is that of the nearest kind."""
    at = dict(zip((name for _, name in row.keys), (_known(key, constants) for key in row.keys), strict=True))
    run = row.record.run
    rates = tuple(at[name] for name in ("products", "attention", "memory", "links", "rows"))
    software = run.software._replace(streams=at["streams"])
    software = software._replace(
        exposed=at.get("exposed", software.exposed), host_seconds=at.get("host", software.host_seconds)
    )
    found = predict(replace(run, platform=_platform(run.platform, rates), software=software))
    return found.tokens_per_second if row.record.unit == "tokens/s" else found.flop_per_second / 1e12


def _known(key: tuple[str, str], constants: Constants) -> float:
    owner, name = key
    if key in constants:
        return constants[key]
    alike = sorted(o for o, n in constants if n == name and o.split()[0] == owner.split()[0])
    if not alike:
        return BEGINNING[name]
    return constants[max((o for o in alike if o <= owner), default=alike[0]), name]


_made: dict[tuple[str, tuple[float, ...]], Platform] = {}


def _platform(platform: Platform, rates: tuple[float, ...]) -> Platform:
    """The platform with these rates, under a name of its own: prices are remembered by name."""
    key = platform.name, rates
    if key not in _made:
        products, attention, memory, links, rows = rates
        device = platform.device

        def reached(table: Mapping[str, float], best: float) -> dict[str, float]:
            return {dtype: min(1.0, best) for dtype in table}

        def thinner(table):
            return replace(table, efficiency=reached(table.efficiency, products), half_rows=rows)

        backward = 0.8 * attention  # As of FlashAttention.
        device = replace(
            device,
            matmul=thinner(device.matmul),
            grouped_matmul=thinner(device.grouped_matmul),
            attention=replace(
                device.attention,
                forward_efficiency=reached(device.attention.forward_efficiency, attention),
                backward_efficiency=reached(device.attention.backward_efficiency, backward),
            ),
            memory_efficiency=min(1.0, memory),
        )
        _made[key] = replace(
            platform,
            name=f"{platform.name}-{next(_variants)}",
            device=device,
            links=tuple(replace(link, efficiency=min(1.0, links)) for link in platform.links),
        )
    return _made[key]


def halves(rows: Sequence[Row], seed: int) -> list[tuple[str, list[Row]]]:
    """Two random halves of each platform's rows, as what to leave out."""
    rng = np.random.default_rng(seed)
    parts: tuple[list[Row], list[Row]] = ([], [])
    for platform in sorted({row.record.platform for row in rows}):
        of = [row for row in rows if row.record.platform == platform]
        for place, index in enumerate(rng.permutation(len(of))):
            parts[place % 2].append(of[index])
    return [("one half", parts[0]), ("other half", parts[1])]


def by(name: Callable[[Row], str], rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Rows that share a name, as what to leave out."""
    return [(n, [row for row in rows if name(row) == n]) for n in sorted({name(row) for row in rows})]


WAYS: dict[str, Callable[[Sequence[Row], int], list[tuple[str, list[Row]]]]] = {
    "half": halves,
    "model": lambda rows, _: by(lambda row: row.record.run.model.name, rows),
    "release": lambda rows, _: by(lambda row: row.release, rows),
}


def compare(
    rows: Sequence[Row], known: Mapping[int, Parts], left_out: Sequence[tuple[str, list[Row]]]
) -> dict[str, list[tuple[Row, float]]]:
    """By platform, rows with what was predicted without them; and prints the parts."""
    found: dict[str, list[tuple[Row, float]]] = {}
    for name, without in left_out:
        outside = {id(row) for row in without}
        constants = fitted([row for row in rows if id(row) not in outside], known)
        for row in without:
            found.setdefault(row.record.platform, []).append((row, predicted(row, constants)))
        errors = [abs(predicted(row, constants) / row.record.published - 1) for row in without]
        print(f"without {name:<28} {len(without):3} rows: median error {statistics.median(errors):6.1%}")
    return found


def main() -> int:
    """Prints the errors of rows that were left out, by platform."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path, default=[GOLDEN], help="rows, one JSON object a line")
    parser.add_argument("--without", choices=WAYS, default="half", help="what is left out at a time")
    parser.add_argument("--seed", type=int, default=0, help="of the halves")
    args = parser.parse_args()
    try:
        rows = list(rows_of([line.row for path in args.files for line in load(path)]))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if len(rows) < LEAST_ROWS:
        print(
            f"a fit needs at least {LEAST_ROWS} rows with known parallelism, found {len(rows)}",
            file=sys.stderr,
        )
        return 2
    known = {id(row): parts(row) for row in rows}
    everything = partial(predicted, constants=fitted(rows, known))
    for platform, pairs in sorted(compare(rows, known, WAYS[args.without](rows, args.seed)).items()):
        published = [row.record.published for row, _ in pairs]
        values = [value for _, value in pairs]
        error = statistics.median(abs(b / a - 1) for a, b in zip(published, values, strict=True))
        known = statistics.median(abs(everything(row) / row.record.published - 1) for row, _ in pairs)
        print(
            f"{platform:<14} {len(pairs):3} rows: median error {error:6.1%}, rank correlation "
            f"{rank_correlation(published, values):.3f}; fitted to all of them {known:6.1%}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
