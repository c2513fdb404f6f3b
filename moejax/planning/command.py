"""`moejax plan`: what layouts cost on devices that need not be there."""

import pathlib
from collections.abc import Sequence

import jax

from moejax import config as config_lib
from moejax import terminal
from moejax.planning import chips, report, search


def run(
  config: config_lib.Config,
  topologies: Sequence[str],
  layouts: Sequence[str],
  suggest: bool,
  out: pathlib.Path | None = None,
) -> list[report.Outcome]:
  """Plans, prints tables, and writes files if told where.

  Args:
    config: of the run that is planned.
    topologies: names as of `chips.find`; none are the devices at hand.
    layouts: names; none are the config's own.
    suggest: whether to search for the fastest that fits, on each topology.
    out: folder for the files.

  Returns:
    All that was tried.

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
  if suggest:
    if layouts:
      raise ValueError(
        f"--suggest looks at every layout, also at those of --layout"
        f" ({', '.join(layouts)}); give one of the two flags."
      )
    for topology in found:
      search.check_speed(topology)
  config_lib.check(config)
  vocab_size = config_lib.vocab_size(config)
  by_topology = []

  def say(line: str) -> None:
    terminal.say(line)

  for topology in found:
    about = config, vocab_size, topology
    if suggest:
      tried = list(search.suggest(*about, say))
    else:
      tried = list(search.with_layouts(*about, layouts, say))
    by_topology.append(tried)
  outcomes = [each for tried in by_topology for each in tried]
  shown = outcomes
  if suggest:
    say(f"\n{report.tries(outcomes)}")
    shown = [e for tried in by_topology for e in search.best_of_layouts(tried)]
  say(f"\n{report.text(shown)}\n")
  if out is not None:
    report.write(outcomes, shown, out)
    say(f"wrote {out / report.PLAN_FILE} and {out / report.FIGURE_FILE}")
  unfit = []
  for tried in by_topology if suggest else []:
    try:
      say(search.verdict(tried))
    except ValueError as error:
      unfit.append(str(error))
  if unfit:
    raise ValueError("\n".join(unfit))
  if all(isinstance(each, search.Refusal) for each in outcomes):
    raise ValueError(outcomes[0].reason)
  return outcomes
