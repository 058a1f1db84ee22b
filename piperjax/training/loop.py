"""This file is the training loop: plan, restore, step, validate, save, stop."""

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

import jax

from meshes.mesh import build_mesh
from meshes.platform import Platform
from models import cost
from piperjax.planner.sent_bytes import dispatch_bytes
from piperjax.runtime.executor import Executor
from piperjax.runtime.standard_error import without_lines
from piperjax.runtime.xla_flags import NOISE_BESIDE_EXCHANGES
from piperjax.training import banner, distributed
from piperjax.training.checkpoint import Checkpoints
from piperjax.training.compile_check import compare
from piperjax.training.config import TrainConfig
from piperjax.training.data import Dataset, TrainBatches, load_dataset, open_tokenizer
from piperjax.training.interrupt import Interrupt
from piperjax.training.machine import find_platform
from piperjax.training.metrics import (
    MetricsFile,
    Printer,
    Record,
    Work,
    is_finite,
    read_metrics,
    step_line,
    step_record,
    validation_line,
)
from piperjax.training.planning import planned
from piperjax.training.prediction import Prediction, compiled_lines, predict, verdict
from piperjax.training.run_directory import RunLock, make_run_directory
from piperjax.training.run_file import check_same_run, write_run_file
from piperjax.training.state import StepMetrics, TrainState, init_state, make_evaluate, make_train_step
from piperjax.training.validation import validate

Hook = Callable[[Record], None]


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run leaves behind in the process; everything lasting is in `config.out`.

    Attributes:
      config: as resolved, plan included.
      step: steps done.
      stopped_by: name of the signal that ended the run early, "" if it reached `config.steps`.
      executor: runs the plan.
      state: the last state, on the devices.
      dataset: the text, its tokenizer and its unigram entropy.
      validation: the last validation record, None if nothing was validated.
    """

    config: TrainConfig
    step: int
    stopped_by: str
    executor: Executor
    state: TrainState
    dataset: Dataset
    validation: Record | None

    @property
    def exit_code(self) -> int:
        """0, or 128 + the signal's number as shells report it."""
        return 128 + signal.Signals[self.stopped_by] if self.stopped_by else 0

    @property
    def records(self) -> list[Record]:
        """Every record of the run so far, earlier processes included."""
        return read_metrics(self.config.out)


def train(
    config: TrainConfig,
    *,
    devices: Sequence[jax.Device] | None = None,
    notes: Sequence[str] = (),
    on_record: Hook | None = None,
    stream: TextIO | None = None,
) -> TrainResult:
    """Trains to `config.steps`, going on from the last checkpoint in `config.out` if there is one.

    Args:
      config: the run. Without a plan, the planner makes one for the devices.
      devices: what to run on; every device of every process by default.
      notes: lines to print on how the plan came about.
      on_record: called with every step's and every validation's record, on process 0.
      stream: where lines are printed; standard output by default.

    Raises:
      ValueError: if the run cannot start, cannot be saved, or its loss is no longer finite; earlier
        checkpoints are kept.
    """
    devices = jax.devices() if devices is None else list(devices)
    platform = find_platform(config.platform, devices)
    if config.plan is None:
        chosen = planned(config, platform, len(devices))
        config, notes = replace(config, plan=chosen.plan), chosen.notes
    with ExitStack() as cleanup:
        run = _prepare(
            config, platform, devices, cleanup=cleanup, notes=notes, on_record=on_record, stream=stream
        )
        with Interrupt() as interrupt:
            stopped_by = _loop(run, interrupt)
    return TrainResult(
        config=config,
        step=run.step,
        stopped_by=stopped_by,
        executor=run.executor,
        state=run.state,
        dataset=run.dataset,
        validation=run.validation,
    )


@dataclass(kw_only=True)
class _Run:
    """A run in progress.

    Attributes:
      step: steps done; `state` is the state after them.
      prediction: what is expected of the plan.
      validation: the last validation record.
      seconds: of every step of this process; the first has more to do.
      clock: when the last step ended, seconds of `time.perf_counter`.
    """

    config: TrainConfig
    executor: Executor
    dataset: Dataset
    work: Work
    checkpoints: Checkpoints
    metrics_file: MetricsFile | None
    printer: Printer
    on_record: Hook | None
    state: TrainState
    step: int
    evaluate: Callable[..., Any]
    prediction: Prediction
    validation: Record | None = None
    seconds: list[float] = field(default_factory=list)
    clock: float = field(default_factory=time.perf_counter)

    def validate(self) -> Record | None:
        """Measures and reports the loss on held-out text."""
        record = validate(
            self.config, self.executor, self.evaluate, dataset=self.dataset, state=self.state, step=self.step
        )
        if record is not None:
            self.validation = record
            self.write(record)
            self.printer.line(validation_line(record))
        return record

    def write(self, record: Record) -> None:
        """Hands a record to metrics.jsonl and to the caller; on the writing process only."""
        if self.metrics_file is not None:
            self.metrics_file.write(record)
            if self.on_record is not None:
                self.on_record(record)


