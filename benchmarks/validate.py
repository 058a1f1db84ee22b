"""The time model against published throughput.

    python -m benchmarks.validate                       the rows beside this file, one per configuration and source
    python -m benchmarks.validate FILE.jsonl ...        others, of the forms that records.py and frontier.py read
    python -m benchmarks.validate --one-release ...     as if software had not changed between releases

Every row is predicted, or listed with the reason why it is not. Exit status 0: all bars are met; 1: some are missed; 2:
there was nothing to predict.

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
from typing import Any, NamedTuple

import numpy as np

from benchmarks.frameworks import predict
from benchmarks.frontier import FORWARD, Outcome, outcomes
from benchmarks.record import Record, UnknownRowError, platform_of
from benchmarks.records import BRIDGE_STREAMS, read

GOLDEN = Path(__file__).parent / "published.jsonl"
MEDIAN_ERROR = 0.10
RANK_CORRELATION = 0.9
# Fewer rows than this say nothing about their order.
FEWEST_TO_RANK = 3


# Where a row says nothing of its machine, or names one that no file describes.
NO_PLATFORM = "no known platform"


class Line(NamedTuple):
    """A line of a file.

    Attributes:
      place: the file's name and the line, "name:number".
      row: what it says; a text if it is not JSON.
    """

    place: str
    row: Any


class LeftOut(NamedTuple):
    """A row that was not predicted, or not in full.

    Attributes:
      place: where it is.
      platform: its machine, or `NO_PLATFORM`.
      reason: why.
    """

    place: str
    platform: str
    reason: str


@dataclass
class Results:
    """What was priced, and what was not.

    Attributes:
      measured: by platform, (record, predicted) in the record's unit.
      others: rows of Frontier.
      left_out: the rest.
    """

    measured: dict[str, list[tuple[Record, float]]] = field(default_factory=lambda: defaultdict(list))
    others: list[Outcome] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)

    @property
    def reasons(self) -> Counter:
        """Numbers of rows left out, by platform and reason."""
        return Counter((left.platform, left.reason) for left in self.left_out)


def evaluate(rows: Iterable[Any], *, one_release: bool = False) -> Results:
    """Prices every row that can be understood; rows may be a file's lines."""
    results, seen = Results(), {}
    for number, given in enumerate(rows, 1):
        place, row = given if isinstance(given, Line) else Line(f"row:{number}", given)
        text = json.dumps(row, sort_keys=True)
        if not isinstance(row, dict):
            results.left_out.append(LeftOut(place, NO_PLATFORM, "not a JSON object"))
        elif text in seen:
            results.left_out.append(LeftOut(place, _platform_name(row), "the same as a row before it"))
        else:
            reasons = _evaluate_row(row, results, one_release)
            results.left_out += [LeftOut(place, _platform_name(row), reason) for reason in reasons]
        seen[text] = place
    return results


def _evaluate_row(row: dict, results: Results, one_release: bool) -> list[str]:
    """Adds what is predicted to the results; returns the reasons for what is not."""
    try:
        record = read(row)
        results.measured[record.platform].append((record, _predicted(record, one_release)))
        return []
    except UnknownRowError as unknown:
        reason, number = str(unknown), len(results.others)
    try:
        results.others += outcomes(row)
    except UnknownRowError as unknown:
        return [reason if "not a form" in str(unknown) else str(unknown)]
    except KeyError as error:
        return [f"the row has no field {error}"]
    except (TypeError, ValueError) as error:
        return [str(error)]
    return [] if len(results.others) > number else ["a row that measures nothing"]


def _platform_name(row: dict) -> str:
    try:
        return platform_of(row.get("platform") or row.get("hw")).name
    except UnknownRowError:
        return NO_PLATFORM


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


