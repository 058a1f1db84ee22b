"""`python -m piperjax plan`: the best plans for a model on a machine, why, and why not others."""

import argparse
import json
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from meshes.platform import known_platforms, load_platform
from models.presets import PRESETS, named_model
from piperjax.planner import report
from piperjax.planner.candidates import WISHES, Question
from piperjax.planner.dispatchers import OVERFLOW
from piperjax.planner.explain import explain, variations
from piperjax.planner.network import DISPATCHERS
from piperjax.planner.plan import GRADIENT_DTYPES
from piperjax.planner.remedies import USUAL_CAPACITY_FACTOR
from piperjax.planner.report_page import html_page
from piperjax.planner.search import KEPT, SearchResult, answer
from piperjax.planner.text_file import write_text

DEFAULT_SEQ_LEN = 4096
# Of the batch, where none is given: what a device gets per step, and what a step has at most. DeepSeek-V3 was trained
# with 63 million tokens per step (arXiv:2412.19437).
TOKENS_PER_DEVICE = 2**14
MOST_TOKENS_PER_STEP = 2**26
DESCRIPTION = """\
Prices every mesh, schedule, number of microbatches, memory mode and dispatcher in seconds and bytes, and prints the
quickest that fit, what each is spent on, and why others lost. Needs no device of the machine that it plans for."""
EPILOG = """\
columns: microb. = microbatches of a step; memory = what forward keeps for backward; x2 after a dispatcher = chunks;
places = rows that a device accepts at a time, over the balanced number (capacity factor), or all; vocab. = where
embedding and head are; MFU = useful FLOP/s over the peak; bubble, a2a = share of the step in which ranks idle, or wait
for all-to-alls; +- = how far off the seconds may be, mostly alike for all plans.

examples:
  python -m piperjax plan --model deepseek_v3 --platform frontier --devices 1024 --explain pipe=8,expert=32
  python -m piperjax plan --model mixtral_8x7b --platform h100_pod --devices 64 --html report.html
  python -m piperjax plan --model small --platform mine.toml --devices 8 --batch 32 --seq 512 --out plan.json"""