def _prepare(
    config: TrainConfig,
    platform: Platform,
    devices: Sequence[jax.Device],
    *,
    cleanup: ExitStack,
    notes: Sequence[str],
    on_record: Hook | None,
    stream: TextIO | None,
) -> _Run:
    """Checks everything that can be wrong, prints the plan, and restores; writes nothing before all is checked.

    Files and threads that stay open are closed by `cleanup`.
    """
    plan = config.plan
    if plan.num_devices != len(devices):
        raise ValueError(
            f"the plan needs pipe {plan.pipe} x data {plan.data} x expert {plan.expert} = {plan.num_devices} "
            f"devices, but there are {len(devices)}; change the mesh or --devices"
        )
    mesh = build_mesh(pipe=plan.pipe, data=plan.data, expert_factors=plan.expert_factors, devices=devices)
    executor = Executor(config.model, plan, mesh, config.dtype)
    mode = config.log.progress if distributed.is_writer() else "none"
    printer = Printer(mode, num_steps=config.steps, stream=stream)
    cleanup.callback(printer.close)
    dataset = _load_text(config, report=printer.line)
    prediction = predict(config, platform, backend=devices[0].platform)
    about = {"prediction": prediction, "notes": notes}
    printer.line(banner.banner(config, platform, executor.abstract_params, dataset.describe(), **about))
    make_run_directory(config.out)
    if distributed.is_writer():
        cleanup.enter_context(closing(RunLock(config.out)))
    checkpoints = cleanup.enter_context(closing(Checkpoints(config.out, config.checkpoint)))
    state, step = _restore(config, executor, checkpoints, dataset=dataset, printer=printer)
    metrics_file = None
    if distributed.is_writer():
        metrics_file = cleanup.enter_context(closing(MetricsFile(Path(config.out), resume_step=step)))
        found = {"devices": _describe_devices(devices), "prediction": prediction.to_dict()}
        write_run_file(config, platform=asdict(platform), **found)
    return _Run(
        config=config,
        executor=executor,
        dataset=dataset,
        work=Work(
            tokens=config.tokens_per_step,
            flop=config.tokens_per_step * cost.flop_per_token(config.model, plan.seq_len).step,
            num_devices=len(devices),
            peak_flop_per_second=platform.device.known_peak(config.dtype) or 0.0,
            predicted_step_seconds=prediction.step_seconds or 0.0,
            overflow=plan.overflow,
            all_to_all_bytes=dispatch_bytes(config.model, plan, dtype=config.dtype),
        ),
        checkpoints=checkpoints,
        metrics_file=metrics_file,
        printer=printer,
        on_record=on_record,
        state=state,
        step=step,
        evaluate=make_evaluate(executor),
        prediction=prediction,
    )


def _describe_devices(devices: Sequence[jax.Device]) -> dict[str, Any]:
    return {
        "backend": devices[0].platform,
        "kind": devices[0].device_kind,
        "num_devices": len(devices),
        "num_processes": jax.process_count(),
    }


def _load_text(config: TrainConfig, report: Callable[[str], None]) -> Dataset:
    tokenizer = open_tokenizer(config.data.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"tokenizer '{config.data.tokenizer}' has {tokenizer.vocab_size} tokens but model {config.model.name} "
            f"has vocab_size {config.model.vocab_size}; add --set model.vocab_size={tokenizer.vocab_size}"
        )
    return load_dataset(
        config.data.path,
        seq_len=config.data.seq_len,
        tokenizer=tokenizer,
        cache_dir=config.data.cache_dir,
        validation_fraction=config.data.validation_fraction,
        report=report,
    )


def _restore(
    config: TrainConfig, executor: Executor, checkpoints: Checkpoints, *, dataset: Dataset, printer: Printer
) -> tuple[TrainState, int]:
    """Returns the last saved state and its step, or the first state of all."""
    step = checkpoints.latest_step
    if step is None:
        return init_state(executor, config.seed), 0
    description = checkpoints.describe(step)
    changes = check_same_run(description.get("config", {}), config, where=config.out)
    state = checkpoints.restore(step, executor)
    printer.line(
        f"resumed   from step {step} in {config.out}" + (f"; {', '.join(changes)}" if changes else "")
    )
    if description.get("data") != dataset.fingerprint:
        printer.line(f"note      the files of {dataset.name} have changed since the checkpoint was written")
    return state, step


