"""`moejax plan`: what layouts cost on devices that need not be there."""

import pathlib
from collections.abc import Sequence

import jax

from moejax import config as config_lib
from moejax import terminal
from moejax.planning import chips, plan, report, search


def run(
  experiment: config_lib.Experiment,
  topologies: Sequence[str],
  layouts: Sequence[str],
  suggest: bool,
  out: pathlib.Path | None = None,
) -> list[plan.Outcome]:
  """Plans, prints tables, writes files into a folder; returns all it tried.

  Without topologies (names as of `chips.find`) it plans for the devices at
  hand, without layouts for the config's own; to suggest is to search for the
  fastest layout that fits, on each topology.

  Raises:
    ValueError: a name that is unknown, nothing that can be, or, after all
      else, topologies on which nothing fits where it is to be suggested.
    ModuleNotFoundError: the TPU's compiler is missing.
  """
  if topologies:
    # Else JAX looks for a TPU as well, and its compiler complains of none.
    jax.config.update("jax_platforms", "cpu")
  # Before anything else asks for a device.
  found = [chips.find(name) for name in topologies or [""]]
  if suggest and layouts:
    raise ValueError(
      f"--suggest looks at every layout, also at those of --layout"
      f" ({', '.join(layouts)}); give one of the two flags."
    )
  for topology in found if suggest else []:
    if topology.chip is None:
      raise ValueError(
        f"the speed of a device of {topology.name} is unknown, so there is no"
        " fastest layout to suggest; give --topology of a TPU, such as"
        " v5e:4x4."
      )
  vocab_size = config_lib.vocab_size(experiment)
  by_topology = []
  for topology in found:
    about = experiment, vocab_size, topology
    tried = (
      search.suggest(*about)
      if suggest
      else search.with_layouts(*about, layouts)
    )
    by_topology.append(list(tried))
  shown = outcomes = sum(by_topology, [])
  if suggest:
    terminal.say(f"\n{report.tries(outcomes)}")
    shown = sum(map(search.best_of_layouts, by_topology), [])
  terminal.say(f"\n{report.text(shown)}\n")
  if out is not None:
    report.write(outcomes, shown, out)
    terminal.say(
      f"wrote {out / report.PLAN_FILE} and {out / report.FIGURE_FILE}"
    )
  unfit = []
  for tried in by_topology if suggest else []:
    try:
      terminal.say(search.verdict(tried))
    except ValueError as error:
      unfit.append(str(error))
  if unfit:
    raise ValueError("\n".join(unfit))
  if all(isinstance(each, plan.Refusal) for each in outcomes):
    raise ValueError(outcomes[0].reason)
  return outcomes
