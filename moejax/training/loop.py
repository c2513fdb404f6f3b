"""The training loop: data, step, validation, checkpoint, resume."""

import contextlib
import functools
import json
import math
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from moejax import config as config_lib
from moejax import sharding
from moejax.data import text
from moejax.training import evaluate, metrics, state, step
from moejax.training.checkpoint import Checkpoints

CHECKPOINTS = "checkpoints"
RESULT_FILE = "result.json"


def train(config: config_lib.Config, workdir: pathlib.Path) -> dict[str, Any]:
  """Trains, or goes on where the workdir left off, and tests the best.

  Killed at any moment and started again, it leaves the same curve behind as a
  run that was never killed. SIGTERM and Ctrl-C save and return after the step
  at hand; a second Ctrl-C leaves at once.

  Args:
    config: plain values, see configs/.
    workdir: where the run lives: config, vocabulary, metrics, checkpoints.

  Returns:
    The result, which also lies in the workdir as JSON; empty where a signal
    came first.

  Raises:
    ValueError: a config or text that cannot be used; says which value.
    FloatingPointError: the loss became NaN or infinite; names the step.
  """
  config_lib.check(config)
  config_lib.check_same(config, workdir)
  options = config_lib.train(config)
  data = config_lib.data(config, workdir)
  rows = {split: data.rows(data.tokens(split)) for split in data.texts}
  model = config_lib.model(config, len(data.vocabulary))
  schedule, tx = config_lib.optimizer(config)
  layout = config_lib.layout(config)
  mesh = sharding.make_mesh(layout)
  processes = (jax.process_index(), jax.process_count())
  batches = text.train_batches(
    rows["train"], data.batch_size, config.seed, *processes
  )
  current, shardings = state.create(
    model, tx, data.batch_shapes(), config.seed, layout, mesh
  )
  target = state.abstract(current, shardings)
  for line in _introduction(current.params, rows, layout, mesh):
    print(line, flush=True)
  print("compiling the training step", flush=True)
  step_fn = jax.jit(
    functools.partial(
      step.train_step,
      model=model,
      tx=tx,
      aux_weights=config.aux.to_dict(),
      seed=config.seed,
      microbatches=options.microbatches,
    ),
    out_shardings=(shardings, None),
    donate_argnums=0,
  )
  where = sharding.batch_sharding(layout, mesh)
  batch_target = {
    name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where)
    for name, a in data.batch_shapes().items()
  }
  with sharding.use(layout, mesh):
    step_fn = step_fn.lower(target, batch_target).compile()
  # From here on there is a run; what is wrong with it would have shown above.
  workdir.mkdir(parents=True, exist_ok=True)
  config_lib.remember(config, data.vocabulary, workdir)
  checkpoints = Checkpoints(workdir / CHECKPOINTS, options.keep)
  seconds = 0.0
  if restored := checkpoints.latest(target):
    current = restored.state
    batches.set_state(restored.progress["data"])
    seconds = restored.progress["seconds"]
  done = saved = int(current.step)
  begun = time.monotonic() - seconds
  writer = metrics.Writer(workdir, done)
  progress = metrics.Progress(done, options.steps)
  speed = metrics.Speed()
  evaluate_on = evaluate.evaluator(model, data.batch_size, layout, mesh)
  pending: tuple[int, Mapping[str, jax.Array]] | None = None

  def settle() -> None:
    """Brings the last step's metrics to the host, checks and reports them."""
    nonlocal pending
    if pending is None:
      return
    at, measured = pending
    pending = None
    values = {name: float(v) for name, v in jax.device_get(measured).items()}
    for name in ("loss", "grad_norm"):
      if not math.isfinite(values[name]):
        kept = (
          f"checkpoint {saved} is the last good one"
          if saved
          else "no checkpoint is kept"
        )
        raise FloatingPointError(
          f"{name} became {values[name]} at step {at}; {kept} in"
          f" {workdir / CHECKPOINTS}. Train in a new workdir with a lower"
          " config.optimizer.peak, or with config.optimizer.clip_norm."
        )
    speed.add(values.pop("words"))
    if at % options.log_every == 0:
      values["perplexity"] = evaluate.exp(values["loss"])
      values["learning_rate"] = float(schedule(at - 1))
      values["words_per_second"] = speed.read()
      writer.write(at, "train", values)
      progress.report(at, values)

  def validate() -> float:
    settle()
    values = evaluate_on(current.params, rows["validation"])
    writer.write(done, "validation", values)
    progress.say(f"step {done}: validation {_describe(values)}")
    speed.restart()
    return values["perplexity"]

  def save(perplexity: float | None = None) -> None:
    nonlocal saved, seconds
    settle()
    seconds = time.monotonic() - begun
    position = {"data": batches.get_state(), "seconds": seconds}
    checkpoints.save(current, done, position, perplexity)
    saved = done

  with (
    contextlib.closing(checkpoints),
    contextlib.closing(writer),
    contextlib.closing(progress),
    sharding.use(layout, mesh),
    _signals() as stopped,
  ):
    if done:
      progress.say(f"resuming {workdir} at step {done} of {options.steps}")
    while done < options.steps and not stopped():
      batch = evaluate.place(next(batches), layout, mesh)
      current, measured = step_fn(current, batch)
      done += 1
      # One step late, so that the device need not wait for the host.
      settle()
      pending = (done, measured)
      progress.advance(done)
      last = done == options.steps
      due = last or done % options.eval_every == 0
      perplexity = validate() if due else None
      if last or done % options.checkpoint_every == 0:
        save(perplexity)
    if done < options.steps:
      if saved < done:
        save()
      checkpoints.wait()
      progress.say(
        f"stopped at step {done} of {options.steps}, saved in {workdir}; the"
        " same command goes on from there."
      )
      return {}
    best = checkpoints.best(target)
    test = evaluate_on(best.state.params, rows["test"])
    result = {
      "test": test,
      "best_step": int(best.state.step),
      "steps": done,
      "seconds": seconds,
    }
    writer.write(done, "test", test)
    (workdir / RESULT_FILE).write_text(json.dumps(result, indent=2) + "\n")
    progress.say(
      f"test {_describe(test)}, by the best checkpoint (step"
      f" {result['best_step']} of {done}); trained in"
      f" {metrics.clock(result['seconds'])}; the run lies in {workdir}"
    )
  return result


