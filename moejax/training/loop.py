"""The training loop: data, step, validation, checkpoint, resume."""

import contextlib
import functools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from moejax import config as config_lib
from moejax import files as files_lib
from moejax import sharding, signals, terminal
from moejax import workdir as workdir_lib
from moejax.data import batches as batches_lib
from moejax.training import (
  evaluate,
  judge,
  metrics,
  processes,
  session,
  state,
  step,
)
from moejax.training import run as run_lib
from moejax.training.checkpoint import Checkpoints


def train(config: config_lib.Config, workdir: files_lib.Path) -> dict[str, Any]:
  """Trains, or goes on where the workdir left off, and tests the best.

  Killed at any moment and started again, it leaves the same curve behind as a
  run that was never killed. SIGTERM, SIGHUP and Ctrl-C save and return after
  the step or the validation at hand; a second Ctrl-C leaves at once. Where
  several processes train (`processes.join`), a signal to any of them stops all.

  Args:
    config: plain values, see configs/.
    workdir: where the run lives: config, vocabulary, metrics, checkpoints; a
      folder that all processes see.

  Returns:
    The result, which also lies in the workdir as JSON; {"signal": its number}
    where one came first.

  Raises:
    ValueError: a config or text that cannot be used; says which value.
    OSError: a file that cannot be read or written; names it.
    FloatingPointError: loss, gradient or parameters became NaN or infinite;
      names the step.
    BlockingIOError: another run trains in the workdir.
  """
  config_lib.check(config)
  processes.check_same(config.to_json(sort_keys=True), "config")
  # On the first process alone.
  checks: list[Callable[[], None]] = []
  with contextlib.ExitStack() as stack:

    def begin() -> None:
      checks.append(stack.enter_context(processes.alone_in(workdir)))
      workdir_lib.check_same(config, workdir)
      for name in run_lib.FOLDERS:
        files_lib.refuse_odd_in(workdir / name, written=True)
      files_lib.remove_drafts(workdir)

    # All that decides about a workdir is done alone in it.
    processes.first_does(begin)
    _check_shared(workdir)
    return _train_alone(config, workdir, checks)


