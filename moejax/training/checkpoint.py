"""Checkpoints: the last few and the best, restored onto any mesh."""

import json
import pathlib
import sys
import time
from typing import Any, NamedTuple

import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from moejax.training.state import TrainState


class Restored(NamedTuple):
  """A checkpoint's content; `progress` is what `save` was given."""

  state: TrainState
  progress: dict[str, Any]


class Checkpoints:
  """Saves in the background; finds what can be read again.

  Args:
    directory: where they lie, one folder a step.
    keep: how many of the last to keep, besides the one with the lowest
      validation perplexity.
    read_only: changes nothing in the directory, for a run that may be alive.
  """

  def __init__(
    self, directory: pathlib.Path, keep: int = 2, read_only: bool = False
  ):
    policies = checkpoint_managers
    best = policies.BestN(
      get_metric_fn=lambda metrics: -metrics["perplexity"],
      n=1,
      keep_checkpoints_without_metrics=False,
    )
    self._directory = directory.absolute()
    self._read_only = read_only
    if not read_only:
      self._set_aside_unscored()
    self._manager = ocp.CheckpointManager(
      self._directory,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(
          [policies.LatestN(keep), best]
        ),
        best_fn=lambda metrics: metrics["perplexity"],
        best_mode="min",
        cleanup_tmp_directories=not read_only,
        read_only=read_only,
      ),
    )

  def save(
    self,
    state: TrainState,
    step: int,
    progress: dict[str, Any],
    perplexity: float | None = None,
  ) -> None:
    """Begins to save; returns once the state may be changed.

    Args:
      state: parameters, optimiser state and step.
      step: the same step, known to the host.
      progress: plain values, such as the position in the data.
      perplexity: of the validation set, where it was measured at this step.
    """
    metrics = None if perplexity is None else {"perplexity": perplexity}
    items = ocp.args.Composite(
      state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress)
    )
    self._manager.save(step, args=items, metrics=metrics, force=True)

  def latest(self, target: TrainState) -> Restored | None:
    """Restores the newest checkpoint that can be read; None without any.

    One that cannot, cut short by a crash or a full disk, is reported, set aside
    as damaged-STEP-... and passed over for the one before.

    Args:
      target: shapes, types and shardings to restore into (`state.target`).

    Raises:
      ValueError: there are checkpoints, but none can be read.
    """
    steps = sorted(self._manager.all_steps(), reverse=True)
    for step in steps:
      try:
        restored = self._restore(step, target)
      except MemoryError:
        raise
      except Exception as error:  # Orbax raises many kinds on damage.
        first_line = (str(error).splitlines() or [""])[0]
        _say(
          f"the checkpoint of step {step} cannot be read"
          f" ({type(error).__name__}: {first_line:.200}); falling back to the"
          " one before."
        )
        continue
      damaged = steps[: steps.index(step)]
      if damaged and not self._read_only:
        for one in damaged:
          self._set_aside(self._directory / str(one))
        self._manager.reload()
      return restored
    if steps:
      raise ValueError(
        f"none of the {len(steps)} checkpoints in {self._directory} (steps"
        f" {steps[::-1]}) can be read; restore them from a copy, or delete that"
        " folder to begin again."
      )
    return None

  def best(self, target: TrainState) -> Restored | None:
    """Restores the checkpoint of lowest validation perplexity.

    The newest that can be read where none was validated or the best is
    damaged; None without any.
    """
    self.wait()
    step = self._manager.best_step()
    if step is not None:
      try:
        return self._restore(step, target)
      except Exception as error:
        _say(
          f"the best checkpoint, of step {step}, cannot be read"
          f" ({type(error).__name__}); taking the newest instead."
        )
    return self.latest(target)

  def wait(self) -> None:
    """Waits until what was saved is on the disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, then lets go of the directory."""
    self._manager.close()

  def _restore(self, step: int, target: TrainState) -> Restored:
    items = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(target),
        progress=ocp.args.JsonRestore(),
      ),
    )
    return Restored(TrainState(*items.state), items.progress)

  def _set_aside_unscored(self) -> None:
    """Sets checkpoints aside whose perplexity was cut short.

    Orbax reads them all as it opens, and would refuse the whole directory.
    """
    for path in self._directory.glob("[0-9]*/metrics/metrics"):
      try:
        json.loads(path.read_bytes())
      except ValueError:
        step = path.parents[1]
        _say(
          f"the perplexity of checkpoint {step.name} cannot be read; leaving"
          " it out."
        )
        self._set_aside(step)

  def _set_aside(self, path: pathlib.Path) -> None:
    path.rename(path.with_name(f"damaged-{path.name}-{time.time_ns()}"))


def _say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)
