"""What the experiments that train share: configs, runs that go on, the rest."""

import contextlib
import functools
import hashlib
import importlib.util
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import harness
from moejax import config as config_lib
from moejax import sharding
from moejax import workdir as workdir_lib
from moejax.data import batches
from moejax.moe import ROUTING
from moejax.planning import cost
from moejax.routing import Routing
from moejax.training import loop, metrics, session, step
from moejax.training import run as run_lib

ROOT = pathlib.Path(__file__).parents[1]
QUICK = {
  "data.row_length": 16,
  "data.batch_size": 256,
  "data.min_count": 100,
  "model.width": 16,
  "model.num_samples": 64,
  "train.steps": 10,
  "train.eval_every": 5,
}


class Run(NamedTuple):
  """A run that came to its end.

  Attributes:
    result: what `loop.train` returns.
    lines: the lines of its metrics, of all splits.
  """

  result: dict[str, Any]
  lines: list[dict[str, Any]]

  def last(self, name: str) -> float:
    """Returns a metric's mean over the last tenth of the training lines."""
    lines = [line for line in self.lines if line["split"] == "train"]
    last = lines[-max(1, len(lines) // 10) :]
    return float(np.mean([line[name] for line in last]))


def load(name: str) -> config_lib.Config:
  """Reads a file of configs/, such as "sotu/moe_32"."""
  path = ROOT / "configs" / f"{name}.py"
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config()


def regroup(config: config_lib.Config, tokens: int) -> None:
  """Makes groups of so many tokens, of whichever mixture the model has.

  Each is one at the second level too, if there is one.
  """
  for name in ("moe", "hierarchical_moe"):
    if name in config.model:
      config.model[name].group_size = tokens
      if "groups_together" in config.model[name]:
        config.model[name].groups_together = 1


def tokens_of_batch(config: config_lib.Config) -> int:
  """Returns the places for words in a batch."""
  return config.data.batch_size * config.data.row_length


@contextlib.contextmanager
def in_haste() -> Iterator[None]:
  """Compiles faster and less well, what then runs for seconds or not at all."""
  before = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", True)
  try:
    yield
  finally:
    jax.config.update("jax_disable_most_optimizations", before)


@contextlib.contextmanager
def folder(name: str, quick: bool, files: str = "") -> Iterator[pathlib.Path]:
  """Gives the folder for an experiment's runs; a quick one's goes away.

  Args:
    name: of the folder in runs/.
    quick: whether to take a temporary one.
    files: what is read in place of the experiment's own text. Runs on each
      have a folder in that one: they could not be resumed on another.
  """
  if not quick:
    own = hashlib.sha256(files.encode()).hexdigest()[:8] if files else ""
    yield ROOT / "runs" / name / own
    return
  with in_haste(), tempfile.TemporaryDirectory() as scratch:
    yield pathlib.Path(scratch)


def train(config: config_lib.Config, workdir: pathlib.Path) -> Run:
  """Trains, or goes on where the workdir left off.

  Raises:
    SystemExit: a signal stopped it; the same command goes on from there.
  """
  result = loop.train(config, workdir)
  if "signal" in result:
    raise SystemExit(128 + result["signal"])
  return Run(result, metrics.read(workdir / metrics.METRICS_FILE))


def report(config: config_lib.Config, run: Run) -> harness.Row:
  """Returns what a model costs and how good it is."""
  count = cost.count(config, 1)
  validations = [ln for ln in run.lines if ln["split"] == "validation"]
  test = run.result["test"]
  row = {
    "ops": count.ops,
    "parameters": count.parameters,
    "validation": round(min(ln["perplexity"] for ln in validations), 2),
    "test": round(test["perplexity"], 2),
    **{name: round(test[name], 2) for name in ("bleu", "chrf") if name in test},
    "cv_load": None,
    "dropped": None,
    "minutes": round(run.result["seconds"] / 60, 1),
  }
  if "cv_load" in run.lines[0]:
    row["cv_load"] = round(run.last("cv_load"), 3)
    row["dropped"] = round(run.last("dropped_fraction"), 3)
  return row


def decisions(
  workdir: pathlib.Path, split: str
) -> Iterator[tuple[dict[str, np.ndarray], dict[str, Any]]]:
  """Yields the batches of a split, and what a run's best checkpoint decides.

  Args:
    workdir: of the run.
    split: of its corpus.

  Yields:
    The batch, and the collection "routing" that its evaluation leaves.

  Raises:
    SystemExit: there is no run.
  """
  if not workdir_lib.is_run(workdir):
    raise SystemExit(f"there is no run in {workdir}; train one first")
  config = workdir_lib.recall(workdir)
  data = config_lib.data(config, workdir)
  parts = session.build(config, len(data.vocabulary))
  params = run_lib.best(workdir, parts).params

  @jax.jit
  def route(params, batch):
    apply = functools.partial(parts.model.apply, mutable=[ROUTING])
    return apply({"params": params}, batch)[1][ROUTING]

  with sharding.use(parts.layout, parts.mesh):
    for batch in batches.eval_batches(data.rows(split), data.batch_size):
      found = route(params, step.place(batch, parts.where))
      yield batch, jax.device_get(found)


def gates(routing: Routing) -> np.ndarray:
  """Returns the gate of every expert for every token of a batch, or 0.

  Args:
    routing: of a flat mixture, on the host.

  Returns:
    [tokens, experts].

  Raises:
    SystemExit: the mixture has two levels.
  """
  if routing.primary is not None:
    raise SystemExit(
      "a mixture of two levels does not say which token is whose"
    )
  G, S, E = routing.logits.shape
  found = jax.tree.map(jnp.asarray, routing.assignment)
  # The last column takes the unused edges.
  table = np.zeros((G, S, E + 1), np.float32)
  group = np.arange(G)[:, None]
  table[group, found.tokens(S), found.expert] = found.gate
  return table[..., :E].reshape(-1, E)