def _train_alone(
  config: config_lib.Config,
  workdir: files_lib.Path,
  checks: Sequence[Callable[[], None]],
) -> dict[str, Any]:
  """Does what `train` says, alone in a workdir as long as `checks` say so."""
  options = config_lib.train(config)
  finished = _finished(config, workdir)
  if finished and not workdir_lib.other_text(config, workdir):
    _print(f"finished before: {_outcome(finished, config, workdir)}")
    return finished
  data = processes.first_then_others(lambda: config_lib.data(config, workdir))
  parts = session.build(config, len(data.vocabulary))
  model, schedule, tx, layout, mesh, where, shapes, target = parts
  for line in _about_model(target, layout, mesh):
    _print(line)
  in_layout = functools.partial(state.abstract_state, model, tx, shapes)
  # Before a large text is first read, which takes long.
  state.check_fits(target, in_layout, layout, mesh)
  rows = {split: data.rows(split) for split in data.splits}
  batches = batches_lib.train_batches(
    rows["train"],
    data.batch_size,
    config.seed,
    jax.process_index(),
    jax.process_count(),
  )
  identity = {split: rows[split].digest for split in rows}
  processes.check_same(json.dumps(identity), "text")
  workdir_lib.check_text(identity, workdir)
  if finished:
    _print(f"finished before: {_outcome(finished, config, workdir)}")
    return finished
  words = ", ".join(
    f"{split} {part.num_words:,}"
    + (f" ({part.unknown:.1%} unknown)" if part.unknown else "")
    for split, part in rows.items()
  )
  _print(f"vocabulary of {len(data.vocabulary):,}; words: {words}")
  _print("compiling the training step")
  step_fn = session.compiled(config, parts)
  evaluate_on = run_lib.evaluator(config, parts)
  translator = None
  if config_lib.translates(config):
    translator = run_lib.make_translator(config, parts, data.vocabulary)

  # From here on there is a run; what is wrong with it has shown above.
  processes.first_does(
    lambda: workdir_lib.remember(config, data.vocabulary, identity, workdir)
  )
  with contextlib.ExitStack() as stack:
    checkpoints = Checkpoints(workdir / run_lib.CHECKPOINTS, options.keep)
    stack.enter_context(contextlib.closing(checkpoints))
    seconds = 0.0
    if restored := checkpoints.latest(target):
      workdir_lib.check_text(identity, workdir, restored.progress["text"])
      current = restored.state
      batches.set_state(restored.progress["data"])
      seconds = restored.progress["seconds"]
    else:
      current = state.create(model, tx, shapes, config.seed, layout, mesh)
    del restored
    done = saved = int(current.step)
    begun = time.monotonic() - seconds
    writer = progress = metrics.Silent()
    if processes.first():
      writer = metrics.Writer(workdir, done)
      progress = metrics.Progress(done, options.steps, config_lib.unit(config))
    stack.enter_context(contextlib.closing(writer))
    stack.enter_context(contextlib.closing(progress))
    speed = metrics.Speed()
    # Of few words, its loss is no perplexity of the model.
    sampled = "sampled_" if config.model.get("num_samples") else ""
    pending: tuple[int, Mapping[str, jax.Array]] | None = None
    # The number of a signal to any process; 0 before one came.
    all_stop = 0

    def settle() -> None:
      """Brings the last step's metrics to the host, checks and reports them."""
      nonlocal pending, all_stop
      for check in checks:
        check()
      if pending is None:
        return
      at, measured = pending
      pending = None
      values = {name: float(v) for name, v in jax.device_get(measured).items()}
      all_stop = int(values.pop("asked")) or all_stop
      _check_finite(at, values, saved, workdir)
      checkpoints.check()
      speed.add(values.pop("words"))
      if at % options.log_every == 0:
        loss = values.pop("loss")
        values |= {
          f"{sampled}loss": loss,
          f"{sampled}perplexity": evaluate.exp(loss),
        }
        values["learning_rate"] = float(schedule(at - 1))
        values["words_per_second"] = speed.read()
        writer.write(at, "train", values)
        progress.report(at, values)

    def validate() -> float:
      settle()
      values = evaluate_on(current.params, rows["validation"])
      writer.write(done, "validation", values)
      progress.validated(done, values)
      if translator:
        held_out = data.pairs["validation"]
        for line in judge.examples(translator, current.params, held_out):
          progress.say(line)
      speed.restart()
      return values["perplexity"]

    def save(perplexity: float | None = None) -> None:
      nonlocal saved, seconds
      settle()
      writer.flush()
      seconds = time.monotonic() - begun
      position = {
        "data": batches.get_state(),
        "seconds": seconds,
        "text": identity,
      }
      checkpoints.save(current, done, position, perplexity)
      saved = done

    if done:
      progress.say(f"resuming {workdir} at step {done} of {options.steps}")
    stack.enter_context(sharding.use(layout, mesh))
    stack.enter_context(
      processes.ends_with_the_others(
        lambda: f"checkpoint {saved}, in {workdir}"
      )
    )
    say = progress.say if processes.first() else terminal.say
    # Until all is saved; a signal in the test that follows ends it at once.
    with signals.asked(say) as stopped:

      def stops() -> int:
        return all_stop or (0 if processes.several() else stopped())

      while done < options.steps and not stops():
        batch = step.place(next(batches), where)
        asked = processes.vote(stopped(), mesh)
        current, measured = step_fn(current, batch, asked)
        done += 1
        # One step late, so that the device need not wait for the host.
        settle()
        pending = (done, measured)
        progress.advance(done)
        last = done == options.steps
        if last or done % options.eval_every == 0:
          save(validate())
        elif done % options.checkpoint_every == 0:
          save()
      if saved < done:
        save()
      checkpoints.wait()
      stopping = stops()
    if stopping:
      progress.say(
        f"stopped at step {done} of {options.steps}, saved in {workdir}; the"
        " same command goes on from there."
      )
      return {"signal": stopping}
    # Large models may not fit into memory twice.
    del current
    best = checkpoints.best(target)
    test = evaluate_on(best.state.params, rows["test"])
    result = {
      "test": test,
      "best_step": int(best.state.step),
      "steps": done,
      "seconds": seconds,
    }
    if lost := run_lib.lost_best(workdir, best, done):
      result["lost_best_step"] = lost
    if translator:
      progress.say("translating the test")
      about = translator, best.state.params, data.pairs["test"]
      lines = workdir / run_lib.TRANSLATIONS / "test"
      found, result["signatures"] = judge.scores(*about, lines)
      test |= found
      for name, signature in result["signatures"].items():
        progress.say(f"{name}: {signature}")
    writer.write(done, "test", test)
    as_json = metrics.as_json(result, indent=2) + "\n"
    processes.first_does(
      lambda: files_lib.write_whole(workdir / workdir_lib.RESULT_FILE, as_json)
    )
    progress.say(_outcome(result, config, workdir))
  return result


