"""Plans for several layouts, and the search for the fastest that fits."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from moejax import config as config_lib
from moejax import named, sharding
from moejax.planning import plan as plan_lib
from moejax.planning.chips import Topology
from moejax.planning.plan import Plan

# Times that microbatches are doubled to make a layout fit, and steps that are
# tried from the best.
DOUBLINGS, STEPS = 3, 8


class Refusal(NamedTuple):
  """A layout that cannot be: it divides no devices, or fits into none.

  Attributes:
    topology: its name.
    layout: its name.
    changes: as of `Plan`.
    reason: a sentence.
    needs: bytes of a device, where that is the reason.
    has: bytes that there are.
  """

  topology: str
  layout: str
  changes: dict[str, Any]
  reason: str
  needs: int | None = None
  has: int | None = None


Outcome = Plan | Refusal
Say = Callable[[str], None]


def layouts(config: config_lib.Config) -> dict[str, Any]:
  """Returns the values for config.layout by name, the config's own first."""
  own = {config_lib.layout(config).name: config.layout}
  return own | {name: name for name in sharding.LAYOUTS if name not in own}


def with_layouts(
  config: config_lib.Config,
  vocab_size: int,
  topology: Topology,
  names: Sequence[str],
  say: Say,
) -> Iterator[Outcome]:
  """Yields a plan for each layout, or why there can be none.

  Args:
    config: of the run.
    vocab_size: words of the vocabulary.
    topology: the devices.
    names: of layouts; none are the config's own.
    say: told what is being compiled.

  Raises:
    ValueError: unknown layouts; names those that exist.
  """
  known = layouts(config)
  for name in names or list(known)[:1]:
    choice = known[named.known(name, known, "--layout")]
    yield attempt(config, vocab_size, topology, {"config.layout": choice}, say)


def suggest(
  config: config_lib.Config, vocab_size: int, topology: Topology, say: Say
) -> Iterator[Outcome]:
  """Yields all that is tried in search of the fastest estimate that fits.

  First every layout as the config stands; one that does not fit is tried with
  twice as many microbatches, and twice again, while what that saves, saved
  every time, would do. Then from the best so far, one
  step after the other: half the microbatches, recompute or not, less capacity,
  groups of twice or half the size, twice the microbatches.
  """
  tried = []

  def look(changes):
    outcome = attempt(config, vocab_size, topology, changes, say)
    tried.append((outcome, changes))
    return outcome

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
    best, changes = min(tried, key=lambda each: rank(each[0]))
    # Changes may say what the config says already.
    known = [changed_config(config, each) for _, each in tried]
    steps = _steps(config, changes, topology)
    following = (changes | step for step in steps)
    new = next(
      (e for e in following if changed_config(config, e) not in known), None
    )
    if new is None:
      return
    yield look(new)


def check_speed(topology: Topology) -> None:
  """Refuses what `suggest` could not compare.

  Raises:
    ValueError: nobody says how fast these devices are.
  """
  if topology.chip is None:
    raise ValueError(
      f"how fast a device of {topology.name} is, nobody says, so there is no"
      " fastest layout to suggest; give --topology of a TPU, such as v5e:4x4."
    )


def best_of_layouts(outcomes: Sequence[Outcome]) -> list[Outcome]:
  """Returns what did best with each layout, in the order of a search."""
  found: dict[str, Outcome] = {}
  for each in outcomes:
    if each.layout not in found or rank(each) < rank(found[each.layout]):
      found[each.layout] = each
  return list(found.values())


def rank(outcome: Outcome) -> tuple[int, float]:
  """Orders outcomes: fitting ones by time, then others by what they need."""
  if isinstance(outcome, Plan):
    if outcome.memory.fits:
      return 0, outcome.estimate.seconds
    return 1, float(outcome.memory.needs)
  return (1, float(outcome.needs)) if outcome.needs else (2, 0.0)


def verdict(outcomes: Sequence[Outcome]) -> str:
  """Says which outcome is to be taken, and why.

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
      f" needs {plan_lib.in_bytes(int(least))} of each device; take more"
      " devices, or config.optimizer.kind 'factored_adam'."
    )
  fitting = [each for each in others if rank(each)[0] == 0]
  needs, has = map(plan_lib.in_bytes, (best.memory.needs, best.memory.has))
  lines = [
    " ".join(
      [f"suggested for {best.topology}: layout {best.layout!r}", *_flags(best)]
    ),
    f"  it needs {needs} of {has}, and {1e3 * best.estimate.seconds:,.1f} ms a"
    f" step by the estimate ({best.words_per_second:,.0f} words/s), bound by"
    f" {best.estimate.bound}",
  ]
  other = next((e for e in fitting if e.layout != best.layout), None)
  if other:
    ratio = other.estimate.seconds / best.estimate.seconds
    lines.append(
      f"  the next layout that fits, {other.layout!r}, takes {ratio:.2f} times"
      " as long"
    )
  out = {e.layout for e in outcomes} - {e.layout for e in (best, *fitting)}
  if out:
    lines.append(f"  {', '.join(sorted(out))}: no way to fit was found")
  return "\n".join(lines)


def _flags(outcome: Outcome) -> list[str]:
  return [f"--{name}={value}" for name, value in outcome.changes.items()]


def attempt(
  config: config_lib.Config,
  vocab_size: int,
  topology: Topology,
  changes: dict[str, Any],
  say: Say,
) -> Outcome:
  """Plans a config with other values, or says why that cannot be.

  Args:
    config: of the run.
    vocab_size: words of the vocabulary.
    topology: the devices.
    changes: values by name, which begins with "config.".
    say: told what is being compiled.
  """
  changed = changed_config(config, changes)
  layout = config_lib.layout(changed).name
  shown = {n: v for n, v in changes.items() if n != "config.layout"}
  also = "".join(f", {n.rpartition('.')[2]} {v}" for n, v in shown.items())
  say(f"compiling {layout} for {topology.name}{also}")
  try:
    if together := _together(changed, topology):
      changed = changed_config(changed, together)
      shown |= together
    return plan_lib.make(changed, vocab_size, topology, shown)
  except plan_lib.DoesNotFit as error:
    return Refusal(
      topology.name, layout, shown, str(error), error.needs, error.has
    )
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


def _together(config: config_lib.Config, topology: Topology) -> dict[str, Any]:
  """Returns how many groups of tokens can be together at the second level.

  Fewer than the config says where a data replica has fewer in a microbatch.
  """
  path, layer = _mixture(config)
  together = layer.get("groups_together", 1)
  if together == 1:
    return {}
  mesh = sharding.make_mesh(config_lib.layout(config), topology.devices)
  fit = math.gcd(together, groups(config) // mesh.shape["data"])
  return {} if fit == together else {f"{path}.groups_together": fit}


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
  """Yields what may be tried next to a config with these changes."""
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