def _loop(run: _Run, interrupt: Interrupt) -> str:
    """Runs the remaining steps; returns the name of the signal that ended them early, "" if none did."""
    steps = run.config.steps
    if run.step >= steps:
        run.printer.line(f"already at step {run.step} of {steps}; give more --steps to train on")
        return ""
    batches = _batches(run)
    batch = next(batches)
    train_step = _compiled(run, batch)
    running, is_stopped = None, False
    while run.step < steps and not is_stopped:
        asked = distributed.stop_flags(run.executor.mesh, is_asked=interrupt.signal is not None)
        run.state, metrics = train_step(run.state, batch, asked)
        run.step += 1
        batch = next(batches) if run.step < steps else None
        # One step runs ahead of what is read, so that the devices never wait for the log.
        if running is not None:
            is_stopped = _finish(run, *running)
        running = (run.step, metrics)
        # Several processes stop by the flag inside the step only, or they would part ways.
        is_stopped = is_stopped or (jax.process_count() == 1 and interrupt.signal is not None)
        if is_stopped or _is_pause(run):
            _finish(run, *running)
            running = None
            _pause(run, is_last=is_stopped or run.step >= steps)
    if run.step >= steps:
        return ""
    name = interrupt.name or signal.SIGTERM.name
    run.printer.line(f"{name}: saved step {run.step} in {run.config.out}; the same command resumes")
    return name


def _batches(run: _Run) -> Iterator[dict[str, jax.Array]]:
    """Yields the batches from the run's step on, on the devices; each process reads its own rows."""
    config, sharding = run.config, run.executor.batch_sharding
    plan = config.plan
    shape = (plan.num_microbatches, plan.microbatch_size, plan.seq_len)
    rows = distributed.local_rows(sharding, shape)
    batches = TrainBatches(
        run.dataset.train,
        batch_size=plan.batch_size,
        num_microbatches=plan.num_microbatches,
        rows=rows,
        seed=config.data.seed,
    )
    for batch in batches.iterate(run.step):
        yield distributed.place_batch(batch, sharding, rows=rows, num_rows=shape[1])


def _compiled(run: _Run, batch: dict[str, jax.Array]) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """Returns the compiled train step; compiling is told and timed apart from the first step."""
    started = time.perf_counter()
    options = run.executor.compiler_options
    told = "".join(f", with {name}={value}" for name, value in options.items())
    run.printer.line(f"compiling the step, once{told}")
    flags = distributed.stop_flags(run.executor.mesh, is_asked=False)
    lowered = make_train_step(run.executor, run.config).lower(run.state, batch, flags)
    with without_lines(NOISE_BESIDE_EXCHANGES if options else ""):
        compiled = lowered.compile()
    run.printer.line(f"compiled the step in {time.perf_counter() - started:.1f} s")
    if compiled.memory_analysis() is not None:  # Not every backend tells.
        run.printer.line(compiled_lines(compare(run.executor, compiled, with_work=True)))
        if options:
            run.printer.line(
                f"{'':10}buffers share no memory, so that chunks travel beside products: not predicted"
            )
    run.clock = time.perf_counter()
    return compiled


def _finish(run: _Run, step: int, metrics: StepMetrics) -> bool:
    """Waits for a step and reports it; returns whether some process was asked to stop."""
    metrics = jax.device_get(metrics)
    now = time.perf_counter()
    record = step_record(metrics, step=step, step_seconds=now - run.clock, work=run.work)
    run.seconds.append(now - run.clock)
    run.clock = now
    if not is_finite(metrics):
        saved = run.checkpoints.latest_step
        kept = f"the checkpoint of step {saved} is kept" if saved else "no checkpoint was written"
        raise ValueError(
            f"step {step} has loss {float(metrics.loss)} and gradient norm {float(metrics.grad_norm)}, so training "
            f"stops; {kept}; lower optimizer.peak_lr, raise optimizer.warmup_steps, or clip by a smaller "
            "optimizer.clip_norm above 0"
        )
    run.write(record)
    run.printer.advance(record)
    if step % run.config.log.log_every == 0 or step in (1, run.config.steps):
        run.printer.line(step_line(record, num_steps=run.config.steps))
    return bool(metrics.stop)


def _is_pause(run: _Run) -> bool:
    """True where the loop must catch up with the devices: to validate, to save, or to end."""
    config = run.config
    every = (config.log.validate_every, config.checkpoint.every_steps)
    return run.step >= config.steps or any(count and run.step % count == 0 for count in every)


def _pause(run: _Run, *, is_last: bool) -> None:
    """Validates and saves what is due after the current step."""
    config, step = run.config, run.step
    is_complete = step >= config.steps
    validated = None
    if is_complete or (config.log.validate_every and step % config.log.validate_every == 0):
        validated = run.validate()
    if is_last or (config.checkpoint.every_steps and step % config.checkpoint.every_steps == 0):
        run.checkpoints.save(
            step,
            run.executor,
            run.state,
            description={"config": config.to_dict(), "data": run.dataset.fingerprint, "data_step": step},
            validation_loss=None if validated is None else validated["validation_loss"],
        )
    if is_last:
        if said := verdict(run.prediction, run.seconds[1:]):
            run.printer.line(f"time      {said}")
        run.checkpoints.wait()
    if is_complete:
        run.printer.line(f"saved     step {step}; for text: python -m piperjax sample --run {config.out}")
    run.clock = time.perf_counter()