def _check_finite(
  at: int, values: Mapping[str, float], saved: int, workdir: files_lib.Path
) -> None:
  for name in ("loss", "grad_norm", "param_norm"):
    if not math.isfinite(values[name]):
      kept = f"checkpoint {saved}" if saved else "no checkpoint"
      raise FloatingPointError(
        f"{name} became {values[name]} at step {at}; {kept} was saved before,"
        f" in {workdir / run_lib.CHECKPOINTS}. Train in a new workdir with a"
        " lower config.optimizer.peak, or with config.optimizer.clip_norm."
      )


def _about_model(
  target: state.TrainState, layout: sharding.Layout, mesh: jax.sharding.Mesh
) -> Iterator[str]:
  """Yields how large it is, for the person who started the run."""
  total, inner = session.sizes(target.params)
  opt_state = jax.tree.leaves(target.opt_state)
  num_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in opt_state)
  kind = mesh.devices.flat[0].platform
  yield (
    f"{total:,} parameters, {inner:,} of them outside embedding"
    f" and softmax; layout {layout.name} on {mesh.size} {kind} device(s)"
    f"{processes.how_many()}"
  )
  yield (
    f"optimiser state of {num_bytes:,} bytes,"
    f" {num_bytes / total:.2f} a parameter"
  )


def _outcome(
  result: Mapping[str, Any],
  config: config_lib.Config,
  workdir: files_lib.Path,
) -> str:
  test = metrics.describe(result["test"], config_lib.unit(config))
  left = ""
  if lost := result.get("lost_best_step"):
    left = f" that is left, as that of step {lost} is damaged or gone"
  return (
    f"test {test}, by the best checkpoint{left} (step"
    f" {result['best_step']} of {result['steps']}); trained in"
    f" {metrics.clock(result['seconds'])}; the run lies in {workdir}"
  )


def _print(text: str) -> None:
  if processes.first():
    terminal.say(text)


def _check_shared(workdir: files_lib.Path) -> None:
  there = files_lib.exists(workdir / processes.LOCK_FILE)
  if processes.any_of_us(not there):
    raise ValueError(
      f"not every process finds in {workdir} what the first one wrote there;"
      " give a --workdir on a file system that all of them share."
    )


def _finished(
  config: config_lib.Config, workdir: files_lib.Path
) -> dict[str, Any] | None:
  """Reads the result of a run that has come to its end; None before that.

  Raises:
    OSError, ValueError: the file cannot be read, or is damaged.
  """
  path = workdir / workdir_lib.RESULT_FILE
  if not files_lib.exists(path):
    return None
  try:
    result = metrics.numbers(files_lib.read_json(path))
    _outcome(result, config, workdir)
    return result if result["steps"] >= config.train.steps else None
  except (ValueError, LookupError, TypeError, AttributeError):
    raise ValueError(
      f"{path} is damaged; remove it, and the same command tests the best"
      " checkpoint again."
    ) from None
