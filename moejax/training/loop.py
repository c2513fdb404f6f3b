"""The training loop: data, step, validation, checkpoint, resume."""

import contextlib
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from moejax import config as config_lib
from moejax import files as files_lib
from moejax import sharding, signals, terminal
from moejax import workdir as workdir_lib
from moejax.data import batches
from moejax.models.transformer import apart, unscanned
from moejax.training import cost, evaluators, metrics, processes, session, step
from moejax.training import run as run_lib
from moejax.training import state as state_lib
from moejax.training.checkpoint import Checkpoints


def train(
  experiment: config_lib.Experiment, workdir: files_lib.Path
) -> dict[str, Any]:
  """Trains, or goes on where the workdir left off, and tests the best.

  Killed at any moment and started again, it leaves the same curve behind as a
  run that was never killed. SIGTERM, SIGHUP and Ctrl-C save and return after
  the step or the validation at hand; a second Ctrl-C leaves at once. Where
  several processes train (`processes.join`), a signal to any of them stops all.
  They all see the workdir, where the run lives.

  Returned is the result, which also lies in the workdir as JSON, or {"signal":
  its number} where one came first. ValueError names a value that cannot be
  used, OSError a file, FloatingPointError the step at which a number was none;
  BlockingIOError where another run trains in the workdir.
  """
  values = experiment.values
  processes.check_same(json.dumps(values, sort_keys=True), "config")
  # That the lock is still held; on the first process alone.
  checks: list[Callable[[], None]] = []
  with contextlib.ExitStack() as stack:

    def begin() -> None:
      checks.append(stack.enter_context(processes.alone_in(workdir)))
      workdir_lib.check_same(values, workdir)
      for name in run_lib.FOLDERS:
        files_lib.refuse_odd_in(workdir / name, written=True)
      files_lib.remove_drafts(workdir)

    # All that decides about a workdir is done alone in it.
    processes.first_does(begin)
    there = files_lib.exists(workdir / files_lib.LOCK_FILE)
    if processes.any_of_us(not there):
      raise ValueError(
        f"not every process finds in {workdir} what the first one wrote there;"
        " give a --workdir on a file system that all of them share."
      )
    finished = _finished(experiment, workdir)
    if not finished or workdir_lib.other_text(values, workdir):
      data = processes.first_then_others(
        lambda: config_lib.open_corpus(experiment, workdir)
      )
      built = session.build(experiment, len(data.vocabulary))
      # Before a large text is first read, which takes long.
      session.check_fits(built)
      context = evaluators.Context(built, data, workdir)
      processes.check_same(json.dumps(context.identity), "text")
      workdir_lib.check_text(context.identity, workdir)
    if not finished:
      run = _Run(context, checks, stack)
      stopped = run.train()
      return {"signal": stopped} if stopped else run.test()
  _say(f"finished before: {_outcome(finished, experiment, workdir)}")
  return finished


class _Phase(NamedTuple):
  """A part of training: its step, compiled, and what that computes."""

  until: int
  step_fn: jax.stages.Compiled
  flops_per_word: tuple[int, int]


