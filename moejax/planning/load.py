"""How busy experts were in a real run, for a plan of what the busiest do."""

import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from moejax import config as config_lib
from moejax.analysis import trace
from moejax.training import metrics


class Load(NamedTuple):
  """The edges to each expert of each mixture, by its name in the model.

  Attributes:
    source: where they are from.
    edges: of some steps, or of a whole text as one.
  """

  source: str
  edges: Mapping[str, Int[np.ndarray, "steps E"]]

  def busiest(self, devices: int) -> float:
    """Returns the load of the busiest device over the mean of all.

    Experts lie on devices in their order, as many on each. It is the mean of
    what it is at each step of each mixture.
    """
    found = []
    for edges in self.edges.values():
      by_device = edges.reshape(len(edges), devices, -1).sum(axis=2)
      mean = np.maximum(by_device.mean(axis=1), 1e-10)
      found.append((by_device.max(axis=1) / mean).mean())
    return float(np.mean(found))


def read(folder: pathlib.Path, experiment: config_lib.Experiment) -> Load:
  """Reads the load of a run, or of a routing trace of one, to plan a config.

  Of a run that is the last tenth of the steps that it logged.
  ValueError where the folder is neither, or of other numbers of experts.
  """
  if (folder / trace.ABOUT).exists():
    edges = {
      name: trace.decisions(folder, name).per_expert()[None]
      for name in trace.about(folder)["layers"]
    }
  else:
    edges = {
      name: counts[-max(1, len(counts) // 10) :]
      for name, (_, counts) in metrics.loads(folder).items()
    }
  if not edges:
    raise ValueError(
      f"{folder} is neither a run that logged the load of its experts nor a"
      " routing trace; give one of these (moejax eval --record=DIR)."
    )
  mixtures = config_lib.mixtures(experiment.values)
  planned = sorted({section["num_experts"] for _, section in mixtures})
  for name, counts in edges.items():
    if counts.shape[1] not in planned:
      raise ValueError(
        f"{folder} tells of {counts.shape[1]} experts in {name}, but the config"
        f" has mixtures of {', '.join(map(str, planned)) or 'none'}; take the"
        " load of a run with as many."
      )
  return Load(str(folder), edges)
