"""Checkpoints: the last few and the best, restored onto any mesh."""

import contextlib
import hashlib
import json
import pathlib
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from moejax import terminal
from moejax.training import processes
from moejax.training.state import TrainState

# What `sha256sum --check` reads: the digest of every other file of a
# checkpoint. Orbax does not notice a flipped bit.
SUMS_FILE = "SHA256SUMS"
# No room on the host or on a device, another process lost.
_NOT_DAMAGE = (MemoryError, jax.errors.JaxRuntimeError)


class Restored(NamedTuple):
  """A checkpoint's content; `progress` is what `save` was given."""

  state: TrainState
  progress: dict[str, Any]


class Checkpoints:
  """Saves in the background; finds what can be read again.

  With several processes all call every method; the directory is one that all
  of them see.

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
    self._saving: int | None = None
    self._broken = False
    if not read_only:
      processes.first_does(self._set_aside_unscored)
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
        async_options=ocp.AsyncOptions(
          post_finalization_callback=self._write_sums
        ),
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

    Raises:
      OSError: it, or the one before, could not be written.
    """
    metrics = None if perplexity is None else {"perplexity": perplexity}
    items = ocp.args.Composite(
      state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress)
    )
    self.wait()
    self._saving = step
    with self._reporting():
      self._manager.save(step, args=items, metrics=metrics, force=True)

  def check(self) -> None:
    """Looks whether what is being saved has failed; does not wait.

    Raises:
      OSError: it could not be written.
    """
    with self._reporting():
      self._manager.check_for_errors()

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
      except _NOT_DAMAGE:
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
        self._give_up(damaged)
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
      except _NOT_DAMAGE:
        raise
      except Exception as error:
        _say(
          f"the best checkpoint, of step {step}, cannot be read"
          f" ({type(error).__name__}); taking the newest instead."
        )
    return self.latest(target)

  def wait(self) -> None:
    """Waits until what was saved is on the disk.

    Raises:
      OSError: it could not be written.
    """
    with self._reporting():
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, then lets go of the directory."""
    # A failure has been told; Orbax would tell it again.
    if not self._broken:
      self.wait()
      self._manager.close()

  @contextlib.contextmanager
  def _reporting(self) -> Iterator[None]:
    """Turns what Orbax raises where it cannot write into one sentence."""
    try:
      yield
    except Exception as error:  # Orbax raises many kinds.
      self._broken = True
      steps = sorted(self._manager.all_steps())
      kept = [step for step in steps if step != self._saving]
      raise OSError(
        f"the checkpoint of step {self._saving} could not be saved"
        f" ({type(error).__name__}: {str(error).strip():.300}); the last one"
        f" in {self._directory} is {f'of step {kept[-1]}' if kept else 'none'}."
        " Make room and start again: the same command goes on from there."
      ) from error

  def _write_sums(self) -> None:
    """Writes the digests, just before a checkpoint gets its final name."""
    if processes.first():
      step = f"{self._saving}.orbax-checkpoint-tmp*"
      for draft in self._directory.glob(step):
        lines = [
          f"{_digest(file)}  {file.relative_to(draft)}\n"
          for file in sorted(draft.rglob("*"))
          # Orbax adds the time to it afterwards, and reads none of it here.
          if file.is_file() and file.name != "_CHECKPOINT_METADATA"
        ]
        (draft / SUMS_FILE).write_text("".join(lines), encoding="utf-8")

  def _check_sums(self, step: int) -> None:
    """Refuses a checkpoint whose files are not what was written.

    Every process reads a share of them; all come to the same answer, as a
    restore that fails on some would keep the others waiting.
    """
    folder = self._directory / str(step)
    lines = _read_sums(folder)
    share = lines[jax.process_index() :: jax.process_count()]
    bad = [name for name, digest in share if _digest(folder / name) != digest]
    if processes.any_of_us(bool(bad) or not lines):
      here = f"{bad[0]} is" if bad else "some of its files are"
      raise ValueError(f"{here} not as written, by {SUMS_FILE}")

  def _restore(self, step: int, target: TrainState) -> Restored:
    self._check_sums(step)
    items = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(target),
        progress=ocp.args.JsonRestore(),
      ),
    )
    return Restored(TrainState(*items.state), items.progress)

  def _give_up(self, steps: list[int]) -> None:
    folders = [self._directory / str(step) for step in steps]
    processes.first_does(lambda: self._set_aside(folders))
    self._manager.reload()

  def _set_aside_unscored(self) -> None:
    """Sets checkpoints aside whose perplexity was cut short.

    Orbax reads them all as it opens, and would refuse the whole directory.
    """
    for path in self._directory.glob("[0-9]*/metrics/metrics"):
      try:
        float(json.loads(path.read_bytes())["perplexity"])
      except (ValueError, TypeError, KeyError):
        step = path.parents[1]
        _say(
          f"the perplexity of checkpoint {step.name} cannot be read; leaving"
          " it out."
        )
        self._set_aside([step])

  def _set_aside(self, paths: list[pathlib.Path]) -> None:
    for path in paths:
      path.rename(path.with_name(f"damaged-{path.name}-{time.time_ns()}"))


def _digest(file: pathlib.Path) -> str:
  """Returns the file's SHA-256; nothing where it cannot be read."""
  try:
    with file.open("rb") as opened:
      return hashlib.file_digest(opened, "sha256").hexdigest()
  except OSError:
    return ""


def _read_sums(folder: pathlib.Path) -> list[tuple[str, str]]:
  """Reads (name, digest) of every file; nothing where that is damaged."""
  try:
    lines = (folder / SUMS_FILE).read_text(encoding="utf-8").splitlines()
    pairs = [line.split("  ", 1) for line in lines]
    return [(name, digest) for digest, name in pairs]
  except (OSError, ValueError):
    return []


def _say(text: str) -> None:
  if processes.first():
    terminal.warn(text)
