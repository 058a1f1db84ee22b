"""Published measurements as runs that can be priced: what a row says, and what is known of the framework it ran on.

A row is a JSON object of one of the forms below; what a form leaves unsaid is filled in here, the same for all its
rows. A row that cannot be understood becomes a reason, never a traceback. What was not seen when this was written:
a release is as fast as the last one known before it (the first, if it is older), a release that is not named and any
other framework as the middle one, and what a variant of Primus adds is read off its words.
"""

import dataclasses
import re
import statistics
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks import records_dense
from benchmarks.frameworks import Run, Software
from benchmarks.record import (
    RATES,
    Record,
    UnknownRowError,
    degrees,
    dtype_of,
    model_of,
    platform_of,
    positive,
    tokens_per_second,
    whole,
)

# Megatron Bridge. The same configuration became faster from release to release, in software. One number per release,
# the same for all models and platforms, stands for it: seconds of everything that is not a product, over those of fused
# kernels that never wait. It fell by half in 26.06, on Blackwell; the H100 is as fast in 26.06 as in 26.04.
BRIDGE_STREAMS = {"25.11": 2.6, "26.02": 2.3, "26.04": 2.1, "26.06": 0.9}
BRIDGE_HOPPER_RELEASE = "26.04"
# Recipes run the exchanges of one microbatch beside the products of another where nodes have eight devices; those for
# NVL72 need not. There also the host is slower than that of NVL72, and steps with one sequence of 4,096 tokens take so
# long for every layer on devices of either generation; half of that where nothing waits for row counts.
BRIDGE_NODE_EXPOSED = 0.65
BRIDGE_HOST_SECONDS = 9.2e-3
# GPT-OSS adds biases, clamps and scales between the matrices of experts, by a kernel for each. Fitted.
EAGER_PASSES = {"gpt_oss_120b": 62.0}
# Experts that drop what exceeds their capacity have static shapes, so that nothing waits for row counts; such runs
# use plain all-to-alls.
DROPPING = Software(streams=0.9, exposed=1.0, dispatcher="flat")
# Primus: seconds that the host needs for a layer; with less than two sequences of 4,096 tokens on a device, steps of
# DeepSeek-V2-Lite do not become shorter. DeepEP hides or saves this part of the exchanges.
PRIMUS_HOST_SECONDS = 14e-3
PRIMUS_DEEPEP_EXPOSED = 0.6
# Its configuration of DeepSeek-V2 (examples/moe_package/configs/MI355X) computes 14 of the 15 layers of a rank again.
PRIMUS_MEMORY_MODES = {"deepseek_v2": "layer"}
# Nothing is hidden by a framework of which nothing is known, and what is no product takes as long as in the middle.
UNKNOWN = Software(streams=statistics.median(BRIDGE_STREAMS.values()))


def read(row: Mapping[str, Any]) -> Record:
    """The measurement of a row.

    Raises:
      UnknownRowError: if its form, model, platform or parallelism is not known.
    """
    try:
        if row.get("oom") and not any(row.get(rate) for rate in RATES):
            raise UnknownRowError("not a form of throughput: it ran out of memory")
        return _form_of(row)(row)
    except KeyError as error:
        raise UnknownRowError(f"the row has no field {error}") from None
    except UnknownRowError:
        raise
    except (ValueError, TypeError) as error:
        raise UnknownRowError(str(error)) from None


def source_of(row: Mapping[str, Any]) -> str:
    """Who published a row."""
    return str(row.get("source") or row.get("src") or "")


def _form_of(row: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], Record]:
    """What reads rows of its form."""
    source = source_of(row)
    if "tokens_per_second_per_device" in row:
        return _bridge
    if form := records_dense.form_of(source, row):
        return form
    if "2504.14960" in source and "mfu" in row:
        return _folding
    if "Primus" in source and "tok_s_gpu" in row:
        return _primus
    if "Primus" in source and "schedule" in row:
        # benchmarks/published_schedules.py compares the order of these.
        raise UnknownRowError("neither microbatches nor sequence length are published")
    if "par" in row and any(rate in row for rate in RATES) and not is_of_frontier(source):
        return _other
    raise UnknownRowError("not a form of measurement of throughput with known parallelism")


