"""This file is the checkpoints: logical, mesh-independent arrays and a description, written in the background."""

import gc
import logging
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from piperjax.training import logical
from piperjax.training.config import CheckpointConfig
from piperjax.training.state import Executor, TrainState

FORMAT = 1
DIRECTORY = "checkpoints"
_VALIDATION_LOSS = "validation_loss"


class Checkpoints:
    """The checkpoints of one run, `<directory>/checkpoints/<step>/`.

    Arrays are in the logical layout of `executor.to_logical`: parameters, both moments and the router bias,
    [L, ...] per kind of layer, and where experts are not in order, which physical one each of them was. Beside
    them a description in JSON, with a checksum of every array. A checkpoint appears under its name only when it is
    whole, and is never written over.

    Args:
      directory: run directory.
      config: how many to keep; what is not given is only read.
    """

    def __init__(self, directory: Path | str, config: CheckpointConfig | None = None):
        self.directory = Path(directory).absolute() / DIRECTORY
        # What orbax logs, errors in the background included, reaches the user as a sentence of ours.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        if not isinstance(sys.unraisablehook, _UnlessAbandoned):
            sys.unraisablehook = _UnlessAbandoned(sys.unraisablehook)
        options: dict[str, Any] = {"create": False, "read_only": True}
        if config is not None:
            options = {
                "create": True,
                "cleanup_tmp_directories": True,
                "preservation_policy": _preservation(config),
                # The policy decides what is kept; without best_fn orbax would not store the losses it decides by.
                "best_fn": lambda metrics: metrics[_VALIDATION_LOSS],
                "best_mode": "min",
            }
        elif not self.directory.is_dir():
            raise ValueError(f"there is no checkpoint in {self.directory.parent}; train there first")
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_names=("arrays", "description"),
            options=ocp.CheckpointManagerOptions(**options),
        )

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps that were saved, ascending."""
        return tuple(sorted(self._manager.all_steps()))

    @property
    def latest_step(self) -> int | None:
        """The last saved step, None if there is none."""
        return max(self.steps, default=None)

    @property
    def best_step(self) -> int | None:
        """The saved step with the lowest validation loss, None if none was validated."""
        losses = {}
        for step in self.steps:
            metrics = self._manager.metrics(step) or {}
            if _VALIDATION_LOSS in metrics:
                losses[step] = metrics[_VALIDATION_LOSS]
        return min(losses, key=losses.__getitem__, default=None)

    def save(
        self,
        step: int,
        executor: Executor,
        state: TrainState,
        *,
        description: Mapping[str, Any],
        validation_loss: float | None = None,
    ) -> None:
        """Copies the state and writes it in the background; returns when training may go on.

        Raises:
          ValueError: if this or an earlier checkpoint could not be written.
        """
        if step in self.steps:
            return
        arrays, contents = logical.to_logical(executor, state)
        described = {
            "format": FORMAT,
            "step": step,
            "arrays": contents,
            **description,
        }
        items = ocp.args.Composite(
            arrays=ocp.args.StandardSave(arrays), description=ocp.args.JsonSave(described)
        )
        metrics = None if validation_loss is None else {_VALIDATION_LOSS: float(validation_loss)}
        with self._writing():
            self._manager.save(step, args=items, metrics=metrics, force=True)

    def wait(self) -> None:
        """Returns when everything saved so far is on disk.

        Raises:
          ValueError: if a checkpoint could not be written.
        """
        with self._writing():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def close(self) -> None:
        """Waits for what is being written and frees the threads.

        Raises:
          ValueError: if a checkpoint could not be written.
        """
        with self._writing():
            self._manager.close()

    def describe(self, step: int) -> dict[str, Any]:
        """Returns the description that was saved with a step.

        Raises:
          ValueError: if it is damaged or of a format that this version does not read.
        """
        items = ocp.args.Composite(description=ocp.args.JsonRestore())
        with self._reading(step):
            description = self._manager.restore(step, args=items).description
        if not isinstance(description, dict) or not isinstance(description.get("arrays"), dict):
            raise self._damaged(step, ValueError("its description is incomplete"))
        if description.get("format") != FORMAT:
            raise ValueError(
                f"checkpoint {self.directory / str(step)} has format {description.get('format')!r}, but this "
                f"version reads format {FORMAT}; resume it with the version that wrote it, or choose another --out"
            )
        return description

    def restore(self, step: int, executor: Executor) -> TrainState:
        """Returns the state of a step on the executor's mesh, whatever mesh it was saved from.

        Raises:
          ValueError: if the checkpoint is damaged or belongs to another model.
        """
        description = self.describe(step)
        abstract = logical.abstract_logical(executor, placed=logical.PLACEMENT in description["arrays"])
        self._check_shapes(step, description["arrays"], abstract)
        items = ocp.args.Composite(arrays=ocp.args.StandardRestore(abstract))
        with self._reading(step):
            arrays = self._manager.restore(step, args=items).arrays
        found = logical.contents(arrays)
        wrong = [name for name, content in description["arrays"].items() if found[name] != content]
        if wrong:
            raise self._damaged(
                step, ValueError(f"the values of {wrong[0]} differ from those that were saved")
            )
        return logical.from_logical(executor, arrays, step=step)

    def restore_params(self, step: int, abstract: Any) -> tuple[Any, jax.Array]:
        """Returns (logical parameters, router bias) of a step, for a program without optimizer.

        Args:
          step: which one.
          abstract: (parameters, router bias) as ShapeDtypeStruct with shardings, in logical layout.
        """
        self.describe(step)
        params, router_bias = abstract
        wanted = {"params": params, "router_bias": router_bias}
        restore_args = ocp.checkpoint_utils.construct_restore_args(wanted)
        items = ocp.args.PyTreeRestore(wanted, restore_args=restore_args, partial_restore=True)
        with self._reading(step), ocp.PyTreeCheckpointer() as reader:
            arrays = reader.restore(self.directory / str(step) / "arrays", args=items)
        return arrays["params"], arrays["router_bias"]

    def _check_shapes(self, step: int, saved: dict[str, Any], abstract: dict[str, Any]) -> None:
        """Compares what was saved with what the executor needs, before anything large is read."""
        shapes = {name: tuple(content["shape"]) for name, content in saved.items()}
        needed = {name: leaf.shape for name, leaf in logical.named_leaves(abstract).items()}
        for name in sorted(shapes.keys() | needed.keys()):
            if shapes.get(name) != needed.get(name):
                raise ValueError(
                    f"checkpoint {self.directory / str(step)} belongs to another model: {name} is "
                    f"{_shape(shapes.get(name))} there and {_shape(needed.get(name))} here; choose another --out"
                )

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns what goes wrong while a step is written, now or in the background, into one sentence."""
        try:
            yield
        except Exception as error:  # orbax lets errors of tensorstore and the file system through
            _abandon(error)
            failure = ValueError(
                f"could not write a checkpoint to {self.directory} ({_reason(error)}); the earlier ones are kept; "
                "free some space, or choose another --out"
            )
        else:
            return
        raise failure

    @contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """Turns what goes wrong while a step is read into one sentence."""
        try:
            yield
        except Exception as error:  # orbax lets errors of json, tensorstore and the file system through
            _abandon(error)
            failure = self._damaged(step, error)
        else:
            return
        raise failure

    def _damaged(self, step: int, error: Exception) -> ValueError:
        path = self.directory / str(step)
        reason = _reason(error)
        if isinstance(error, PermissionError) or "PERMISSION_DENIED" in reason:
            return ValueError(f"checkpoint {path} may not be read by this user; change its permissions")
        earlier = [other for other in self.steps if other < step]
        advice = f"to resume from step {earlier[-1]}" if earlier else "to start anew"
        return ValueError(f"checkpoint {path} is damaged ({reason}); delete that directory {advice}")