FLAGS = {
    "pipe": "pipe",
    "expert": "expert",
    "data_parallel": "data",
    "schedule": "schedule",
    "chunks": "num_chunks",
    "microbatches": "num_microbatches",
    "memory_mode": "memory_mode",
    "vocabulary": "vocabulary",
    "dispatch": "dispatch",
    "dispatch_chunks": "dispatch_chunks",
    "capacity_factor": "capacity_factor",
    "overflow": "overflow",
    "gradient_dtype": "gradient_dtype",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `plan`."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", required=True, help=f"{', '.join(PRESETS)}, or a .json file")
    parser.add_argument(
        "--platform", required=True, help=f"{', '.join(known_platforms())}, or a .toml file of your own"
    )
    parser.add_argument("--devices", type=int, required=True, metavar="N", help="devices to use, all of them")
    parser.add_argument(
        "--batch",
        type=int,
        metavar="N",
        help=f"sequences per step (default {TOKENS_PER_DEVICE:,} tokens per device, at most {MOST_TOKENS_PER_STEP:,} "
        "per step, at least a sequence per device)",
    )
    parser.add_argument(
        "--seq",
        type=int,
        default=DEFAULT_SEQ_LEN,
        metavar="N",
        help=f"tokens per sequence (default {DEFAULT_SEQ_LEN})",
    )
    parser.add_argument(
        "--dtype", help="of products (default bfloat16 if the machine has rates for it, else float32)"
    )
    wishes = parser.add_argument_group("what is given instead of searched")
    for flag, name in (("--pipe", "pipe ranks"), ("--expert", "devices that share a layer's experts")):
        wishes.add_argument(flag, type=int, metavar="N", help=name)
    wishes.add_argument("--data-parallel", type=int, metavar="N", help="replicas of the experts")
    wishes.add_argument("--schedule", metavar="NAME", help="see python -m piperjax show")
    wishes.add_argument(
        "--chunks", type=int, metavar="N", help="stages per pipe rank of interleaved schedules"
    )
    wishes.add_argument("--microbatches", type=int, metavar="N", help="microbatches per step")
    wishes.add_argument("--memory-mode", metavar="MODE", help="stage, layer, named, products or stash")
    wishes.add_argument(
        "--vocabulary", metavar="WHERE", help="embedding and head split over pipe ranks, or whole"
    )
    wishes.add_argument(
        "--overlap", action=argparse.BooleanOptionalAction, help="of forward and backward in a tick"
    )
    wishes.add_argument(
        "--capacity-factor",
        type=float,
        metavar="X",
        help="rows that a device accepts at a time over the balanced number; 0 accepts all (default 0, or "
        f"{USUAL_CAPACITY_FACTOR} or more with --overflow passes where that is quicker, or nothing fits otherwise)",
    )
    wishes.add_argument(
        "--overflow",
        choices=OVERFLOW,
        help="whether rows beyond the capacity factor are dropped or travel in later passes",
    )
    wishes.add_argument(
        "--gradient-dtype",
        choices=GRADIENT_DTYPES,
        help="in which gradients are added up (default float32, or bfloat16 if nothing fits otherwise)",
    )
    wishes.add_argument("--dispatch", metavar="NAME", help=f"dispatcher of rows: {', '.join(DISPATCHERS)}")
    wishes.add_argument(
        "--dispatch-chunks", type=int, metavar="N", help="parts in which tokens travel to their experts"
    )
    wishes.add_argument(
        "--imbalance",
        type=float,
        default=1.0,
        metavar="X",
        help="load of the busiest expert device over the mean",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--top", type=int, default=5, metavar="N", help="plans to show (default 5)")
    output.add_argument(
        "--explain",
        action="append",
        default=[],
        metavar="SIZES",
        help="why a mesh lost, such as pipe=8,expert=32; repeatable",
    )
    output.add_argument("--json", action="store_true", help="print everything as JSON instead")
    output.add_argument("--out", metavar="FILE", help="write the best plan for train.py --plan")
    output.add_argument("--html", metavar="FILE", help="write a report with pictures")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Searches, prints and writes; returns the exit code.

    Raises:
      ValueError: for whatever is impossible, in one sentence.
    """
    if args.top < 1:
        raise ValueError(f"--top must be at least 1, got {args.top}")
    asked = [parsed_sizes(text) for text in args.explain]
    question = asked_question(args)
    result = answer(question, keep=max(args.top, KEPT))
    explanations = [explain(result, sizes) for sizes in asked]
    written = []
    if args.out:
        content = {
            "model": question.model.name,
            "platform": question.platform.name,
            "plan": result.best.plan.to_dict(),
        }
        written.append(
            _write(args.out, json.dumps(content, indent=2) + "\n", "the plan, for train.py --plan")
        )
    if args.html:
        page = html_page(result, explanations=explanations, top=args.top)
        written.append(_write(args.html, page, "the report"))
    if args.json:
        print(json.dumps(report.to_dict(result, explanations, variations(result)), indent=2))
    else:
        print("\n".join([_text(args, result, explanations), *written]))
    return 0


def asked_question(args: argparse.Namespace) -> Question:
    """What the flags ask.

    Raises:
      ValueError: if there is no such model or machine, or no rates for it.
    """
    model, platform = named_model(args.model), load_platform(args.platform)
    if args.devices < 1:
        raise ValueError(f"--devices must be at least 1, got {args.devices}")
    if args.seq < 1:
        raise ValueError(f"--seq must be at least 1, got {args.seq}")
    dtype = args.dtype or ("bfloat16" if platform.rated("bfloat16") else "float32")
    if not platform.rated(dtype):
        rated = ", ".join(name for name in platform.device.peak_flop_per_second if platform.rated(name))
        advice = (
            f"use --dtype {rated.replace(', ', ' or ')}"
            if rated
            else "write them with `python -m piperjax measure`"
        )
        raise ValueError(
            f"platform {platform.name!r} has no rates for {dtype}, which planning needs; {advice}"
        )
    wished = {name: getattr(args, flag) for flag, name in FLAGS.items() if getattr(args, flag) is not None}
    if args.overlap is not None:
        wished["overlap"] = args.overlap
    return Question(
        model=model,
        platform=platform,
        num_devices=args.devices,
        batch_size=args.batch if args.batch is not None else default_batch_size(args.devices, args.seq),
        seq_len=args.seq,
        dtype=dtype,
        wished=wished,
        dispatchers=tuple(DISPATCHERS),
        imbalance=args.imbalance,
    )


def default_batch_size(num_devices: int, seq_len: int) -> int:
    """Sequences per step where none are given: 16,384 tokens per device, at most 67 million in all."""
    tokens = min(TOKENS_PER_DEVICE * num_devices, MOST_TOKENS_PER_STEP)
    return max(1, tokens // (seq_len * num_devices)) * num_devices


def parsed_sizes(text: str) -> Mapping[str, Any]:
    """Fields of a plan such as pipe=8,expert=32,schedule=zb_v.

    Raises:
      ValueError: if the text is not understood.
    """
    fields: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        name = name.replace("-", "_")
        if not equals or not value or name not in WISHES:
            near = get_close_matches(name, WISHES, n=1)
            raise ValueError(
                f"--explain takes fields of a plan such as pipe=8,expert=32, got {text!r}; "
                f"fields are {', '.join(WISHES)}" + (f"; did you mean {near[0]!r}?" if near else "")
            )
        if name in ("schedule", "memory_mode", "dispatch", "vocabulary", "overflow", "gradient_dtype"):
            fields[name] = value
        elif name == "capacity_factor":
            fields[name] = _number(float, name, value)
        else:
            fields[name] = _number(int, name, value)
    return fields


def _number(kind: type, name: str, value: str) -> Any:
    try:
        return kind(value)
    except ValueError:
        raise ValueError(f"{name} of --explain must be a number, got {value!r}") from None


def _text(args: argparse.Namespace, result: SearchResult, explanations: list) -> str:
    question = result.question
    each = question.batch_size // question.num_devices
    chosen = (
        ""
        if args.batch is not None
        else (
            f"(no --batch: {each} sequence{'s' * (each > 1)} per device, for about "
            f"{TOKENS_PER_DEVICE:,} tokens per device and at most {MOST_TOKENS_PER_STEP:,} per step)"
        )
    )
    sections = [
        "\n".join(filter(None, [report.headline(asked_question(args)), chosen])),
        "The best plan of each of the best meshes\n" + report.table(result, top=args.top),
        f"Plan 1: {result.best.mesh}\n" + report.details(result.best, question),
        "One choice of plan 1 made otherwise\n" + report.choices(variations(result)),
        *(f"Why not {report.explained(one)}" for one in explanations),
        report.rejected(result),
        "\n".join(f"Note: {note}" for note in report.notes(result)),
    ]
    return "\n\n".join(sections)


def _write(path: str, text: str, what: str) -> str:
    write_text(path, text)
    return f"\nwrote {what}: {path}"
