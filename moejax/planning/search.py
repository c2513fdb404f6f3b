"""Plans for several layouts, and the search for the fastest that fits."""

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

from moejax import config as config_lib
from moejax import named, sharding, terminal
from moejax.planning import plan as plan_lib
from moejax.planning.chips import Topology
from moejax.planning.plan import Outcome, Plan, Refusal, with_prefix

# How often microbatches are doubled to make a layout fit, and how many steps
# are tried from the best.
DOUBLINGS, STEPS = 3, 8


def layouts(config: config_lib.Config) -> dict[str, Any]:
  """Returns the values for config.layout by name, the config's own first."""
  own = {config_lib.layout(config).name: config.layout}
  return own | {name: name for name in sharding.LAYOUTS if name not in own}


def with_layouts(
  config: config_lib.Config,
  vocab_size: int,
  topology: Topology,
  names: Sequence[str],
) -> Iterator[Outcome]:
  """Yields an `attempt` for each layout; the config's own without names.

  Raises:
    ValueError: unknown layouts; names those that exist.
  """
  known = layouts(config)
  for name in names or list(known)[:1]:
    choice = known[named.known(name, known, "--layout")]
    yield attempt(config, vocab_size, topology, {"config.layout": choice})


def suggest(
  config: config_lib.Config, vocab_size: int, topology: Topology
) -> Iterator[Outcome]:
  """Yields all that is tried in search of the fastest estimate that fits.

  First every layout as the config stands; one that does not fit is tried with
  twice as many microbatches, and twice again, while what that saves, saved
  every time, would do. Then, one step after the other, what is next to the best
  so far: half the microbatches, recompute or not, less capacity, groups of
  twice or half the size, twice the microbatches.
  """
  tried = []

  def look(changes):
    tried.append((attempt(config, vocab_size, topology, changes), changes))
    return tried[-1][0]

  for choice in layouts(config).values():
    changes = {"config.layout": choice}
    before = math.inf
    for left in range(DOUBLINGS, -1, -1):
      outcome = look(changes)
      yield outcome
      if isinstance(outcome, Refusal) or outcome.memory.fits:
        break
      needs, has = outcome.memory.needs, outcome.memory.has
      saved, before = before - needs, needs
      if needs - saved * left > has:
        break
      changes = changes | _more_microbatches(config, changes, topology)
  for _ in range(STEPS):
    _, changes = min(tried, key=lambda each: rank(each[0]))
    # Changes may say what the config says already.
    known = [changed_config(config, each) for _, each in tried]
    for step in _steps(config, changes, topology):
      if changed_config(config, changes | step) not in known:
        yield look(changes | step)
        break
    else:
      return


def best_of_layouts(outcomes: Sequence[Outcome]) -> list[Outcome]:
  """Returns what did best with each layout, in the order of a search."""
  best = {each.layout: each for each in reversed(sorted(outcomes, key=rank))}
  return [best[name] for name in dict.fromkeys(e.layout for e in outcomes)]


def rank(outcome: Outcome) -> tuple[int, float]:
  """Orders outcomes: fitting ones by time, then others by what they need."""
  if isinstance(outcome, Plan):
    if outcome.memory.fits:
      return 0, outcome.estimate.seconds
    return 1, float(outcome.memory.needs)
  return (1, float(outcome.needs)) if outcome.needs else (2, 0.0)


def verdict(outcomes: Sequence[Outcome]) -> str:
  """Says which outcome to take, and why.

  Raises:
    ValueError: none fits; names the least that one needs, or says why the
      first cannot be.
  """
  best, *others = sorted(outcomes, key=rank)
  kind, least = rank(best)
  if kind == 2:
    raise ValueError(f"nothing can be on {best.topology}: {best.reason}")
  if kind == 1:
    raise ValueError(
      f"nothing fits on {best.topology}: the least, layout {best.layout!r},"
      f" needs {with_prefix(int(least))}B of each device; take more devices, or"
      " config.optimizer.kind 'factored_adam'."
    )
  fitting = [
    each for each in others if rank(each)[0] == 0 and each.layout != best.layout
  ]
  flags = [f"--{name}={value}" for name, value in best.changes.items()]
  lines = [
    " ".join(
      [f"suggested for {best.topology}: layout {best.layout!r}", *flags]
    ),
    f"  it needs {with_prefix(best.memory.needs)}B of"
    f" {with_prefix(best.memory.has)}B, and {1e3 * best.estimate.seconds:,.1f}"
    f" ms a step by the estimate ({best.words_per_second:,.0f} words/s), bound"
    f" by {best.estimate.bound}",
  ]
  if fitting:
    ratio = fitting[0].estimate.seconds / best.estimate.seconds
    lines.append(
      f"  the next layout that fits, {fitting[0].layout!r}, takes {ratio:.2f}"
      " times as long"
    )
  out = {e.layout for e in outcomes} - {e.layout for e in (best, *fitting)}
  if out:
    lines.append(f"  {', '.join(sorted(out))}: no fit was found")
  return "\n".join(lines)


