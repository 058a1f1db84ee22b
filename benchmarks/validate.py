"""The time model against published throughput.

    python -m benchmarks.validate                       the rows beside this file, one per configuration and source
    python -m benchmarks.validate FILE.jsonl ...        others, of the forms that records.py and frontier.py read
    python -m benchmarks.validate --one-release ...     as if software had not changed between releases

One set of platform files prices every row. Bars: per platform a median absolute error of 10 % and a rank correlation of
0.9; single layers and known plans on Frontier 20 %; plans that are not published between 1 and 1.5 times what was
reached; and what ran out of memory predicted to.
"""

import argparse
import json
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.frameworks import predict
from benchmarks.frontier import Outcome, outcomes
from benchmarks.records import BRIDGE_STREAMS, Record, UnknownRowError, read

GOLDEN = Path(__file__).parent / "published.jsonl"
MEDIAN_ERROR = 0.10
RANK_CORRELATION = 0.9
# Fewer rows than this say nothing about their order.
FEWEST_TO_RANK = 3


@dataclass
class Results:
    """What was priced, and what was not.

    Attributes:
      measured: by platform, (record, predicted) in the record's unit.
      others: rows of Frontier.
      skipped: numbers of rows by reason.
    """

    measured: dict[str, list[tuple[Record, float]]] = field(default_factory=lambda: defaultdict(list))
    others: list[Outcome] = field(default_factory=list)
    skipped: Counter = field(default_factory=Counter)


def evaluate(rows: Iterable[Any], *, one_release: bool = False) -> Results:
    """Prices every row that can be understood."""
    results = Results()
    for row in rows:
        if not isinstance(row, dict):
            results.skipped["not a JSON object"] += 1
            continue
        try:
            record = read(row)
            value = _predicted(record, one_release)
        except UnknownRowError as unknown:
            _try_frontier(row, results, reason=str(unknown))
        else:
            results.measured[record.platform].append((record, value))
    return results


def _try_frontier(row: dict, results: Results, *, reason: str) -> None:
    try:
        found = list(outcomes(row))
    except UnknownRowError as unknown:
        results.skipped[reason if "not a form" in str(unknown) else str(unknown)] += 1
    except (KeyError, TypeError, ValueError) as error:
        results.skipped[f"incomplete: {error}"] += 1
    else:
        results.others += found
        if not found:
            results.skipped["a row that measures nothing"] += 1


def _predicted(record: Record, one_release: bool) -> float:
    run = record.run
    if one_release:
        middle = statistics.median(BRIDGE_STREAMS.values())
        run = replace(run, software=run.software._replace(streams=middle))
    try:
        found = predict(run)
    except ValueError as error:
        raise UnknownRowError(str(error)) from None
    return found.tokens_per_second if record.unit == "tokens/s" else found.flop_per_second / 1e12


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's: correlation of the ranks, equal values sharing the mean of theirs."""
    ranks = [_ranks(np.asarray(values, float)) for values in (a, b)]
    if any(np.ptp(r) == 0 for r in ranks):
        return float("nan")
    return float(np.corrcoef(*ranks)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    smaller = (values[:, None] > values[None, :]).sum(axis=1)
    equal = (values[:, None] == values[None, :]).sum(axis=1)
    return smaller + (equal - 1) / 2


def summarise(pairs: Sequence[tuple[Record, float]]) -> tuple[float, float]:
    """Median absolute error and rank correlation of one platform."""
    published = [record.published for record, _ in pairs]
    predicted = [value for _, value in pairs]
    error = statistics.median(abs(b / a - 1) for a, b in zip(published, predicted, strict=True))
    return error, rank_correlation(published, predicted)


def report(results: Results) -> bool:
    """Prints everything; returns whether all bars are met."""
    met = True
    for platform, pairs in sorted(results.measured.items()):
        print(f"\n{platform:<64}{'published':>12}{'predicted':>11}{'error':>8}")
        for record, value in pairs:
            error = value / record.published - 1
            print(f"  {record.label:<62}{record.published:12,.0f}{value:11,.0f}{error:+8.0%}  {record.unit}")
    if results.others:
        print(f"\n{'Frontier':<64}{'published':>12}{'predicted':>11}{'ratio':>8}")
    for outcome in results.others:
        met &= outcome.is_met
        values = _shown(outcome)
        print(
            f"  {outcome.kind:<14}{outcome.label:<50}{values}  {'' if outcome.is_met else 'MISSED  '}{outcome.note}"
        )
    for reason, number in results.skipped.most_common():
        print(f"\nskipped {number}: {reason}", end="")
    print("\n")
    for platform, pairs in sorted(results.measured.items()):
        error, correlation = summarise(pairs)
        ranked = len(pairs) >= FEWEST_TO_RANK and not np.isnan(correlation)
        fine = error <= MEDIAN_ERROR and (not ranked or correlation >= RANK_CORRELATION)
        met &= fine
        shown = f"{correlation:.3f}" if ranked else "too few"
        print(
            f"bar 3 {platform:<14} {len(pairs):3} rows: median error {error:6.1%} (bar {MEDIAN_ERROR:.0%}), rank "
            f"correlation {shown} (bar {RANK_CORRELATION}): {'met' if fine else 'MISSED'}"
        )
    for kind in dict.fromkeys(outcome.kind for outcome in results.others):
        of_kind = [outcome for outcome in results.others if outcome.kind == kind]
        good = sum(outcome.is_met for outcome in of_kind)
        print(
            f"bar 3 frontier {kind}: {good} of {len(of_kind)} rows: {'met' if good == len(of_kind) else 'MISSED'}"
        )
    return met


def _shown(outcome: Outcome) -> str:
    if outcome.kind == "fits":
        words = {1.0: "ran", 0.0: "no memory"}
        return f"{words[outcome.published]:>12}{words[outcome.predicted]:>11}{'':8}"
    return f"{outcome.published:12.2f}{outcome.predicted:11.2f}{outcome.ratio:8.2f}"


def load(path: Path) -> list[Any]:
    """Rows of a .jsonl file.

    Raises:
      ValueError: if the file cannot be read or a line is not JSON; the sentence names it.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"cannot read {path}: {getattr(error, 'strerror', None) or 'it is not text'}"
        ) from None
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}, is not JSON: {error.msg}") from None
    return rows


def main() -> int:
    """Prints the comparison and says whether the bars are met."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "files", nargs="*", type=Path, default=[GOLDEN], help="measurements, one JSON object a line"
    )
    parser.add_argument("--one-release", action="store_true", help="one software efficiency for all releases")
    args = parser.parse_args()
    try:
        rows = [row for path in args.files for row in load(path)]
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return not report(evaluate(rows, one_release=args.one_release))


if __name__ == "__main__":
    sys.exit(main())
