"""Checkpoints: the last few and the best, restored onto any mesh."""

import collections
import contextlib
import hashlib
import itertools
import math
import os
import pathlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
import tensorstore

from moejax import bucket, terminal
from moejax import files as files_lib
from moejax.training import processes
from moejax.training.state import TrainState

# What `sha256sum --check` reads: the digest of every other file of a
# checkpoint. Orbax does not notice a flipped bit.
SUMS_FILE = "SHA256SUMS"
# In its place in a bucket: digests that the bucket has anyway, so that nothing
# need be read. Checkpoints may move there and back.
_MD5_FILE = "MD5SUMS"
# Orbax writes the last two afterwards, and reads nothing of them here.
_UNSIGNED = {SUMS_FILE, _MD5_FILE, "_CHECKPOINT_METADATA", "commit_success.txt"}
_PERPLEXITY = "metrics/metrics"
# About as much of a file of a state waits in memory until it is written: by
# default all of a state below 2 GB, which then is there twice.
_FILE_BYTES = 64 * 2**20
# What Orbax, etils and TensorStore all take for the path that it is. They have
# their own reading of [, *, ?, \ and "..", of "gs:", of names at the root like
# /s3, and of an ending like that of their locks.
_PLAIN = re.compile(
  r"(?!/(gs|s3|az|hf)(/|$)|.*(/\.\.|\.__lock)(/|$))[\w/ .,+=@%#~-]+"
)


class Restored(NamedTuple):
  """A checkpoint's content, as `save` was given it.

  Of an imported model the state has no `opt_state`, which is None then.
  """

  state: TrainState
  progress: dict[str, Any]
  perplexity: float | None