class _Run:
  """A run that trains, alone in its workdir as long as `checks` say so.

  Attributes:
    state: after `done` steps, of which the checkpoint has `saved`.
    last: the last step.
    text_ends: whether it is the text's end.
    seconds: of training until the last checkpoint.
    phases: what is to come, the next one last.
    pending: a step and its metrics, on devices, that are not yet reported, and
      the phase that it was in.
    all_stop: the number of a signal to any process; 0 before one came.
  """

  def __init__(
    self,
    context: evaluators.Context,
    checks: Sequence[Callable[[], None]],
    stack: contextlib.ExitStack,
  ):
    """Compiles the step; goes on from the last checkpoint, if there is one."""
    self.context, self.checks = context, checks
    self.built, self.workdir = context.session, context.workdir
    self.experiment, data = self.built.experiment, context.data
    self.options, mesh = self.experiment.train, self.built.mesh
    about = self.experiment, len(data.vocabulary)
    count = cost.count(*about)
    opt_state = jax.tree.leaves(self.built.abstract_state.opt_state)
    num_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in opt_state)
    several = f" of {jax.process_count()} processes"
    _say(
      f"{count.total:,} parameters, {count.parameters + count.biases:,} of them"
      f" outside embedding and softmax; layout {self.built.layout.name} on"
      f" {mesh.size} {mesh.devices.flat[0].platform} device(s)"
      f"{several if processes.several() else ''}\noptimizer state of"
      f" {num_bytes:,} bytes, {num_bytes / count.total:.2f} a parameter"
    )
    rows, passes = context.rows("train"), self.options.passes
    self.batches = batches.train_batches(
      rows,
      data.batch_size,
      self.experiment.seed,
      jax.process_index(),
      jax.process_count(),
      passes,
    )
    self.last, self.text_ends = self.options.steps, False
    if passes:
      enough = batches.num_batches(rows, data.batch_size, passes)
      self.last, self.text_ends = min(self.last, enough), enough <= self.last
      if enough < self.options.steps:
        _say(
          f"read {passes:,} time(s), as config.train.passes promises, the text"
          f" is good for {enough:,} of the {self.options.steps:,} steps of"
          " config.train.steps: training ends there; give more text for more."
        )
    self._check_phases()
    sizes = ", ".join(
      f"{split} {rows.num_words:,}"
      + (f" ({rows.unknown:.1%} unknown)" if rows.unknown else "")
      for split, rows in ((each, context.rows(each)) for each in data.splits)
    )
    unit = self.experiment.unit
    _say(f"vocabulary of {len(data.vocabulary):,}; {unit}s: {sizes}")
    _say("compiling the training step")
    # The last phase's is needed in any case, and refused here if it must be.
    self.phases = [self._phase(self.options.steps, self.experiment, count)]
    # What could not be measured is refused now.
    _ = context.losses

    # From here on there is a run; what is wrong with it has shown above.
    processes.first_does(
      lambda: workdir_lib.remember(
        self.experiment.values, data.vocabulary, context.identity, self.workdir
      )
    )
    folder = self.workdir / run_lib.CHECKPOINTS
    self.checkpoints = Checkpoints(folder, self.options.keep)
    stack.enter_context(contextlib.closing(self.checkpoints))
    self.state, self.seconds = self._last_state()
    self.done = self.saved = int(self.state.step)
    for until, phase in reversed(self.experiment.phases):
      if until > self.done:
        _say(f"compiling the step before step {until}")
        count = cost.count(phase, len(data.vocabulary))
        self.phases.append(self._phase(until, phase, count))
    self.begun = time.monotonic() - self.seconds
    self.writer = self.progress = metrics.Silent()
    if processes.first():
      self.writer = metrics.Writer(self.workdir, self.done)
      self.progress = metrics.Progress(self.done, self.last, unit)
    stack.enter_context(contextlib.closing(self.writer))
    stack.enter_context(contextlib.closing(self.progress))
    if self.done:
      where = f"at step {self.done} of {self.last}"
      self.progress.say(f"resuming {self.workdir} {where}")
    self.speed = metrics.Speed()
    self.pending: tuple[int, Mapping[str, jax.Array], _Phase] | None = None
    self.all_stop = 0
    stack.enter_context(sharding.use(self.built.layout, mesh))
    stack.enter_context(
      processes.ends_with_the_others(
        lambda: f"checkpoint {self.saved}, in {self.workdir}"
      )
    )

  def _check_phases(self) -> None:
    """Refuses an annealing that cannot be, before there is a run.

    Raises:
      ValueError: the text ends before it, or a model of it cannot be built.
    """
    phases = self.experiment.phases
    if phases and phases[-1][0] >= self.last:
      raise ValueError(
        f"config.train.annealing ends at step {phases[-1][0]:,}, but the text"
        f" is good for {self.last:,}, so that the number of experts that is"
        " tested would never be trained; let it end before, or give more text."
      )
    for until, phase in phases:
      try:
        session.build(phase, len(self.context.data.vocabulary))
      except ValueError as error:
        raise ValueError(
          f"config.train.annealing, until step {until:,}: {error}"
        ) from error

  def _phase(
    self, until: int, experiment: config_lib.Experiment, count: cost.Count
  ) -> _Phase:
    """Compiles the step of a phase of training."""
    size = len(self.context.data.vocabulary)
    model = experiment.model(size)
    built = self.built._replace(experiment=experiment, model=model)
    flops = cost.flops_per_word(experiment, size, count)
    return _Phase(until, session.compiled(built), flops)

  def _last_state(self) -> tuple[state_lib.TrainState, float]:
    """Returns the last checkpoint's state, or the first, and seconds so far.

    The batches are then those that follow.
    """
    built = self.built
    restored = self.checkpoints.latest(built.abstract_state)
    if restored is None:
      about = built.shapes, self.experiment.seed, built.layout, built.mesh
      return state_lib.create(built.model, built.tx, *about), 0.0
    found, progress = restored.state, restored.progress
    if found.opt_state is None:
      # Of an imported model, which has read no text here.
      about = built.abstract_state, built.layout, built.mesh
      return state_lib.with_optimizer(found, built.tx, *about), 0.0
    text = self.context.identity
    workdir_lib.check_text(text, self.workdir, progress["text"])
    self.batches.set_state(progress["data"])
    return found, progress["seconds"]

  def train(self) -> int:
    """Trains to the end, or until a signal, whose number it returns.

    All is saved then.
    """
    options = self.options
    say = self.progress.say if processes.first() else terminal.say
    # Until all is saved; a signal in the test that follows ends it at once.
    with signals.asked(say) as stopped:

      def stops() -> int:
        # Alone, the request: a Ctrl-C just after SIGTERM takes its place.
        return self.all_stop if processes.several() else stopped()

      while self.done < self.last and not stops():
        batch = step.place(next(self.batches), self.built.batch_sharding)
        asked = processes.vote(stopped(), self.built.mesh)
        # A device that waits for the host has ended its step by now. The next
        # may end too before anybody looks; this one's clock must not run on.
        waits = self.pending and self.pending[1]["loss"].is_ready()
        ended = time.monotonic() if waits else None
        # The last in the list comes first.
        while self.done >= self.phases[-1].until:
          self.phases.pop()
        phase = self.phases[-1]
        self.state, measured = phase.step_fn(self.state, batch, asked)
        self.done += 1
        # One step late, so that the device need not wait for the host.
        self._settle(ended)
        self.pending = (self.done, measured, phase)
        self.progress.advance(self.done)
        if self.done == self.last or self.done % options.eval_every == 0:
          self._save(self._validate())
        elif self.done % options.checkpoint_every == 0:
          self._save()
      if self.saved < self.done:
        self._save()
      self.checkpoints.wait()
      stopping = stops()
    if stopping:
      self.progress.say(
        f"stopped at step {self.done} of {self.last}, saved in"
        f" {self.workdir}; the same command goes on from there."
      )
    return stopping

  def _settle(self, ended: float | None = None) -> None:
    """Brings the last step's metrics to the host, checks and reports them.

    It ends when they are there, or at a time that was seen before.
    """
    for check in self.checks:
      check()
    if self.pending is None:
      return
    (at, measured, phase), self.pending = self.pending, None
    measured = dict(measured)
    counts = measured.pop("count")
    values = {name: float(v) for name, v in jax.device_get(measured).items()}
    ended = ended or time.monotonic()
    self.all_stop = int(values.pop("asked")) or self.all_stop
    for name in ("loss", "grad_norm", "param_norm"):
      if not math.isfinite(values[name]):
        last = f"checkpoint {self.saved}" if self.saved else "no checkpoint"
        raise FloatingPointError(
          f"{name} became {values[name]} at step {at}; {last} was saved before,"
          f" in {self.workdir / run_lib.CHECKPOINTS}. Train in a new workdir"
          " with a lower config.optimizer.peak, or with"
          " config.optimizer.clip_norm."
        )
    self.checkpoints.check()
    words, source = values["words"], values.pop("source_words", 0.0)
    of_word, of_source = phase.flops_per_word
    values["flops"] = of_word * words + of_source * source
    self.speed.add(words, values["flops"], ended)
    if at % self.options.log_every:
      return
    # Of few words, the loss is no perplexity of the model.
    sampled = "sampled_" if getattr(self.built.model, "num_samples", 0) else ""
    loss, (words_per_second, flops) = values.pop("loss"), self.speed.read()
    values |= {
      f"{sampled}loss": loss,
      f"{sampled}perplexity": evaluators.exp(loss),
      "learning_rate": float(self.experiment.schedule(at - 1)),
      "words_per_second": words_per_second,
      "tflops_per_device": flops / 1e12 / self.built.mesh.size,
    }
    self.writer.write(at, "train", values)
    self.progress.report(at, values)
    # Of all times that a mixture ran in the step; then each block by itself.
    edges = {
      path: np.sum(each, axis=0)
      for path, each in flatten_dict(jax.device_get(counts)).items()
    }
    _, *places = unscanned(self.built.model)
    self.writer.write_loads(
      at,
      {
        "/".join(path[:-1]): each.reshape(-1).astype(int).tolist()
        for path, each in apart(edges, *places).items()
      },
    )

  def _validate(self) -> float:
    """Returns the perplexity."""
    self._settle()
    lines: list[str] = []
    values = evaluators.measure(
      evaluators.AT_VALIDATION,
      self.context,
      self.state.params,
      "validation",
      lines.append,
    )
    self.writer.write(self.done, "validation", evaluators.numbers(values))
    self.progress.validated(self.done, values)
    for line in lines:
      self.progress.say(line)
    self.speed.restart()
    return values["perplexity"]

  def _save(self, perplexity: float | None = None) -> None:
    self._settle()
    self.writer.flush()
    self.seconds = time.monotonic() - self.begun
    progress = {
      "data": self.batches.get_state(),
      "seconds": self.seconds,
      "text": self.context.identity,
    }
    self.checkpoints.save(self.state, self.done, progress, perplexity)
    self.saved = self.done

  def test(self) -> dict[str, Any]:
    """Tests the best checkpoint; writes and returns the result."""
    # Large models may not fit into memory twice.
    del self.state
    best = self.checkpoints.best(self.built.abstract_state)
    values = evaluators.measure(
      evaluators.AT_TEST,
      self.context,
      best.state.params,
      "test",
      self.progress.say,
    )
    test = evaluators.numbers(values)
    result = {
      "test": test,
      "best_step": int(best.state.step),
      "steps": self.done,
      "seconds": self.seconds,
    }
    speeds = [
      line["tflops_per_device"]
      for line in metrics.read(self.workdir / metrics.METRICS_FILE)
      if line.get("tflops_per_device")
    ]
    if speeds:
      result["tflops_per_device"] = statistics.median(speeds)
    result |= {name: v for name, v in values.items() if name not in test}
    if self.text_ends:
      result["passes"] = self.options.passes
    if lost := run_lib.lost_best(self.workdir, best, self.done):
      result["lost_best_step"] = lost
    self.writer.write(self.done, "test", test)
    as_json = metrics.as_json(result, indent=2) + "\n"
    path = self.workdir / workdir_lib.RESULT_FILE
    processes.first_does(lambda: files_lib.write_whole(path, as_json))
    self.progress.say(_outcome(result, self.experiment, self.workdir))
    return result