def is_of_frontier(source: str) -> bool:
    """Whether a row is one of those that `frontier.py` reads."""
    return any(name in source for name in ("Piper", "X-MoE", "2508.13337"))


def _bridge(row: Mapping[str, Any]) -> Record:
    """Megatron Bridge: DeepSeek-V3 trains its prediction layer unless the variant says otherwise."""
    platform, model, variant = (
        platform_of(row["platform"]),
        model_of(row["model"]),
        str(row.get("variant", "")),
    )
    if model.name == "deepseek_v3" and "w/o" not in variant:
        model = dataclasses.replace(model, prediction_layers=1)
    release = bridge_release(source_of(row))
    software = bridge_software(release, platform.name) if release else UNKNOWN
    drops = "tokendrop" in variant
    run = Run(
        model=model,
        platform=platform,
        devices=whole(row, "devices"),
        **{name: whole(row, name, 1) for name in ("tensor", "context", "pipe", "virtual", "expert")},
        microbatch=whole(row, "microbatch"),
        global_batch=whole(row, "global_batch"),
        seq_len=whole(row, "seq"),
        dtype=dtype_of(row.get("precision"), platform),
        capacity_factor=1.0 if drops else 0.0,
        eager_passes=EAGER_PASSES.get(model.name, 0.0),
        software=_dropping(software) if drops else software,
    )
    label = f"{row['model']} {row.get('precision', '')} {row['devices']} devices "
    label += release or NOT_KNOWN
    return Record(
        label=label + " drops" * drops,
        platform=platform.name,
        unit="tokens/s",
        published=row["tokens_per_second_per_device"],
        run=run,
    )


def bridge_release(source: str) -> str:
    """The release of Megatron Bridge that a source names, such as "26.04"; "" if none, or it is another framework."""
    found = re.search(r"\b(\d\d\.\d\d)", source) if "bridge" in source.lower() else None
    return found.group(1) if found else ""


def bridge_software(release: str, platform: str) -> Software:
    """Habits of a release of Megatron Bridge: those of the last known one before it, or of the first."""
    hopper = platform.startswith("h")
    known = [r for r in BRIDGE_STREAMS if r <= release and not (hopper and r > BRIDGE_HOPPER_RELEASE)]
    streams = BRIDGE_STREAMS[max(known, default=min(BRIDGE_STREAMS))]
    if platform.endswith("nvl72"):
        return Software(streams=streams, dispatcher="halo2_dedup")
    return Software(
        streams=streams,
        exposed=BRIDGE_NODE_EXPOSED,
        dispatcher="halo2_dedup",
        host_seconds=BRIDGE_HOST_SECONDS,
    )


def _dropping(software: Software) -> Software:
    """The same where experts drop what exceeds their capacity."""
    return software._replace(exposed=1.0, dispatcher="flat", host_seconds=software.host_seconds / 2)


def _folding(row: Mapping[str, Any]) -> Record:
    """MoE Parallel Folding (arXiv 2504.14960), Table 3: dropping experts, microbatches of one sequence."""
    par = degrees(row["par"])
    model, platform = model_of(row["model"]), platform_of(row["hw"])
    run = Run(
        model=model,
        platform=platform,
        devices=whole(row, "gpus"),
        tensor=par.get("TP", 1),
        context=par.get("CP", 1),
        pipe=par.get("PP", 1),
        expert=par.get("EP", 1),
        expert_tensor=par.get("ETP", par.get("TP", 1)),
        global_batch=whole(row, "gbs"),
        seq_len=whole(row, "seq"),
        dtype=dtype_of(row.get("prec"), platform),
        capacity_factor=positive("cap_factor", row["cap_factor"]),
        gathers_parameters="FSDP" in str(row["strategy"]),
        software=DROPPING,
    )
    return Record(
        label=f"{row['model']} {row['strategy']} {row['par']} {row['gpus']} devices",
        platform=platform.name,
        unit="tokens/s",
        published=tokens_per_second(row, run),
        run=run,
    )


