"""What the experiments that train share: configs, runs that go on, the rest."""

import contextlib
import importlib.util
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from moejax import config as config_lib
from moejax.training import loop, metrics

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


@contextlib.contextmanager
def folder(name: str, quick: bool) -> Iterator[pathlib.Path]:
  """Gives the folder for an experiment's runs; a quick one's goes away."""
  if quick:
    with tempfile.TemporaryDirectory() as scratch:
      yield pathlib.Path(scratch)
  else:
    yield ROOT / "runs" / name


def train(config: config_lib.Config, workdir: pathlib.Path) -> Run:
  """Trains, or goes on where the workdir left off.

  Raises:
    SystemExit: a signal stopped it.
  """
  result = loop.train(config, workdir)
  if not result:
    raise SystemExit("stopped; the same command goes on from there")
  return Run(result, metrics.read(workdir / metrics.METRICS_FILE))