class _UnlessAbandoned:
    """Complains as before of errors that nobody can catch, but not of reads and writes that were abandoned.

    Where one array cannot be read or written, orbax leaves the others behind. They still end, on threads of
    tensorstore, and find their event loop closed.
    """

    def __init__(self, complain: Callable[[Any], None]):
        self._complain = complain

    def __call__(self, unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            self._complain(unraisable)


def _abandon(error: BaseException) -> None:
    """Frees what the error of a failed read or write holds, without a word about tasks that never ended."""
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    chained: BaseException | None = error
    while chained is not None:
        traceback.clear_frames(chained.__traceback__)
        chained = chained.__cause__ or chained.__context__
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        gc.collect()


def _preservation(config: CheckpointConfig) -> policies.PreservationPolicy:
    best = policies.BestN(
        get_metric_fn=lambda metrics: metrics[_VALIDATION_LOSS],
        reverse=True,
        n=config.keep_best,
        keep_checkpoints_without_metrics=False,
    )
    return policies.AnyPreservationPolicy([policies.LatestN(config.keep), best])


def _reason(error: Exception) -> str:
    """Returns what is worth quoting of an error whose text may be long."""
    text = str(error)
    if "No space left" in text or text.startswith("RESOURCE_EXHAUSTED"):
        return "no space left"
    return (text.splitlines() or [type(error).__name__])[0][:100]


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else f"[{', '.join(map(str, shape))}]"