class Checkpoints:
  """Saves in the background; restores the newest or the best that is sound.

  With several processes all call every method; the directory is one that all
  of them see, and has one folder a step. The last `keep` are kept, and the one
  of the lowest validation perplexity. Where it is read_only nothing in the
  directory is changed, for a run that may be alive.
  """

  def __init__(
    self, directory: files_lib.Path, keep: int = 2, read_only: bool = False
  ):
    self._in_bucket = bucket.is_in(directory)
    self._directory = directory if self._in_bucket else directory.absolute()
    self._keep, self._read_only = keep, read_only
    # What is being saved: its step, and the shapes of its arrays.
    self._saving: tuple[int | None, list[tuple[int, ...]]] = None, []
    self._broken = False
    # Of every step that is not known to be damaged; None where not measured.
    self._perplexity: dict[int, float | None] = {}
    self._damaged: set[int] = set()
    if not read_only:
      processes.first_does(
        lambda: self._directory.mkdir(parents=True, exist_ok=True)
      )
    self._opened = contextlib.ExitStack()
    self._path = self._opened.enter_context(_plain_path(self._directory))
    self._open()

  def save(
    self,
    state: TrainState,
    step: int,
    progress: dict[str, Any],
    perplexity: float | None = None,
  ) -> None:
    """Begins to save; returns once the state may be changed.

    OSError where this, or the one before, could not be written. The step is the
    state's own, known to the host; `progress` are plain values, such as the
    position in the data; the perplexity is of the validation at this step.
    """
    items: dict[str, Any] = {
      "state": ocp.args.PyTreeSave(
        state, ocdbt_target_data_file_size=_FILE_BYTES
      ),
      "progress": ocp.args.JsonSave(progress),
    }
    if perplexity is not None:
      # The step too: folders, or their files, may have been exchanged.
      items["metrics"] = ocp.args.JsonSave(
        {"perplexity": perplexity, "step": step}
      )
    self.wait()
    self._saving = step, [leaf.shape for leaf in jax.tree.leaves(state)]
    self._perplexity[step] = perplexity
    with self._reporting():
      self._manager.save(step, args=ocp.args.Composite(**items), force=True)

  def check(self) -> None:
    """Raises OSError where what is being saved has failed; does not wait."""
    with self._reporting():
      self._manager.check_for_errors()

  def latest(self, target: TrainState) -> Restored | None:
    """Restores into a target (`state.abstract_state`); None without any.

    A damaged checkpoint, cut short by a crash or a full disk, is reported and
    renamed to damaged-STEP-..., and the one before is taken; ValueError where
    all are damaged. OSError where a file cannot be read, which does not say
    that it is damaged.
    """
    restored = self._first_sound(target, lambda step: -step)
    if self._damaged and not self._read_only:

      def set_aside() -> None:
        for step in self._damaged:
          name = f"damaged-{step}-{time.time_ns()}"
          (self._directory / str(step)).rename(self._directory / name)

      processes.first_does(set_aside)
      self._manager.close()
      self._open()
    return restored

  def best(self, target: TrainState) -> Restored | None:
    """Restores the checkpoint of lowest validation perplexity, as `latest`.

    Where it is damaged, the next best; the newest where none was validated.
    """
    self.wait()
    return self._first_sound(target, self._by_perplexity)

  def newest(self) -> int:
    """Returns the newest step there is, damaged or not; 0 without any."""
    return max([0, *self._perplexity, *self._damaged])

  def wait(self) -> None:
    """Waits until what was saved is on the disk; raises OSError as `check`."""
    with self._reporting():
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, then lets go of the directory."""
    # A failure has been told; Orbax would tell it again.
    if not self._broken:
      self.wait()
      self._manager.close()
      self._opened.close()

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any):
    """Tells Orbax to keep the last ones, the best, and all that is damaged."""
    del context
    steps = [checkpoint.step for checkpoint in checkpoints]
    sound = [step for step in steps if step in self._perplexity]
    needed = {min(sound, key=self._by_perplexity), *sound[-self._keep :]}
    return [step in needed or step not in self._perplexity for step in steps]

  def _by_perplexity(self, step: int) -> tuple[float, int]:
    """Orders steps; of equally good ones the newest comes first."""
    perplexity = self._perplexity[step]
    return math.inf if perplexity is None else perplexity, -step

  def _open(self) -> None:
    """Opens the directory, and reads which steps are there, and how good.

    Orbax would refuse the whole directory where a perplexity is no JSON.
    """
    # A folder that may be listed but not entered would pass for an empty one.
    with _all_or_none(), contextlib.suppress(FileNotFoundError):
      os.stat(f"{self._directory}/.")
    self._manager = ocp.CheckpointManager(
      self._path,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=self,
        cleanup_tmp_directories=not self._read_only,
        read_only=self._read_only,
        async_options=ocp.AsyncOptions(post_finalization_callback=self._sign),
        lightweight_initialize=True,
      ),
    )
    steps = {*self._manager.all_steps()}
    self._damaged &= steps
    self._perplexity = {}
    for step in sorted(steps - self._damaged):
      folder, perplexity = self._directory / str(step), None
      try:
        with _all_or_none():
          if _verify(folder, lambda name: name == _PERPLEXITY):
            metrics = files_lib.read_json(folder / _PERPLEXITY)
            # Older versions wrote no step.
            _check_step(metrics.get("step", step), step)
            perplexity = float(metrics["perplexity"])
        self._perplexity[step] = perplexity
      except FileNotFoundError:
        # Training goes on and deletes it; or the folder is called 09.
        if not self._read_only and folder.is_dir():
          raise
      except ValueError as error:
        self._leave_out(step, str(error))

  def _first_sound(
    self, target: TrainState, order: Callable[[int], Any]
  ) -> Restored | None:
    """Restores the first checkpoint, in an order, that can be read."""
    if self._damaged:
      self._has_changed()
    while self._perplexity:
      step = min(self._perplexity, key=order)
      try:
        return self._restore(step, target)
      # No room, another process lost, a file that cannot be read: it may be as
      # good as ever.
      except (MemoryError, jax.errors.JaxRuntimeError, OSError) as error:
        missing = isinstance(error, FileNotFoundError | bucket.Unreachable)
        if not missing or not self._has_changed():
          raise
      except Exception as error:  # Orbax raises many kinds on damage.
        if not self._has_changed():
          self._leave_out(step, terminal.brief(error))
    if self._damaged:
      raise ValueError(
        f"none of the {len(self._damaged)} checkpoints in {self._directory}"
        f" (steps {sorted(self._damaged)}) can be read; restore them from a"
        " copy, or delete that folder to begin again."
      )
    return None

  def _has_changed(self) -> bool:
    """Looks again, where training goes on and may delete what is being read."""
    if not self._read_only:
      return False
    before = {*self._perplexity, *self._damaged}
    self._manager.close()
    self._open()
    return before != {*self._perplexity, *self._damaged}

  def _leave_out(self, step: int, why: str) -> None:
    self._perplexity.pop(step, None)
    self._damaged.add(step)
    if processes.first():
      terminal.warn(
        f"the checkpoint of step {step} cannot be read ({self._named(why)});"
        " leaving it out."
      )

  def _restore(self, step: int, target: TrainState) -> Restored:
    # Every process reads a share of the files; all come to the same answer, as
    # a restore that fails on some would keep the others waiting.
    turn = itertools.cycle(range(jax.process_count()))
    folder = self._directory / str(step)
    with _all_or_none():
      _verify(folder, lambda name: next(turn) == jax.process_index())
    try:
      handler = ocp.PyTreeCheckpointHandler()
      there = handler.metadata(self._path / str(step) / "state").tree
      if not there.get("opt_state"):
        target = target._replace(opt_state=None)
      how = ocp.checkpoint_utils.construct_restore_args(target)
      wanted = ocp.args.Composite(
        state=ocp.args.PyTreeRestore(target, restore_args=how),
        progress=ocp.args.JsonRestore(),
      )
      items = self._manager.restore(step, args=wanted)
    except (MemoryError, jax.errors.JaxRuntimeError):
      raise
    except Exception as error:
      # A bucket has all that was written, and gives it or nothing.
      if self._in_bucket:
        raise bucket.Unreachable(self._directory, error) from error
      raise
    state = TrainState(*items.state)
    _check_step(int(state.step), step)
    return Restored(state, items.progress, self._perplexity[step])

  def _sign(self) -> None:
    """Writes the digests, just before a checkpoint gets its final name.

    OSError where not all is there that a restore needs.
    """
    if not processes.first():
      return
    step, shapes = self._saving
    # In a bucket it lies under its own name, and gets a mark of success there.
    found, sums_file = [str(step)], _MD5_FILE
    if not self._in_bucket:
      drafts = self._directory.glob(f"{step}.orbax-checkpoint-tmp*")
      found, sums_file = [path.name for path in drafts], SUMS_FILE
    if len(found) != 1:
      raise OSError(f"{len(found)} folders of it were found, 1 was expected")
    _check_complete(self._path / found[0] / "state", shapes)
    folder = self._directory / found[0]
    lines = [
      f"{_digest(folder / name, known, sums_file)}  {name}\n"
      for name, known in sorted(_files(folder).items())
      if name not in _UNSIGNED
    ]
    files_lib.write_whole(folder / sums_file, "".join(lines))

  @contextlib.contextmanager
  def _reporting(self) -> Iterator[None]:
    """Turns what Orbax raises where it cannot write into one sentence."""
    try:
      yield
    except Exception as error:  # Orbax raises many kinds.
      self._broken = True
      step = self._saving[0]
      before = {*self._manager.all_steps()} - {step}
      last = f"of step {max(before)}" if before else "none"
      said = self._named(str(error).strip())
      raise OSError(
        f"the checkpoint of step {step} could not be saved"
        f" ({type(error).__name__}: {said:.300}); the last one in"
        f" {self._directory} is {last}."
        " Make room, if there is none, or allow larger files (ulimit -f), and"
        " start again: the same command goes on from there."
      ) from error

  def _named(self, text: str) -> str:
    """Puts the directory's own path in place of the one that Orbax knows."""
    return text.replace(str(self._path), str(self._directory))


