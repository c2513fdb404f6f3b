"""`moejax plan`: what layouts cost; the search for the fastest that fits."""

import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from moejax import config as config_lib
from moejax import config_fields, sharding, terminal
from moejax.planning import chips, report
from moejax.planning import load as load_lib
from moejax.planning import plan as plan_lib
from moejax.planning.plan import Outcome, Plan, Refusal, with_prefix

# How often microbatches are doubled to make a layout fit, and how many steps
# are tried from the best.
DOUBLINGS, STEPS = 3, 8


def run(
  experiment: config_lib.Experiment,
  topologies: Sequence[str],
  names: Sequence[str],
  suggests: bool,
  out: pathlib.Path | None = None,
  load: load_lib.Load | None = None,
) -> list[Outcome]:
  """Plans, prints tables, writes files into a folder; returns all it tried.

  Without topologies (names as of `chips.find`) it plans for the devices at
  hand, without names of layouts for the config's own; to suggest is to search
  for the fastest layout that fits, on each topology. The load of a run is taken
  in place of equally busy experts.
  Errors as of `chips.find`; ValueError also where nothing can be or, after all
  else, where nothing fits that was to be suggested.
  """
  # Before anything else asks for a device.
  found = [chips.find(name) for name in topologies or [""]]
  if suggests and names:
    raise ValueError(
      f"--suggest looks at every layout, also at those of --layout"
      f" ({', '.join(names)}); give one of the two flags."
    )
  for topology in found if suggests else []:
    if topology.chip is None:
      raise ValueError(
        f"the speed of a device of {topology.name} is unknown, so there is no"
        " fastest layout to suggest; give --topology of a TPU or GPU,"
        " such as v5e:4x4 or h100:8."
      )
  known = layouts(experiment)
  names = [config_fields.one_of(each, known, "--layout") for each in names]
  vocab_size, by_topology = config_lib.vocab_size(experiment), []
  for topology in found:
    about = experiment, vocab_size, topology
    if suggests:
      tried = list(suggest(*about, load))
    else:
      choices = [known[name] for name in names or list(known)[:1]]
      tried = [attempt(*about, {"config.layout": c}, load) for c in choices]
    by_topology.append(tried)
  shown = outcomes = sum(by_topology, [])
  if suggests:
    terminal.say(f"\n{report.tries(outcomes)}")
    shown = []
    for tried in by_topology:
      # What did best with each layout, in the order of the search.
      best = {e.layout: e for e in reversed(sorted(tried, key=rank))}
      shown += [best[name] for name in dict.fromkeys(e.layout for e in tried)]
  terminal.say(f"\n{report.text(shown)}\n")
  if load is not None and any(
    isinstance(each, Plan) and each.filled is None for each in shown
  ):
    terminal.warn(
      "where experts have slots every device does the same, and --trace changes"
      " nothing; sorted rows follow the load (config.model.moe.dispatch"
      " 'ragged')."
    )
  if out is not None:
    report.write(outcomes, shown, out)
    terminal.say(
      f"wrote {out / report.PLAN_FILE} and {out / report.FIGURE_FILE}"
    )
  unfit = []
  for tried in by_topology if suggests else []:
    try:
      terminal.say(verdict(tried))
    except ValueError as error:
      unfit.append(str(error))
  if unfit:
    raise ValueError("\n".join(unfit))
  if all(isinstance(each, Refusal) for each in outcomes):
    raise ValueError(outcomes[0].reason)
  return outcomes


def layouts(experiment: config_lib.Experiment) -> dict[str, Any]:
  """Returns the values for config.layout by name, the config's own first."""
  own = {experiment.layout.name: experiment.values["layout"]}
  return own | {name: name for name in sharding.LAYOUTS if name not in own}