def _finished(
  experiment: config_lib.Experiment, workdir: files_lib.Path
) -> dict[str, Any] | None:
  """Reads the result of a run that has come to its end; None before that.

  OSError or ValueError where the file cannot be read, or is damaged.
  """
  path = workdir / workdir_lib.RESULT_FILE
  if not files_lib.exists(path):
    return None
  try:
    result = metrics.numbers(files_lib.read_json(path))
    _outcome(result, experiment, workdir)
    # More steps would not help where the text has come to its end.
    ended = result["steps"] >= experiment.train.steps or "passes" in result
    return result if ended else None
  except (ValueError, LookupError, TypeError, AttributeError):
    raise ValueError(
      f"{path} is damaged; remove it, and the same command tests the best"
      " checkpoint again."
    ) from None


def _outcome(
  result: Mapping[str, Any],
  experiment: config_lib.Experiment,
  workdir: files_lib.Path,
) -> str:
  left = ""
  if lost := result.get("lost_best_step"):
    left = f" that is left, as that of step {lost} is damaged or gone"
  return (
    f"test {metrics.describe(result['test'], experiment.unit)}, by the best"
    f" checkpoint{left} (step {result['best_step']} of {result['steps']});"
    f" trained in {metrics.clock(result['seconds'])}; the run lies in {workdir}"
  )


def _say(text: str) -> None:
  if processes.first():
    terminal.say(text)