@contextlib.contextmanager
def _plain_path(directory: files_lib.Path) -> Iterator[files_lib.Path]:
  """Yields a path to a folder that Orbax takes for what it is."""
  plain = bucket.is_in(directory) or _PLAIN.fullmatch(str(directory))
  if plain or not directory.is_dir():
    yield directory
    return
  descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
  try:
    path = pathlib.Path(f"/proc/self/fd/{descriptor}")
    if not path.is_dir():
      raise ValueError(
        f"Orbax cannot write checkpoints to {directory} where there is no"
        " /proc; give a --workdir of letters, digits, spaces, dots and dashes."
      )
    yield path
  finally:
    os.close(descriptor)


@contextlib.contextmanager
def _all_or_none() -> Iterator[None]:
  """Fails on all processes where one fails: none waits for it.

  With OSError where a file cannot be read, or ValueError where it is damaged.
  """
  caught = None
  try:
    yield
  except (OSError, ValueError) as error:
    caught = error
  if processes.any_of_us(isinstance(caught, OSError)):
    if isinstance(caught, FileNotFoundError | bucket.Unreachable):
      raise caught
    what = "a file of a checkpoint"
    if isinstance(caught, OSError):
      what = f"{caught.filename or what} ({caught.strerror or caught})"
    raise OSError(
      f"{what} cannot be read, which does not mean that it is damaged: nothing"
      " was changed; make it readable, and start again."
    ) from caught
  if processes.any_of_us(caught is not None):
    raise caught or ValueError("another process finds a file damaged")