def attempt(
  config: config_lib.Config,
  vocab_size: int,
  topology: Topology,
  changes: dict[str, Any],
) -> Outcome:
  """Plans a config with other values, by name, or says why that cannot be."""
  changed = changed_config(config, changes)
  layout = config_lib.layout(changed).name
  shown = {n: v for n, v in changes.items() if n != "config.layout"}
  also = "".join(f", {n.rpartition('.')[2]} {v}" for n, v in shown.items())
  terminal.say(f"compiling {layout} for {topology.name}{also}")
  try:
    path, layer = _mixture(changed)
    together = layer.get("groups_together", 1)
    if together != 1:
      # At the second level, no more than a data replica has in a microbatch.
      mesh = sharding.make_mesh(config_lib.layout(changed), topology.devices)
      fit = math.gcd(together, groups(changed) // mesh.shape["data"])
      if fit != together:
        shown |= {f"{path}.groups_together": fit}
        changed = changed_config(changed, shown)
    return plan_lib.make(changed, vocab_size, topology, shown)
  except ValueError as error:
    return Refusal(topology.name, layout, shown, str(error))


def changed_config(
  config: config_lib.Config, changes: dict[str, Any]
) -> config_lib.Config:
  """Returns a copy with other values; names begin with "config."."""
  changed = copy.deepcopy(config)
  with changed.unlocked(), changed.ignore_type():
    for name, value in changes.items():
      *path, last = name.split(".")[1:]
      section = changed
      for each in path:
        section = section[each]
      section[last] = value
  return changed


def _mixture(config: config_lib.Config) -> tuple[str, Any]:
  """Returns the name and the section of the model's mixture; or none."""
  stacks = (config.model.get(n, ()) for n in ("layers", "encoder", "decoder"))
  used = {name for stack in stacks for name in stack}
  for name in ("moe", "hierarchical_moe"):
    if name in used:
      return f"config.model.{name}", config.model.get(name) or {}
  return "", {}


def groups(config: config_lib.Config) -> int:
  """Counts the groups of tokens of a microbatch."""
  _, layer = _mixture(config)
  if not layer.get("group_size"):
    return 1
  tokens = config.data.batch_size * config.data.row_length
  return tokens // config_lib.train(config).microbatches // layer["group_size"]


def _more_microbatches(
  config: config_lib.Config, changes: dict[str, Any], topology: Topology
) -> dict[str, Any]:
  """Doubles the microbatches; of groups half the size, if those get too few."""
  now = changed_config(config, changes)
  count = 2 * config_lib.train(now).microbatches
  step = {"config.train.microbatches": count}
  path, layer = _mixture(now)
  if size := layer.get("group_size"):
    left = groups(changed_config(now, step))
    if left < 1 or left % len(topology.devices):
      step[f"{path}.group_size"] = size // 2
  return step


def _steps(
  config: config_lib.Config, changes: dict[str, Any], topology: Topology
) -> Iterator[dict[str, Any]]:
  """Yields the changes to try next to these."""
  now = changed_config(config, changes)
  path, layer = _mixture(now)
  size, section = layer.get("group_size"), path
  if layer and layer.get("secondary") is not None:
    layer, section = layer["secondary"], f"{path}.secondary"
  microbatches = config_lib.train(now).microbatches
  if microbatches % 2 == 0:
    yield {"config.train.microbatches": microbatches // 2}
  if layer:
    yield {f"{section}.recompute": not layer.get("recompute", False)}
    if layer.get("capacity_factor", 1.25) != 1.0:
      yield {f"{section}.capacity_factor": 1.0}
  if size:
    yield {f"{path}.group_size": 2 * size}
    if size % 2 == 0:
      yield {f"{path}.group_size": size // 2}
  yield _more_microbatches(config, changes, topology)