def attempt(
  experiment: config_lib.Experiment,
  vocab_size: int,
  topology: chips.Topology,
  changes: dict[str, Any],
  load: load_lib.Load | None = None,
) -> Outcome:
  """Plans a config with other values, by name, or says why that cannot be."""
  changed = config_lib.changed(experiment, changes)
  layout = changed.layout.name
  shown = {n: v for n, v in changes.items() if n != "config.layout"}
  also = "".join(f", {n.rpartition('.')[2]} {v}" for n, v in shown.items())
  terminal.say(f"compiling {layout} for {topology.name}{also}")
  try:
    fits = {}
    for path, layer in _mixtures(changed).items():
      together = layer.get("groups_together", 1)
      if together != 1:
        # At the second level, no more than a data replica has in a microbatch.
        mesh = sharding.make_mesh(changed.layout, topology.devices)
        fit = math.gcd(together, groups(changed) // mesh.shape["data"])
        if fit != together:
          fits[f"{path}.groups_together"] = fit
    if fits:
      shown |= fits
      changed = config_lib.changed(changed, fits)
    return plan_lib.make(changed, vocab_size, topology, shown, load)
  except ValueError as error:
    return Refusal(topology.name, layout, shown, str(error))


def _mixtures(experiment: config_lib.Experiment) -> dict[str, Any]:
  """Returns the sections of the mixtures that a model has, by their names.

  The sides of a Transformer that translates have one each; what is changed is
  changed in all, from what the first has.
  """
  model, found = experiment.values["model"], {}
  for name, section in config_lib.mixtures(experiment.values):
    *_, within, kind = name.split(".")
    if within == "model":
      stacks = [model.get(n, ()) for n in ("layers", "encoder", "decoder")]
    else:
      blocks = model.get(within, {})
      stacks = [blocks.get("first", ()), blocks.get("pattern", ())]
    if kind in ("moe", "hierarchical_moe") and any(kind in s for s in stacks):
      found[name] = section
  return found


def _first(experiment: config_lib.Experiment) -> Any:
  return next(iter(_mixtures(experiment).values()), {})


def groups(experiment: config_lib.Experiment) -> int:
  """Counts the groups of tokens of a microbatch."""
  layer = _first(experiment)
  if not layer.get("group_size"):
    return 1
  tokens = math.prod(experiment.shapes["mask"].shape)
  return tokens // experiment.train.microbatches // layer["group_size"]


def suggest(
  experiment: config_lib.Experiment,
  vocab_size: int,
  topology: chips.Topology,
  load: load_lib.Load | None = None,
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
    outcome = attempt(experiment, vocab_size, topology, changes, load)
    tried.append((outcome, changes))
    return outcome

  for choice in layouts(experiment).values():
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
      now = config_lib.changed(experiment, changes)
      changes = changes | _more_microbatches(now, topology)
  for _ in range(STEPS):
    _, changes = min(tried, key=lambda each: rank(each[0]))
    # Changes may say what the config says already.
    known = [config_lib.changed(experiment, each).values for _, each in tried]
    now = config_lib.changed(experiment, changes)
    for step in _steps(now, topology):
      if config_lib.changed(now, step).values not in known:
        yield look(changes | step)
        break
    else:
      return


def _steps(
  now: config_lib.Experiment, topology: chips.Topology
) -> Iterator[dict[str, Any]]:
  """Yields the changes to try next to a config."""
  layer = _first(now)
  size, within = layer.get("group_size"), ""
  if layer and layer.get("secondary") is not None:
    layer, within = layer["secondary"], "secondary."

  def all_have(field, value):
    return {f"{path}.{field}": value for path in _mixtures(now)}

  microbatches = now.train.microbatches
  if microbatches % 2 == 0:
    yield {"config.train.microbatches": microbatches // 2}
  if layer:
    yield all_have(f"{within}recompute", not layer.get("recompute", False))
    factor = layer.get("capacity_factor", 1.25)
    # Two levels that drop nothing have no slots to save.
    if factor != 1.0 and (factor is not None or not within):
      yield all_have(f"{within}capacity_factor", 1.0)
  if size:
    yield all_have("group_size", 2 * size)
    if size % 2 == 0:
      yield all_have("group_size", size // 2)
  yield _more_microbatches(now, topology)


def _more_microbatches(
  now: config_lib.Experiment, topology: chips.Topology
) -> dict[str, Any]:
  """Doubles the microbatches; of groups half the size, if those get too few."""
  step = {"config.train.microbatches": 2 * now.train.microbatches}
  # Groups of one token have no half.
  if (size := _first(now).get("group_size") or 1) > 1:
    left = groups(config_lib.changed(now, step))
    if left < 1 or left % len(topology.devices):
      step |= {f"{path}.group_size": size // 2 for path in _mixtures(now)}
  return step


def rank(outcome: Outcome) -> tuple[int, float]:
  """Orders outcomes: fitting ones by time, then others by what they need."""
  if isinstance(outcome, Plan):
    if outcome.memory.fits:
      return 0, outcome.estimate.seconds
    return 1, float(outcome.memory.needs)
  return (1, float(outcome.needs)) if outcome.needs else (2, 0.0)


def verdict(outcomes: Sequence[Outcome]) -> str:
  """Says which outcome to take, and why.

  ValueError where none fits: it names the least that one needs, or says why the
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
  flags = "".join(f" --{name}={value}" for name, value in best.changes.items())
  lines = [
    f"suggested for {best.topology}: layout {best.layout!r}{flags}",
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