def summarise(pairs: Sequence[tuple[Record | Outcome, float]]) -> tuple[float, float]:
    """Median absolute error and rank correlation of one platform, or of the profiles of layers on it."""
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
        missed = outcome.is_judged and not outcome.is_met
        met &= not missed
        values = _shown(outcome)
        print(
            f"  {outcome.kind:<14}{outcome.label:<50}{values}  {'MISSED  ' if missed else ''}{outcome.note}"
        )
    _print_left_out(results.left_out)
    left = {name: _summed(results, name) for name in dict.fromkeys(name for name, _ in results.reasons)}
    for platform, pairs in sorted(results.measured.items()):
        met &= _judge_together(f"{platform:<14}", pairs, f"; {left.pop(platform, 'none left out')}")
    if profiles := [(outcome, outcome.predicted) for outcome in results.others if outcome.kind == FORWARD]:
        met &= _judge_together(f"frontier {FORWARD}", profiles)
    for kind in dict.fromkeys(outcome.kind for outcome in results.others if outcome.is_judged):
        of_kind = [outcome for outcome in results.others if outcome.kind == kind]
        good = sum(outcome.is_met for outcome in of_kind)
        print(
            f"bar 3 frontier {kind}: {good} of {len(of_kind)} rows: {'met' if good == len(of_kind) else 'MISSED'}"
        )
    for platform, text in sorted(left.items()):
        print(f"{platform}: {text}")
    return met


def _judge_together(name: str, pairs: Sequence[tuple[Record | Outcome, float]], more: str = "") -> bool:
    """Prints the errors of rows of one kind; returns whether they are within the bars."""
    error, correlation = summarise(pairs)
    ranked = len(pairs) >= FEWEST_TO_RANK and not np.isnan(correlation)
    fine = error <= MEDIAN_ERROR and (not ranked or correlation >= RANK_CORRELATION)
    shown = f"{correlation:.3f}" if ranked else "too few"
    print(
        f"bar 3 {name} {len(pairs):3} rows: median error {error:6.1%} (bar {MEDIAN_ERROR:.0%}), rank "
        f"correlation {shown} (bar {RANK_CORRELATION}): {'met' if fine else 'MISSED'}{more}"
    )
    return fine


def _print_left_out(left_out: Sequence[LeftOut]) -> None:
    """Every row that is left out, those of one reason together."""
    places = defaultdict(list)
    for left in left_out:
        places[left.platform, left.reason].append(left.place)
    for (platform, reason), where in sorted(places.items(), key=lambda item: -len(item[1])):
        print(f"\nleft out {len(where)} of {platform}: {reason}: {', '.join(_ranges(where))}", end="")
    print("\n")


def _ranges(places: Sequence[str]) -> list[str]:
    """Places, those that follow each other as one: "a.jsonl:3-5"."""
    found: list[tuple[str, int, int]] = []
    for place in places:
        file, _, line = place.rpartition(":")
        if found and found[-1][0] == file and found[-1][2] == int(line) - 1:
            found[-1] = (file, found[-1][1], int(line))
        else:
            found.append((file, int(line), int(line)))
    return [f"{file}:{first}" + f"-{last}" * (last > first) for file, first, last in found]


def _summed(results: Results, platform: str) -> str:
    """How many rows of a platform are left out, and why."""
    reasons = {reason: number for (name, reason), number in results.reasons.most_common() if name == platform}
    listed = "; ".join(f"{number} {reason}" for reason, number in reasons.items())
    return f"{sum(reasons.values())} left out: {listed}"


def _shown(outcome: Outcome) -> str:
    if outcome.kind == "fits":
        words = {1.0: "ran", 0.0: "no memory"}
        return f"{words[outcome.published]:>12}{words[outcome.predicted]:>11}{'':8}"
    return f"{outcome.published:12.2f}{outcome.predicted:11.2f}{outcome.ratio:8.2f}"


def load(path: Path) -> list[Line]:
    """Lines of a .jsonl file that are not empty; one that is not JSON stays a text.

    Raises:
      ValueError: if the file cannot be read; the sentence names it.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"cannot read {path}: {getattr(error, 'strerror', None) or 'it is not text'}"
        ) from None
    return [
        Line(f"{path.name}:{number}", _parsed(line)) for number, line in enumerate(lines, 1) if line.strip()
    ]


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        return line


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
    results = evaluate(rows, one_release=args.one_release)
    met = report(results)
    if not results.measured and not results.others:
        files = ", ".join(map(str, args.files))
        print(f"nothing could be predicted: {len(rows)} rows in {files}", file=sys.stderr)
        return 2
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