def evaluate_run(
  workdir: pathlib.Path, split: str, files: Sequence[str] = ()
) -> dict[str, float]:
  """Evaluates the best checkpoint of a run.

  Args:
    workdir: of the run; it remembers config and vocabulary.
    split: of the run's own corpus.
    files: text files to read instead of a split.

  Returns:
    loss (nats per word), perplexity, words, the fraction of words that are
    unknown to the run's vocabulary, and the checkpoint's step.

  Raises:
    FileNotFoundError: there is no run in the workdir, or no such file.
    ValueError: the run has no checkpoint yet, or the files no text.
  """
  config = config_lib.recall(workdir)
  data = config_lib.data(config, workdir, files)
  tokens = data.tokens("data" if files else split)
  model = config_lib.model(config, len(data.vocabulary))
  _, tx = config_lib.optimizer(config)
  layout = config_lib.layout(config)
  mesh = sharding.make_mesh(layout)
  fresh, shardings = state.create(
    model, tx, data.batch_shapes(), config.seed, layout, mesh
  )
  with contextlib.closing(Checkpoints(workdir / CHECKPOINTS)) as checkpoints:
    best = checkpoints.best(state.abstract(fresh, shardings))
  if best is None:
    raise ValueError(f"the run in {workdir} has no checkpoint yet; train on.")
  run = evaluate.evaluator(model, data.batch_size, layout, mesh)
  values = run(best.state.params, data.rows(tokens))
  unknown = float((tokens.ids == data.vocabulary.unknown).mean())
  return values | {"unknown": unknown, "step": int(best.state.step)}


def _introduction(
  params: Mapping[str, Any],
  rows: Mapping[str, text.PackedRows],
  layout: sharding.Layout,
  mesh: jax.sharding.Mesh,
) -> Iterator[str]:
  def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))

  inner = {n: p for n, p in params.items() if n not in ("embed", "head")}
  kind = mesh.devices.flat[0].platform
  yield (
    f"{size(params):,} parameters, {size(inner):,} of them outside embedding"
    f" and softmax; layout {layout.name} on {mesh.size} {kind} device(s)"
  )
  words = ", ".join(f"{s} {part.num_words:,}" for s, part in rows.items())
  vocab_size = params["embed"]["table"].shape[0]
  yield f"vocabulary of {vocab_size:,}; words: {words}"


def _describe(values: Mapping[str, float]) -> str:
  return (
    f"perplexity {values['perplexity']:,.2f} per word"
    f" ({values['words']:,.0f} words)"
  )


@contextlib.contextmanager
def _signals() -> Iterator[Callable[[], bool]]:
  """Turns SIGTERM and Ctrl-C into a question to ask between two steps."""
  asked = threading.Event()
  # Python lets only the main thread set handlers; elsewhere nothing stops it.
  if threading.current_thread() is not threading.main_thread():
    yield asked.is_set
    return
  before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}

  def ask(number, frame):
    del frame
    asked.set()
    # A second Ctrl-C does what it does without us.
    signal.signal(number, before[number])

  for number in before:
    signal.signal(number, ask)
  try:
    yield asked.is_set
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