def _check_step(found: int, step: int) -> None:
  if found != step:
    raise ValueError(f"what lies there is of step {found}")


def _check_complete(
  folder: files_lib.Path, shapes: Sequence[tuple[int, ...]]
) -> None:
  """Raises OSError where not all of the saved arrays could be restored.

  Orbax calls it done where it has not found what its processes wrote.
  """
  tree = ocp.StandardCheckpointHandler().metadata(folder)
  arrays = [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "storage")]
  there = collections.Counter(array.shape for array in arrays)
  if collections.Counter(shapes) != there:
    raise OSError(f"{len(shapes)} arrays were saved, {len(arrays)} are there")
  base = {"driver": "ocdbt", "base": f"{folder.as_uri()}/"}
  store = tensorstore.KvStore.open(base).result()
  # Each array has one entry about it, and one for each of its parts.
  wanted = len(arrays)
  for array in arrays:
    parts = zip(array.shape, array.storage.chunk_shape, strict=True)
    wanted += math.prod(-(-size // part) for size, part in parts)
  # The last byte of each, in whichever file it lies: none where that is gone.
  last = slice(-1, None)
  reads = [store.read(k, byte_range=last) for k in store.list().result()]
  count = sum(len(read.result().value) for read in reads)
  if count != wanted:
    raise OSError(f"of {wanted} parts of arrays {count} are there")


def _files(folder: files_lib.Path) -> dict[str, str]:
  """Lists the files in a folder and below, by their paths from there.

  With the digest that a bucket has of each, on a disk "". Those that begin with
  a dot are of file systems and file managers.
  """
  if bucket.is_in(folder):
    if found := bucket.digests(folder):
      return found
    raise FileNotFoundError(f"{folder} is missing")

  def fail(error: OSError) -> None:
    raise error

  found = {}
  for root, _, names in os.walk(folder, onerror=fail, followlinks=True):
    for path in (pathlib.Path(root, name) for name in names):
      if path.is_file() and not path.name.startswith("."):
        found[path.relative_to(folder).as_posix()] = ""
  return found


def _digest(path: files_lib.Path, known: str, sums_file: str) -> str:
  """Returns a file's digest, of the kind that a file of them has."""
  if known and sums_file == _MD5_FILE:
    return known
  kind = hashlib.sha256 if sums_file == SUMS_FILE else hashlib.md5
  with path.open("rb") as opened:
    return hashlib.file_digest(opened, kind).hexdigest()


def _verify(folder: files_lib.Path, wanted: Callable[[str], bool]) -> list[str]:
  """Compares the files that are wanted, which it returns, with their digests.

  ValueError where one is not what was written, or is one too many or too few.
  """
  files = _files(folder)
  sums_file = SUMS_FILE if SUMS_FILE in files else _MD5_FILE
  if sums_file not in files:
    raise ValueError(f"it has no {SUMS_FILE} nor {_MD5_FILE}")
  text = files_lib.read(folder / sums_file).decode()
  lines = [line.partition("  ") for line in text.splitlines()]
  sums = {name: digest for digest, _, name in lines}
  odd = {*files}.symmetric_difference(sums) - _UNSIGNED
  if odd or len(sums) < len(lines):
    raise ValueError(
      f"{sums_file} has not one line for each file"
      + (f", as for {min(odd)}" if odd else "")
    )
  names = [name for name in sorted(sums) if wanted(name)]
  for name in names:
    if _digest(folder / name, files[name], sums_file) != sums[name]:
      raise ValueError(f"{name} is not as written, by {sums_file}")
  return names