NOT_KNOWN = "(of no known framework or release)"


def _other(row: Mapping[str, Any]) -> Record:
    """A framework of which nothing is known, with its degrees in a text and one of the rates."""
    par, platform = degrees(row["par"]), platform_of(row.get("hw") or row.get("platform"))
    run = Run(
        model=model_of(row["model"]),
        platform=platform,
        devices=whole(row, "gpus"),
        tensor=par.get("TP", 1),
        context=par.get("CP", 1),
        pipe=par.get("PP", 1),
        virtual=par.get("VPP", 1) if par.get("PP", 1) > 1 else 1,
        expert=par.get("EP", 1),
        expert_tensor=par.get("ETP", 1),
        microbatch=whole(row, "mbs", par.get("MBS", 1)),
        global_batch=whole(row, "gbs"),
        seq_len=whole(row, "seq"),
        dtype=dtype_of(row.get("prec"), platform),
        software=UNKNOWN,
    )
    return Record(
        label=f"{row['model']} {row['par']} {row['gpus']} devices {NOT_KNOWN}",
        platform=platform.name,
        unit="tokens/s",
        published=tokens_per_second(row, run),
        run=run,
    )


def _primus(row: Mapping[str, Any]) -> Record:
    """Primus on MI355X: rows are variants, each on top of those before it in its table."""
    par, variant = degrees(row["par"]), str(row.get("variant") or "")
    platform, devices = platform_of(row["hw"]), whole(row, "gpus")
    microbatch = whole(row, "mbs", par.get("MBS", 1))
    chunks = re.search(r"VPP(\d+)", variant)
    virtual = int(chunks.group(1)) if chunks else (3 if variant == "+sync-free" else 1)
    model = model_of(row["model"])
    run = Run(
        model=model,
        platform=platform,
        devices=devices,
        tensor=par.get("TP", 1),
        context=par.get("CP", 1),
        pipe=par.get("PP", 1),
        virtual=virtual if par.get("PP", 1) > 1 else 1,
        expert=par.get("EP", 1),
        microbatch=microbatch,
        # Not published for the small model, and without a pipeline it matters little.
        global_batch=whole(row, "gbs", 8 * devices * microbatch),
        seq_len=whole(row, "seq"),
        dtype=dtype_of(row.get("prec"), platform),
        memory_mode=PRIMUS_MEMORY_MODES.get(model.name, "stash"),
        software=_primus_software(variant, pipelined=par.get("PP", 1) > 1),
    )
    return Record(
        label=f"{row['model']} {run.microbatch} x {row['seq']} {row['gpus']} devices {variant}",
        platform=run.platform.name,
        unit="tokens/s",
        published=row["tok_s_gpu"],
        run=run,
    )


# Optimisations in the order in which the tables of Primus add them, one without and one with a pipeline.
PRIMUS_ORDER = {
    False: ("baseline", "loss fusion", "deepep", "sync-free", "numa", "mbs14"),
    True: ("1f1b base", "loss fusion", "deepep", "numa", "vpp3", "sync-free", "vpp5"),
}


def _primus_software(variant: str, *, pipelined: bool) -> Software:
    """Habits of a variant, on top of all those before the last one that it names; the first if it names none.

    Without waits for row counts and with them it is like those of Bridge's releases.
    """
    order = PRIMUS_ORDER[pipelined]
    reached = max((place for place, name in enumerate(order) if name in variant.lower()), default=0)
    return Software(
        streams=DROPPING.streams if reached >= order.index("sync-free") else BRIDGE_STREAMS["26.02"],
        exposed=PRIMUS_DEEPEP_EXPOSED if reached >= order.index("deepep") else 1.0,
        host_seconds=PRIMUS_HOST_SECONDS,
    )
